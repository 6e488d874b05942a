"""The gradient of every example of a batch with respect to LoRA factors, from one backward.

For a factor y = x W^T the gradient of example b is G_b = sum over tokens t of g_bt x_bt^T, where g is
the gradient of the summed losses with respect to y. Forward hooks on the inner ``lora_A`` and
``lora_B`` modules give x and y, so that the scale alpha / r and everything between two factors enter
by themselves. ``.grad`` of no parameter is read or written.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_eff.engines.module_tree import contiguous_head
from hf_eff.engines.scoring import model_example_losses
from hf_eff.errors import DataError, PlanError
from hf_eff.numerics.example_loss import IGNORE_INDEX, Reduction

# B examples, T tokens, r rank, i inputs and o outputs of a factor

_PACKING_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_lengths", "seq_idx")

_SHORT = 128
"""Tokens up to which a fused attention kernel is slower than plain matrix products, in half precision on a CPU."""

Calls = dict[str, list[tuple[Tensor, Tensor]]]
"""Input and output of each call of each module during one forward."""
Signal = tuple[Tensor, Tensor]
"""Slope of the losses with respect to a module's output, and the module's input."""


def example_gradients(
    model: nn.Module,
    factors: Mapping[str, nn.Linear],
    batch: Mapping[str, Any],
    *,
    is_causal_lm: bool,
    reduction: Reduction = "mean",
    compute_dtype: torch.dtype | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Gradients of every example's own loss, one factor at a time.

    Args:
        model: The model that holds the factors, unwrapped, in the mode wanted (evaluation).
        factors: LoRA factors by name; their order numbers the results. Weights need ``requires_grad``.
        batch: A padded batch on the model's device, one example a row, with ``labels``.
        is_causal_lm: Whether labels are shifted by one.
        reduction: What each example's summed loss is divided by; see ``example_losses``.
        compute_dtype: Autocast type of the forward; None computes in the type of the weights.

    Yields:
        index: Number of the factor in ``factors``. A factor that took no part is left out.
        gradients: [B, o * i], rows of ``weight.grad.flatten()``, float32 or float64.

    Raises:
        DataError: Rows of the batch are not independent examples, or no factor took part.
        PlanError: The model's training loss couples the rows of a batch.
    """
    signals = module_signals(
        model,
        factors,
        batch,
        is_causal_lm=is_causal_lm,
        reduction=reduction,
        compute_dtype=compute_dtype,
    )
    for index, name in enumerate(factors):
        if name in signals:
            yield index, _outer_sum(signals.pop(name))


def module_signals(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batch: Mapping[str, Any],
    *,
    is_causal_lm: bool,
    reduction: Reduction = "mean",
    compute_dtype: torch.dtype | None = None,
) -> dict[str, list[Signal]]:
    """What per-example gradients are made of: slopes and inputs of modules, from one backward.

    Arguments as for ``example_gradients``; the modules' own weights need ``requires_grad``.

    Returns:
        Slope [B, ..., o] of the summed losses and input [B, ...] of each call, by module. A module that took
        no part is left out.
    """
    with torch.enable_grad(), _recorded(modules) as calls:
        losses, counts = adapter_losses(
            model, batch, is_causal_lm=is_causal_lm, reduction=reduction, compute_dtype=compute_dtype
        )
        places = [(name, call) for name, made in calls.items() for call in range(len(made))]
        # The sum over examples, not the mean: row b of every gradient is then that of loss b alone.
        outputs = [calls[name][call][1] for name, call in places]
        slopes = torch.autograd.grad(losses[counts > 0].sum(), outputs, allow_unused=True)
    found: dict[str, list[Signal]] = {}
    for (name, call), slope in zip(places, slopes, strict=True):
        if slope is not None:
            found.setdefault(name, []).append((slope, calls[name][call][0]))
    return {name: _by_example(name, parts, len(losses)) for name, parts in found.items()}


