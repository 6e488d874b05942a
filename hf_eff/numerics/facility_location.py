"""Facility location: choose rows such that every row has one of them near it.

    f(S) = sum over rows i of  w[i] * max over j in S of s[i, j],      s >= 0

The greedy order adds the row with the largest gain, sum_i w[i] * max(0, s[i, j] - c[i]), where c[i] is
how well row i is covered so far. Any beginning of it reaches at least 1 - 1/e of the best value of its
size (Nemhauser, Wolsey and Fisher, 1978). Gains only fall as rows are added, so an old gain is an upper
bound, and most rows need not be looked at again (Minoux, 1978).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np

from hf_eff.errors import OptionError

# N rows, k neighbours a row, E stored pairs

SIMILARITIES = ("cosine", "euclidean")
"""``cosine``: max(0, cos). ``euclidean``: max D^2 - D^2, with the largest over the stored pairs."""
_TILE = 1024


class Similarity(Protocol):
    """Similarities that are not negative, seen column by column."""

    def __len__(self) -> int:
        """N."""
        ...

    def column(self, row: int) -> tuple[np.ndarray | slice, np.ndarray]:
        """Rows that ``row`` may cover, and how well it does."""
        ...

    def totals(self, weights: np.ndarray) -> np.ndarray:
        """[N] weighted sum of each column: the gain of each row as the first."""
        ...


class DenseSimilarity:
    """All pairs: 4 N^2 bytes.

    Args:
        values: [N, N] float32, symmetric.
    """

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    @classmethod
    def of(cls, vectors: np.ndarray, kind: str = "cosine") -> DenseSimilarity:
        """Similarities of [N, h] rows of length one, a tile of rows at a time."""
        count = len(vectors)
        values = np.empty((count, count), dtype=np.float32)
        for start in range(0, count, _TILE):
            np.matmul(vectors[start : start + _TILE], vectors.T, out=values[start : start + _TILE])
        least = float(values.min(initial=1.0))
        for start in range(0, count, _TILE):
            values[start : start + _TILE] = _similarity(values[start : start + _TILE], kind, least)
        # A row's similarity to itself, freed of rounding.
        np.fill_diagonal(values, _own(kind, least))
        return cls(values)

    def __len__(self) -> int:
        """N."""
        return len(self._values)

    def column(self, row: int) -> tuple[np.ndarray | slice, np.ndarray]:
        """Every row."""
        return slice(None), self._values[row]

    def totals(self, weights: np.ndarray) -> np.ndarray:
        """[N] weighted column sums in float64."""
        total = np.zeros(len(self))
        for start in range(0, len(self), _TILE):
            total += weights[start : start + _TILE] @ self._values[start : start + _TILE]
        return total


class SparseSimilarity:
    """Pairs of near rows only, by column; all others count as 0: about 8 N k bytes.

    Args:
        starts: [N + 1] where each column begins.
        rows: [E] int32 row of each pair.
        values: [E] float32.
    """

    def __init__(self, starts: np.ndarray, rows: np.ndarray, values: np.ndarray) -> None:
        self._starts, self._rows, self._values = starts, rows, values

    @classmethod
    def of(cls, indices: np.ndarray, cosines: np.ndarray, kind: str = "cosine") -> SparseSimilarity:
        """Similarities from nearest neighbours; each row is also its own.

        Args:
            indices: [N, k] neighbours of each row; negative where there is none.
            cosines: [N, k].
            kind: One of ``SIMILARITIES``.
        """
        count, width = indices.shape
        there = indices.ravel() >= 0
        least = float(cosines.ravel()[there].min(initial=1.0))
        own = np.arange(count, dtype=np.int32)
        columns = np.concatenate([indices.ravel()[there], own])
        rows = np.concatenate([np.repeat(own, width)[there], own])
        near = _similarity(cosines.ravel()[there], kind, least)
        values = np.concatenate([near, np.full(count, _own(kind, least), dtype=np.float32)])
        order = np.argsort(columns, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(columns, minlength=count))])
        return cls(starts, rows[order], values[order])

    def __len__(self) -> int:
        """N."""
        return len(self._starts) - 1

    def column(self, row: int) -> tuple[np.ndarray | slice, np.ndarray]:
        """Rows that have this one among their neighbours, and itself."""
        part = slice(self._starts[row], self._starts[row + 1])
        return self._rows[part], self._values[part]

    def totals(self, weights: np.ndarray) -> np.ndarray:
        """[N] weighted column sums in float64; no column is empty, since each row covers itself."""
        return np.add.reduceat(self._values * weights[self._rows], self._starts[:-1]) if len(self) else np.zeros(0)


def facility_location(similarity: Similarity, weights: np.ndarray | None = None) -> Iterator[tuple[int, float]]:
    """All rows in greedy order.

    Ties go to the lower row, so rows in an order of their content give an order that depends on
    content alone. Rows that add nothing come last.

    Args:
        similarity: Of N rows.
        weights: [N] finite, not negative: how much it counts that a row is covered; None for 1 each.

    Yields:
        row: Position of the next row.
        gain: What it adds to the value of those before.
    """
    counts = np.ones(len(similarity)) if weights is None else np.asarray(weights, dtype=np.float64)
    covered = np.zeros(len(similarity))
    heap = [(-gain, row) for row, gain in enumerate(similarity.totals(counts).tolist())]
    heapq.heapify(heap)
    while heap:
        _, row = heapq.heappop(heap)
        rows, values = similarity.column(row)
        gain = float(counts[rows] @ np.maximum(values - covered[rows], 0.0))
        if heap and (-gain, row) > heap[0]:
            heapq.heappush(heap, (-gain, row))
            continue
        covered[rows] = np.maximum(covered[rows], values)
        yield row, gain


def covered_value(similarity: Similarity, chosen: Iterable[int], weights: np.ndarray | None = None) -> float:
    """The value, f, of some rows."""
    counts = np.ones(len(similarity)) if weights is None else np.asarray(weights, dtype=np.float64)
    covered = np.zeros(len(similarity))
    for row in chosen:
        rows, values = similarity.column(row)
        covered[rows] = np.maximum(covered[rows], values)
    return float(counts @ covered)


def _similarity(cosines: np.ndarray, kind: str, least: float) -> np.ndarray:
    """Of rows of length one, D^2 is 2 - 2 cos; its largest value belongs to the least cosine."""
    if kind == "cosine":
        return np.maximum(cosines, 0.0)
    if kind == "euclidean":
        return np.maximum(2.0 * (cosines - least), 0.0).astype(np.float32)
    raise OptionError(f"similarity must be one of {list(SIMILARITIES)}, got {kind!r}.")


def _own(kind: str, least: float) -> float:
    return 1.0 if kind == "cosine" else 2.0 * (1.0 - least)
