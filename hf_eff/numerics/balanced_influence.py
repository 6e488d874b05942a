"""Choosing rows so that every target is served: greedy balancing of a matrix of influences.

With A[i, j] the influence of row i on target j, each column is standardised, which takes out how strongly
its target responds to everything, and cut off at a few standard deviations. Rows are then taken one by one,
with s_j the mean of column j over the rows taken:

    max_row       the row whose lead over s is largest for some target: argmax over i, j of Z[i, j] - s_j
    argmin_task   the best row of the target that has got least so far: j = argmin s, i = argmax Z[:, j]

Read literally a step looks at all N V entries. But s_j is the same for all rows, so that the best row of a
column is always its largest unused entry: with columns sorted once, a step looks at V heads, and the
whole costs N V log k + k V. No column needs more than its k + 1 largest entries.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hf_eff.errors import OptionError

# N rows, V targets, k rows to take

MODES = ("max_row", "argmin_task")
_SILENT = 1e-12
"""Standard deviation, relative to the column's size, below which a column says nothing."""


def standardise(influence: np.ndarray, clip: float | None = 6.0) -> np.ndarray:
    """Columns at mean zero and standard deviation one, cut off at ``clip`` on both sides.

    Args:
        influence: [N, V] finite.
        clip: Standard deviations; None for no bound.

    Returns:
        [N, V] float32; zeros in columns that are constant.

    >>> standardise(np.array([[1.0, 5.0], [3.0, 5.0]])).tolist()
    [[-1.0, 0.0], [1.0, 0.0]]
    """
    result = np.empty(influence.shape, dtype=np.float32)
    for column in range(influence.shape[1]):
        values = influence[:, column].astype(np.float64)
        values -= values.mean()
        spread = values.std()
        scale = np.abs(influence[:, column]).max()
        values = values / spread if spread > _SILENT * scale else np.zeros_like(values)
        result[:, column] = values if clip is None else np.clip(values, -clip, clip)
    return result


def balanced_order(standardised: np.ndarray, count: int, mode: str = "max_row") -> tuple[np.ndarray, np.ndarray]:
    """Rows in the order in which they are taken.

    Args:
        standardised: [N, V] from ``standardise``. Of equal candidates the one of the lower row comes first.
        count: Rows k to take, at most N.
        mode: One of ``MODES``.

    Returns:
        rows: [k] distinct rows.
        targets: [k] column that each was taken for.

    Raises:
        OptionError: The mode is not known, or there are fewer rows.
    """
    if mode not in MODES or not 0 <= count <= len(standardised):
        raise OptionError(
            f"mode must be one of {list(MODES)} and count at most {len(standardised)}, got {mode!r}, {count}."
        )
    order = _best_of_columns(standardised, count)
    columns = np.arange(standardised.shape[1])
    pointers = np.zeros_like(columns)
    heads, taken = order[0], np.zeros(len(standardised), dtype=bool)
    values = standardised[heads, columns].astype(np.float64)
    total = np.zeros(len(columns))
    rows, targets = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
    for step in range(count):
        column = _next_column(values, total / max(1, step), heads, mode, first=step == 0)
        row = heads[column]
        rows[step], targets[step] = row, column
        taken[row] = True
        total += standardised[row]
        # Only columns that had this row in front move on, past rows that other columns took.
        for place in np.flatnonzero(heads == row):
            _advance(order[:, place], pointers, place, taken)
        heads = order[pointers, columns]
        values = standardised[heads, columns].astype(np.float64)
    return rows, targets


def _next_column(values: np.ndarray, mean: np.ndarray, heads: np.ndarray, mode: str, *, first: bool) -> int:
    """The column whose head is taken; the lowest row decides between equals."""
    if mode == "argmin_task" and not first:
        behind = np.flatnonzero(mean == mean.min())
        return int(behind[np.lexsort((heads[behind], -values[behind]))[0]])
    lead = values - mean
    best = np.flatnonzero(lead == lead.max())
    return int(best[np.argmin(heads[best])])


def _advance(order: np.ndarray, pointers: np.ndarray, place: Any, taken: np.ndarray) -> None:
    pointer = pointers[place]
    while pointer + 1 < len(order) and taken[order[pointer]]:
        pointer += 1
    pointers[place] = pointer


def _best_of_columns(standardised: np.ndarray, count: int) -> np.ndarray:
    """[min(k + 1, N), V] int32 rows of the largest entries of each column; of equals the lower row first."""
    size = min(count + 1, len(standardised))
    order = np.empty((size, standardised.shape[1]), dtype=np.int32)
    for column in range(standardised.shape[1]):
        values = np.ascontiguousarray(standardised[:, column])
        # All entries equal to the last one that fits are candidates: a partition does not order them by row.
        bound = np.partition(values, len(values) - size)[len(values) - size]
        candidates = np.flatnonzero(values >= bound)
        order[:, column] = candidates[np.argsort(-values[candidates], kind="stable")][:size]
    return order
