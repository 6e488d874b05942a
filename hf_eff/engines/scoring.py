"""Scoring a pool: bounded batches, a model left exactly as found, one loss per example."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_eff.contracts.selection import Pool, SelectionContext
from hf_eff.engines.packed_weights import never_packed
from hf_eff.engines.pool_pass import scored_batches
from hf_eff.errors import DataError
from hf_eff.numerics.example_loss import IGNORE_INDEX, Reduction, example_losses

_HEADS = (
    "ForCausalLM",
    "LMHeadModel",
    "ForConditionalGeneration",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForMultipleChoice",
)
_NO_RNG = ("cpu", "meta")
_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_CAPTURE_HOOKS = "transformers.utils.output_capturing"
_TENSOR_HOOK_TABLES = ("_backward_hooks", "_post_accumulate_grad_hooks")


@contextmanager
def scoring_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode that leaves no trace.

    On exit, also after an error: training flags, ``requires_grad``, ``.grad`` and hooks of every
    module and parameter, and the global random states of torch, NumPy and Python are as found.
    Inside, ``.grad`` is None, so that a backward cannot touch accumulated gradients.
    """
    modules = list(model.modules())
    parameters = list(model.parameters())
    modes = [module.training for module in modules]
    flags = [parameter.requires_grad for parameter in parameters]
    grads = [parameter.grad for parameter in parameters]
    owners: list[nn.Module | Tensor] = [*modules, *parameters]
    hooks = [_hook_tables(owner) for owner in owners]
    with _random_states(parameters), never_packed(model):
        try:
            model.eval()
            for parameter in parameters:
                parameter.grad = None
            yield
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
            for owner, tables in zip(owners, hooks, strict=True):
                _restore_hooks(owner, tables)
            for parameter, flag, grad in zip(parameters, flags, grads, strict=True):
                parameter.requires_grad_(flag)
                parameter.grad = grad


def model_example_losses(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    is_causal_lm: bool,
    reduction: Reduction = "mean",
) -> tuple[Tensor, Tensor]:
    """Per-example losses of a padded batch on the model's device; differentiable when gradients are on.

    The model is called without labels: no loss of its own, and none of the fused output heads that
    trainers patch in, which have no logits to look at. A head whose loss is not a plain cross-entropy,
    regression or multi-label loss is asked for ``outputs.loss`` one row at a time.

    Args:
        model: Unwrapped model, PEFT or not, already in the wanted mode.
        batch: Tensors of the collator, on the model's device, with ``labels``.
        is_causal_lm: Whether labels are shifted by one.
        reduction: See ``example_losses``; a head scored row by row has one loss position a row.

    Returns:
        losses: [B] in nats, NaN for rows without loss positions.
        counts: [B] loss positions.
    """
    core = _core(model)
    labels = batch.get("labels")
    if labels is None or not (is_causal_lm or _has_plain_head(core)):
        return _losses_row_by_row(model, batch)
    outputs = model(**inputs_without_labels(core, batch, is_causal_lm=is_causal_lm))
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    if not isinstance(logits, Tensor) or (logits.dim() == 3 and labels.shape != logits.shape[:2]):
        return _losses_row_by_row(model, batch)
    problem_type = getattr(getattr(core, "config", None), "problem_type", None)
    return example_losses(logits, labels, shift=is_causal_lm, reduction=reduction, problem_type=problem_type)


def pool_losses(
    context: SelectionContext,
    pool: Pool,
    *,
    reduction: Reduction = "mean",
    all_tokens: bool = False,
    description: str = "Scoring",
) -> np.ndarray:
    """Loss of every row of ``pool`` under ``context.model``, without gradients or side effects.

    Ends early with ``BudgetExceededError`` or ``ScoringStoppedError``, see ``pool_batches``.

    Args:
        context: Model, collator, limits and progress bar.
        pool: Rows to score; rows without loss tokens are skipped.
        reduction: See ``example_losses``.
        all_tokens: Score every token of the row instead of those that carry loss (language models).
        description: Text of the progress bar.

    Returns:
        [N] float64 in nats, NaN for invalid rows.
    """
    losses = np.full(len(pool), np.nan)

    def score(_positions: np.ndarray, batch: dict[str, Tensor]) -> np.ndarray:
        if all_tokens:
            batch["labels"] = _every_token(batch)
        values, _ = model_example_losses(context.model, batch, is_causal_lm=context.is_causal_lm, reduction=reduction)
        found: np.ndarray = values.double().cpu().numpy()
        return found

    with scoring_mode(context.model), torch.no_grad():
        for positions, some in scored_batches(context, pool, description, score):
            losses[positions] = some
    return losses


