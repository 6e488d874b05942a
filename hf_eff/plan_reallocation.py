"""What a governor may do besides stopping: the user's choice read, checked against the run, and priced. Pure."""

from __future__ import annotations

from typing import Any

from hf_eff.contracts.cost import Facts
from hf_eff.errors import PlanError
from hf_eff.numerics.flops import everything_trains
from hf_eff.options import ResolvedOptions
from hf_eff.units import format_bytes

DATA_ACTIONS = ("refresh", "next_band", "widen")
ACTIONS = (*DATA_ACTIONS, "memory")
WINDOWS = 40
"""Windows of a run where the user names no length."""
STEADY_SCHEDULES = ("constant", "constant_with_warmup")
"""Learning-rate schedules that a cooldown can end."""
_WHOLE_MODEL = ("none", "ddp")
_WORTH_A_NOTE = 2**30


def chosen_actions(config: Any) -> tuple[str, ...]:
    """What the user lets the governor do, from its knob ``actions``; empty where it may only stop.

    Raises:
        PlanError: A word is not known.
    """
    words = [word.strip() for word in str(getattr(config, "actions", "") or "").split("+") if word.strip()]
    unknown = [word for word in words if word not in ACTIONS]
    if unknown:
        raise PlanError(f"actions names {unknown[0]!r}; it joins words of {list(ACTIONS)} by '+'.")
    return tuple(word for word in ACTIONS if word in words)


def cooldown_share(resolved: ResolvedOptions) -> float:
    """Share of the compute spent that is kept for a cooldown; 0 where the governor may not act."""
    acts = resolved.options.governor_mode == "act"
    return float(getattr(resolved.governor.config, "cooldown", 0.0)) if acts else 0.0


def planned_window(resolved: ResolvedOptions, steps: int | None) -> int | None:
    """Optimizer steps between two moments at which the rows may change; None where they never do.

    Args:
        resolved: The run's options.
        steps: Optimizer steps of the run, or None when unknown.
    """
    config = resolved.governor.config
    if not steps or not set(DATA_ACTIONS) & set(chosen_actions(config)):
        return None
    return int(getattr(config, "window_steps", 0)) or max(1, steps // WINDOWS)


def keeps_best(resolved: ResolvedOptions, facts: Facts) -> bool:
    """Whether the weights of the best probe are kept, to be put back when the loss rises."""
    differentiates = all(chosen.spec.traits.needs_backward for chosen in resolved.memory)
    return _wants_best(resolved) and differentiates and facts.hardware.backend in _WHOLE_MODEL


def _wants_best(resolved: ResolvedOptions) -> bool:
    governor = resolved.governor
    wanted = resolved.options.governor_mode == "act" and bool(getattr(governor.config, "restore_best", False))
    return wanted and governor.spec.traits.needs_reference_set


def refuse_reallocation(resolved: ResolvedOptions, facts: Facts) -> None:
    """Refuse actions that this run could never carry out.

    Raises:
        PlanError: The sentence says what to use instead.
    """
    address, config = resolved.governor.spec.address, resolved.governor.config
    on_data = [action for action in chosen_actions(config) if action in DATA_ACTIONS]
    if on_data:
        asked = f"{address} with actions={'+'.join(on_data)!r}"
        _refuse_changing_rows(asked, resolved, facts)
        if "refresh" in on_data and facts.hardware.backend not in _WHOLE_MODEL:
            raise PlanError(
                f"{asked} scores the pool with the whole model, which {facts.hardware.backend} keeps in pieces; use "
                "DDP, or actions='next_band+widen'."
            )
    schedule, share = facts.run.lr_scheduler, float(getattr(config, "cooldown", 0.0))
    if share > 0 and schedule not in STEADY_SCHEDULES:
        raise PlanError(
            f"{address} with cooldown={share:g} lowers the learning rate itself at the end, and "
            f"lr_scheduler_type={schedule!r} does so by a plan of its own; use lr_scheduler_type="
            "'constant_with_warmup' or 'constant', or cooldown=0."
        )


def _refuse_changing_rows(asked: str, resolved: ResolvedOptions, facts: Facts) -> None:
    if not resolved.selects:
        raise PlanError(f"{asked} changes which rows are chosen, and none are; set selection=..., such as 'less'.")
    if facts.run.packing or facts.run.padding_free:
        flag = "packing" if facts.run.packing else "padding_free"
        raise PlanError(
            f"{asked} takes other rows in the middle of a run, and {flag}=True has joined rows before it; set "
            f"{flag}=False, or leave these actions out."
        )
    if facts.pool.streaming or facts.pool.num_rows is None:
        raise PlanError(f"{asked} needs a dataset of known length, and a stream was given; pass a map-style Dataset.")


def reallocation_notes(resolved: ResolvedOptions, facts: Facts, steps: int | None) -> list[str]:
    """What the user should know before spending.

    Args:
        resolved: The run's options.
        facts: Facts of the run while training.
        steps: Optimizer steps of the run, or None when unknown.
    """
    notes = []
    window = planned_window(resolved, steps)
    if window is not None:
        notes.append(
            f"rows may change every {window} optimizer steps; such a window is what the trainer calls an epoch, in "
            "logs and in save, eval and logging strategies."
        )
    part = facts.model.trainable or everything_trains(facts.model)
    size = part.params * facts.model.param_bytes
    if keeps_best(resolved, facts) and size >= _WORTH_A_NOTE:
        notes.append(
            f"the trained weights, {format_bytes(size)}, are written into the output folder at each probe that is the "
            "best so far, and removed at the end; restore_best=False writes none."
        )
    if _wants_best(resolved) and not keeps_best(resolved, facts):
        notes.append(
            "the weights of the best probe are not kept without a backward pass or with a model in pieces: after a "
            "rise of the loss the last ones stay."
        )
    return notes
