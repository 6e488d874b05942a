"""Scoring a pool: bounded batches, a model left exactly as found, one loss per example."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from hf_eff.contracts.selection import Pool, SelectionContext
from hf_eff.errors import DataError, EffError
from hf_eff.numerics.example_loss import IGNORE_INDEX, Reduction, example_losses

Value = TypeVar("Value")
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


class ScoringStoppedError(EffError, RuntimeError):
    """Scoring was asked to stop before every row had a score; there is no selection."""


def token_batches(
    lengths: Sequence[int] | np.ndarray,
    batch_tokens: int,
    generator: torch.Generator | None = None,
    *,
    ties: Sequence[str] | None = None,
) -> list[np.ndarray]:
    """Group positions into batches of similar length, longest first.

    Args:
        lengths: [N] tokens of each row.
        batch_tokens: Upper bound of rows x longest row. A row longer than this is a batch of its own.
        generator: Shuffles the order of the batches, not their content. None keeps longest first,
            so that a batch that does not fit in memory fails at once.
        ties: [N] keys, such as row hashes, that order rows of equal length; with them the batches
            do not depend on the order of the rows.

    Returns:
        Arrays of positions that partition ``range(N)``.

    >>> [batch.tolist() for batch in token_batches([3, 9, 4, 3], batch_tokens=9)]
    [[1], [2, 0], [3]]
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    keys = (np.arange(len(sizes)), -sizes) if ties is None else (np.arange(len(sizes)), np.asarray(ties), -sizes)
    batches: list[list[int]] = []
    width = 0
    for position in np.lexsort(keys):
        size = int(sizes[position])
        if not batches or (len(batches[-1]) + 1) * max(width, size) > batch_tokens:
            batches.append([])
            width = size
        batches[-1].append(int(position))
    arrays = [np.asarray(batch, dtype=np.int64) for batch in batches]
    if generator is None:
        return arrays
    return [arrays[i] for i in torch.randperm(len(arrays), generator=generator).tolist()]


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
    with _random_states(parameters):
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
    outputs = model(**_inputs_without_labels(core, batch, is_causal_lm=is_causal_lm))
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    if not isinstance(logits, Tensor) or (logits.dim() == 3 and labels.shape != logits.shape[:2]):
        return _losses_row_by_row(model, batch)
    problem_type = getattr(getattr(core, "config", None), "problem_type", None)
    return example_losses(logits, labels, shift=is_causal_lm, reduction=reduction, problem_type=problem_type)


def pool_batches(
    context: SelectionContext, pool: Pool, description: str
) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
    """Collated batches of the valid rows of ``pool``, each one paid for before it is handed out.

    Every process gets every batch; see ``scored_batches`` for shares of them.

    ``context.spend`` may refuse the next batch with ``BudgetExceededError``.

    Yields:
        positions: [B] rows of the batch.
        batch: Tensors on ``context.device``.

    Raises:
        ScoringStoppedError: ``context.stop_requested`` answered True.
    """
    batches = _valid_batches(context, pool)
    for positions in context.progress(batches, total=len(batches), description=description):
        batch, cost = _collated(context, pool, positions)
        _pay(context, [cost] * context.processes.size, description)
        yield positions, _on_device(batch, context)


def scored_batches(
    context: SelectionContext,
    pool: Pool,
    description: str,
    score: Callable[[np.ndarray, dict[str, Tensor]], Value],
) -> Iterator[tuple[np.ndarray, Value]]:
    """What ``score`` makes of each batch of the valid rows of ``pool``; processes share the batches.

    The batches are those of a single process and every process gets every result, so that what is built from the
    results is the same on all of them. An error of one process is raised on all.

    Args:
        context: Model, collator, limits, progress bar and processes.
        pool: Rows to score; rows without loss tokens are skipped.
        description: Text of the progress bar.
        score: Called with positions [B] and a batch; with several processes its result must be picklable.

    Yields:
        positions: [B] rows of the batch.
        result: What ``score`` returned for it.

    Raises:
        BudgetExceededError: The next batch would pass a limit; it was not computed.
        ScoringStoppedError: ``context.stop_requested`` answered True.
    """
    batches, processes = _valid_batches(context, pool), context.processes
    rounds = range(0, len(batches), processes.size)
    for start in context.progress(rounds, total=len(rounds), description=description):
        # Where fewer batches are left than processes, the last one is scored by several: nobody waits for less.
        mine = batches[min(start + processes.rank, len(batches) - 1)]
        batch, cost = _collated(context, pool, mine)
        _pay(context, processes.gather(cost), description)
        outcomes = processes.gather(_attempt(score, mine, _on_device(batch, context)))
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        yield from zip(batches[start : start + processes.size], outcomes, strict=False)


def _attempt(score: Callable[..., Value], *arguments: Any) -> Value | Exception:
    """What a function returns, or the error it raises."""
    try:
        return score(*arguments)
    except Exception as error:  # noqa: BLE001 - raised again, by every process
        return error


def _valid_batches(context: SelectionContext, pool: Pool) -> list[np.ndarray]:
    valid = np.flatnonzero(pool.loss_lengths > 0)
    ties = None if pool.row_hash is None else [pool.row_hash[i] for i in valid.tolist()]
    return [valid[local] for local in token_batches(pool.lengths[valid], context.batch_tokens, ties=ties)]


@dataclass(frozen=True)
class _BatchCost:
    """What one process is about to spend, and whether it was asked to stop."""

    flops: float
    tokens: float
    stop: bool


def _collated(context: SelectionContext, pool: Pool, positions: np.ndarray) -> tuple[Mapping[str, Any], _BatchCost]:
    batch = context.collate([pool.rows[int(i)] for i in positions])
    width = _padded_length(batch, context.model) or int(pool.lengths[positions].max())
    rows = len(positions)
    return batch, _BatchCost(context.forward_flops(rows, width), float(rows * width), context.stop_requested())


def _pay(context: SelectionContext, costs: Sequence[_BatchCost], description: str) -> None:
    """Charge what all processes are about to compute: each keeps the same books, so all refuse together."""
    if any(cost.stop for cost in costs):
        raise ScoringStoppedError(f"{description}: stopped on request before all rows were scored.")
    context.spend(sum(cost.flops for cost in costs), sum(cost.tokens for cost in costs))


def _on_device(batch: Mapping[str, Any], context: SelectionContext) -> dict[str, Any]:
    return {key: _to_device(value, context.device) for key, value in batch.items()}


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


def _inputs_without_labels(core: Any, batch: Mapping[str, Any], *, is_causal_lm: bool) -> dict[str, Any]:
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


def _padded_length(batch: Mapping[str, Any], model: Any) -> int:
    """Tokens of one row of the batch as it is computed, encoder and decoder together; 0 without token ids."""
    two_stacks = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    parts = [batch.get(name) for name in ("input_ids", *(["labels"] if two_stacks else []))]
    return sum(int(part.shape[1]) for part in parts if isinstance(part, Tensor) and part.dim() == 2)


def _to_device(value: Any, device: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


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
