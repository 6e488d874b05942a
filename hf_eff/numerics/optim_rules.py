"""What some of transformers' ``optim`` names silently do not do: accumulate, clip, agree over ranks."""

from __future__ import annotations

from hf_eff.contracts.cost import RunFacts

_SHARDED = ("fsdp2", "fsdp1", "deepspeed")


def updates_in_backward(optim: str) -> bool:
    """Whether an ``optim`` name updates each parameter in the backward of each micro-batch."""
    return optim in ("lomo", "adalomo") or optim.endswith("_layerwise")


def optim_problem(run: RunFacts, backend: str = "none") -> str | None:
    """Why ``optim`` cannot work with the other training arguments, as a sentence; None where it can.

    Args:
        run: Training arguments.
        backend: How processes share the work, as in ``HardwareFacts.backend``.
    """
    if run.custom_optimizer:
        return None
    if not updates_in_backward(run.optim):
        if backend in _SHARDED and run.optim.startswith(("galore", "apollo")):
            return (
                f"optim={run.optim!r} projects whole matrices, and {backend} keeps a part of each on every process; "
                "use DDP, or optim='adamw_torch'."
            )
        return None
    if run.accumulation > 1:
        return (
            f"optim={run.optim!r} updates in the backward of every micro-batch, so gradient_accumulation_steps="
            f"{run.accumulation} would make {run.accumulation} small steps of one; set gradient_accumulation_steps=1 "
            "and a larger batch, or use memory='fused'."
        )
    if backend != "none":
        return (
            f"optim={run.optim!r} updates before gradients are averaged over processes, so that ranks would drift "
            "apart; use one process, or optim='adamw_torch'."
        )
    return None


def optim_warning(run: RunFacts) -> str | None:
    """What ``optim`` leaves undone without saying so, as a sentence; None where nothing."""
    if run.custom_optimizer or run.max_grad_norm <= 0 or not updates_in_backward(run.optim):
        return None
    return (
        f"optim={run.optim!r} does not apply max_grad_norm={run.max_grad_norm:g}: weights move before the norm of all "
        "gradients is known; max_grad_norm=0 says so."
    )