def _every_token(batch: Mapping[str, Tensor]) -> Tensor:
    ids = batch["input_ids"]
    return ids.masked_fill(batch.get("attention_mask", torch.ones_like(ids)) == 0, IGNORE_INDEX)


def _core(model: Any) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _has_plain_head(core: nn.Module) -> bool:
    return any(base.__name__.endswith(_HEADS) for base in type(core).__mro__)


def inputs_without_labels(core: Any, batch: Mapping[str, Any], *, is_causal_lm: bool) -> dict[str, Any]:
    """What a model takes for its logits alone.

    Args:
        core: The model, without an adapter's wrapper.
        batch: A collated batch.
        is_causal_lm: Whether labels are shifted by one.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    accepted = inspect.signature(type(core).forward).parameters
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    if getattr(getattr(core, "config", None), "is_encoder_decoder", False) and "decoder_input_ids" not in inputs:
        if hasattr(core, "prepare_decoder_input_ids_from_labels"):
            inputs["decoder_input_ids"] = core.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        else:
            inputs["labels"] = batch["labels"]
    if is_causal_lm and "position_ids" in accepted and "position_ids" not in inputs:
        inputs |= _positions_behind_left_padding(inputs.get("attention_mask"))
    return inputs


def _positions_behind_left_padding(mask: Any) -> dict[str, Tensor]:
    """Positions that do not count padding, lest a loss depend on the rows it is batched with."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool((mask[:, 0] != 0).all()):
        return {}
    return {"position_ids": (mask.long().cumsum(dim=1) - 1).clamp(min=0)}


def _losses_row_by_row(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    rows = next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()), 0)
    losses = []
    for row in range(rows):
        outputs = model(**{k: v[row : row + 1] if isinstance(v, Tensor) and v.dim() else v for k, v in batch.items()})
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0]
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise DataError(
                f"{type(model).__name__} returns no loss for a batch with {sorted(batch)}; "
                "give rows a 'labels' column or use a selection method that needs no model."
            )
        losses.append(loss.reshape(()).float())
    stacked = torch.stack(losses)
    return stacked, torch.isfinite(stacked).long()


def _hook_tables(owner: nn.Module | Tensor) -> dict[str, dict[int, Any] | None]:
    names = _HOOK_TABLES if isinstance(owner, nn.Module) else _TENSOR_HOOK_TABLES
    found = {name: getattr(owner, name, None) for name in names}
    return {name: None if table is None else dict(table) for name, table in found.items()}


def _restore_hooks(owner: nn.Module | Tensor, tables: Mapping[str, dict[int, Any] | None]) -> None:
    for name, before in tables.items():
        now = getattr(owner, name, None)
        if now is not None and dict(now) != (before or {}):
            # In place: handles that callers hold refer to this very table. What transformers installed on
            # first use stays: it marks the model as hooked and would never install them again.
            kept = {key: hook for key, hook in now.items() if getattr(hook, "__module__", "") == _CAPTURE_HOOKS}
            now.clear()
            now.update({**(before or {}), **kept})


@contextmanager
def _random_states(parameters: Sequence[Tensor]) -> Iterator[None]:
    accelerators = sorted({(p.device.type, p.device.index or 0) for p in parameters if p.device.type not in _NO_RNG})
    kind = accelerators[0][0] if accelerators else "cuda"
    python, numeric = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global state is what is kept
    try:
        with torch.random.fork_rng(devices=[index for _, index in accelerators], device_type=kind):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numeric)  # noqa: NPY002
