"""Walking down a ranking and keeping what is not too close to anything kept before."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_TILE = 256
"""Candidates compared with the kept rows at once."""
_BLOCK = 65536
"""Kept rows compared at once, so that no N x k matrix exists."""


class Novelty(NamedTuple):
    """Outcome of ``greedy_novel``.

    Attributes:
        kept: [k] rows kept, in the order of the ranking.
        nearest: [N] float32 largest cosine to a row kept *before* the row was looked at; -1 for the first,
            NaN for rows that were not looked at.
        neighbour: [N] that row; -1 where there is none.
    """

    kept: np.ndarray
    nearest: np.ndarray
    neighbour: np.ndarray


def greedy_novel(order: np.ndarray, vectors: np.ndarray, tau: float, limit: int) -> Novelty:
    """Keep a row when its cosine to every row kept so far is at most ``tau``, until ``limit`` are kept.

    Costs at most ``len(order) * limit * h`` multiply-adds.

    Args:
        order: [M] rows to look at, best first.
        vectors: [N, h] of length one.
        tau: Largest cosine allowed, in [-1, 1].
        limit: Rows to keep at most.

    >>> greedy_novel(np.array([2, 0, 1]), np.array([[1.0, 0], [0, 1], [1, 0]], dtype=np.float32), 0.9, 3).kept.tolist()
    [2, 1]
    """
    nearest = np.full(len(vectors), np.nan, dtype=np.float32)
    neighbour = np.full(len(vectors), -1, dtype=np.int64)
    kept: list[int] = []
    held = np.empty((min(limit, len(order)), vectors.shape[1]), dtype=vectors.dtype)
    for start in range(0, len(order), _TILE):
        tile = order[start : start + _TILE]
        near, where = _nearest(vectors[tile], held[: len(kept)])
        inside = np.minimum(vectors[tile] @ vectors[tile].T, 1.0)
        for place, row in enumerate(tile.tolist()):
            if len(kept) == limit:
                return Novelty(np.asarray(kept, dtype=np.int64), nearest, neighbour)
            nearest[row], neighbour[row] = near[place], kept[where[place]] if where[place] >= 0 else -1
            if near[place] > tau:
                continue
            held[len(kept)] = vectors[row]
            closer = inside[:, place] > near
            near[closer], where[closer] = inside[closer, place], len(kept)
            kept.append(row)
    return Novelty(np.asarray(kept, dtype=np.int64), nearest, neighbour)


def _nearest(tile: np.ndarray, held: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Largest cosine of each row of the tile to a held row, and its place; -1 and -1 where none is held."""
    near, where = np.full(len(tile), -1.0, dtype=np.float32), np.full(len(tile), -1, dtype=np.int64)
    for start in range(0, len(held), _BLOCK):
        # Rounding may put the cosine of equal vectors a little above 1.
        cosines = np.minimum(tile @ held[start : start + _BLOCK].T, 1.0)
        best = cosines.argmax(axis=1)
        values = cosines[np.arange(len(tile)), best]
        closer = (values > near) | (where < 0)
        near[closer], where[closer] = values[closer], start + best[closer]
    return near, where
