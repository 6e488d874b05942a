"""Taking rows from a greedy order, one at a time, until a selection has its size."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hf_eff.contracts.selection import Pool, SelectionContext
from hf_eff.engines.pool_size import SizedConfig
from hf_eff.errors import ScoringStoppedError

_LOOK = 64
"""Picks between two looks at whether to stop."""


def take_greedily(
    context: SelectionContext,
    config: SizedConfig,
    rows: np.ndarray,
    order: Iterator[tuple[int, float]],
    *,
    flops: float = 0.0,
    description: str,
) -> tuple[np.ndarray, np.ndarray]:
    """The longest beginning of a greedy order that stays within the size asked for.

    Args:
        context: Pool, limits and progress bar.
        config: Size.
        rows: [M] positions in the pool that the order counts in.
        order: Yields a place in ``rows`` and what it adds, best first.
        flops: Charged before each pick.
        description: Text of the progress bar.

    Returns:
        positions: [k] positions in the pool.
        values: [k] float64 what each added.

    Raises:
        BudgetExceededError: The next pick would pass a limit; it was not computed.
        DataError: Not even the first row fits.
        ScoringStoppedError: A stop was requested.
    """
    units, limit, used = config.units(context.pool), config.limit(context.pool), 0
    positions: list[int] = []
    values: list[float] = []
    count = most_rows(config, context.pool, rows)
    for number in context.progress(range(count), total=count, description=description):
        if number % _LOOK == 0 and context.stop_requested():
            raise ScoringStoppedError(f"{description}: stopped on request after {number} of {count} picks.")
        if flops:
            context.spend(flops, 0.0)
        place, value = next(order)
        positions.append(int(rows[place]))
        values.append(value)
        used += int(units[positions[-1]])
        if used > limit:
            break
    kept = config.take(np.asarray(positions, dtype=np.int64), context.pool)
    return kept, np.asarray(values[: len(kept)])


def most_rows(config: SizedConfig, pool: Pool, rows: np.ndarray) -> int:
    """Rows of ``rows`` that fit at most, at least 1: what they would be if the shortest were taken."""
    used = np.cumsum(np.sort(config.units(pool)[rows]))
    return max(1, int(np.searchsorted(used, config.limit(pool), side="right")))


def planned_rows(config: SizedConfig, num_rows: int, mean_tokens: float) -> float:
    """Rows that a selection of this size has, for a pool known by its size alone."""
    size = config.size
    asked = {
        "fraction": size["value"] * num_rows,
        "num_examples": size["value"],
        "num_tokens": size["value"] / max(1.0, mean_tokens),
    }
    return float(min(num_rows, asked[size["kind"]]))
