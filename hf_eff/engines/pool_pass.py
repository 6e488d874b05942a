"""Passes over a pool: bounded batches of similar length, paid for before they are computed, shared by processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from hf_eff.contracts.selection import Pool, SelectionContext
from hf_eff.errors import ScoringStoppedError

Value = TypeVar("Value")


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


def unfinished(context: SelectionContext, pool: Pool, done: np.ndarray) -> Pool:
    """The pool in which only rows of unfinished batches are valid: a batch is redone as a whole or not at all.

    Processes that kept different batches redo what any of them lacks, so that they stay in step.

    Args:
        context: Whose batches.
        pool: All rows.
        done: [N] whether a row has a result.
    """
    finished = np.logical_and.reduce(context.processes.gather(np.asarray(done, dtype=bool)))
    lacking = np.zeros_like(pool.loss_lengths)
    for batch in _valid_batches(context, pool):
        if not finished[batch].all():
            lacking[batch] = pool.loss_lengths[batch]
    return replace(pool, loss_lengths=lacking)


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


def _padded_length(batch: Mapping[str, Any], model: Any) -> int:
    """Tokens of one row of the batch as it is computed, encoder and decoder together; 0 without token ids."""
    two_stacks = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    parts = [batch.get(name) for name in ("input_ids", *(["labels"] if two_stacks else []))]
    return sum(int(part.shape[1]) for part in parts if isinstance(part, Tensor) and part.dim() == 2)


def _to_device(value: Any, device: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