def adapter_losses(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    is_causal_lm: bool,
    reduction: Reduction = "mean",
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-example losses that depend on an adapter; arguments as for ``example_gradients``.

    Logits are computed from the first position on that any row is scored at, which with masked
    prompts is a small part of them.

    Returns:
        losses: [B] in nats, NaN for rows without loss positions.
        counts: [B] loss positions.

    Raises:
        DataError: The batch is packed, or no factor took part.
        PlanError: The model's training loss couples the rows of a batch.
    """
    _require_separate_rows(model, batch)
    if is_causal_lm:
        batch = _scored_tail(model, batch)
    with _autocast(batch, compute_dtype), _attention(model, batch, compute_dtype), contiguous_head(model):
        losses, counts = model_example_losses(model, batch, is_causal_lm=is_causal_lm, reduction=reduction)
    if not losses.requires_grad:
        raise DataError(
            "no LoRA factor took part in the forward; enable the adapter and unmerge it, "
            "and choose target modules that the model calls."
        )
    return losses, counts


def _scored_tail(model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch with a request for the logits that have a label, where the model takes such requests."""
    labels = batch.get("labels")
    wrapper: Any = model
    core = wrapper.get_base_model() if hasattr(wrapper, "get_base_model") else wrapper
    takes_requests = "logits_to_keep" in inspect.signature(type(core).forward).parameters
    if not takes_requests or "logits_to_keep" in batch or not isinstance(labels, Tensor) or labels.dim() != 2:
        return batch
    scored = (labels[:, 1:] != IGNORE_INDEX).any(dim=0).nonzero()
    first = int(scored[0]) if len(scored) else 0
    return {**batch, "labels": labels[:, first:], "logits_to_keep": labels.shape[1] - first}


def _require_separate_rows(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Check that each row of the batch is one example whose loss is its own."""
    found = [key for key in _PACKING_KEYS if batch.get(key) is not None]
    if found or _restarts(batch.get("position_ids"), batch.get("attention_mask")):
        raise DataError(
            f"the batch is packed ({found[0] if found else 'position_ids restart inside a row'}): several examples "
            "share a row and have no gradient of their own; select before packing, or turn packing off."
        )
    if getattr(getattr(model, "config", None), "output_router_logits", False):
        raise PlanError(
            "the model adds a load-balancing loss over the whole batch (output_router_logits=True), which has no part "
            "that belongs to one example; set model.config.output_router_logits=False."
        )


def _autocast(batch: Mapping[str, Any], dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Mixed precision on the batch's device, or nothing without a type."""
    if dtype is None:
        return nullcontext()
    device = next(value.device.type for value in batch.values() if isinstance(value, Tensor))
    return torch.autocast(device, dtype=dtype)


def _attention(model: nn.Module, batch: Mapping[str, Any], dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Attention by plain matrix products where the backward of the fused kernel is the slower one."""
    tensors = [value for value in batch.values() if isinstance(value, Tensor)]
    width = max((value.shape[1] for value in tensors if value.dim() > 1), default=0)
    dtype = dtype or next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    is_half = dtype in (torch.bfloat16, torch.float16)
    if is_half and width <= _SHORT and all(value.device.type == "cpu" for value in tensors):
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


@contextmanager
def _recorded(modules: Mapping[str, nn.Module]) -> Iterator[Calls]:
    """Keep input and output of every call of the modules.

    Yields:
        What has been kept so far, by module.
    """
    calls: Calls = {}

    def hook(name: str) -> Any:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            calls.setdefault(name, []).append((inputs[0].detach(), output))

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _by_example(name: str, parts: list[Signal], rows: int) -> list[Signal]:
    """The calls of one module, each with a row an example."""
    if all(len(slope) == 1 for slope, _ in parts) and len(parts) == rows:
        # The model was called once a row: its head has no per-example loss of its own.
        return [(torch.cat([slope for slope, _ in parts]), torch.cat([inputs for _, inputs in parts]))]
    for slope, _ in parts:
        if len(slope) != rows:
            raise DataError(
                f"{name} sees {len(slope)} rows for a batch of {rows} examples, so that gradients of single examples "
                "cannot be told apart; turn padding-free batches off, or leave routed experts out of target_modules."
            )
    return parts


def _outer_sum(parts: list[Signal]) -> Tensor:
    """[B, o * i] from the slopes [B, T, o] and inputs [B, T, i] of every call of one factor."""
    total = _outer(*parts[0])
    for slope, inputs in parts[1:]:
        total += _outer(slope, inputs)
    return total


def _outer(slope: Tensor, inputs: Tensor) -> Tensor:
    exact = torch.promote_types(slope.dtype, torch.float32)
    slope = slope.reshape(len(slope), -1, slope.shape[-1]).to(exact)
    inputs = inputs.reshape(len(inputs), -1, inputs.shape[-1]).to(exact)
    return torch.bmm(slope.transpose(1, 2), inputs).flatten(1)


def _restarts(positions: Any, mask: Any) -> bool:
    """Whether positions of real tokens fall inside a row."""
    if not isinstance(positions, Tensor) or positions.dim() != 2:
        return False
    falls = positions[:, 1:] <= positions[:, :-1]
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape == positions.shape:
        falls &= mask[:, 1:].bool() & mask[:, :-1].bool()
    return bool(falls.any())
