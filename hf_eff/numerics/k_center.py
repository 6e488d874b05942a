"""Farthest-first traversal: each next row is the one farthest from all rows so far.

Any beginning of the order covers the rows within at most twice the smallest radius that as many
centres can reach (Gonzalez, 1985).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

# N rows, h numbers a row

_TILE = 65_536
_SAME = 1e-6
"""Squared distances closer than this share of the longest row's squared length are ties: float32 knows no better."""


def farthest_first(vectors: np.ndarray) -> Iterator[tuple[int, float]]:
    """Order the rows; asking for k of them takes k passes over all.

    It begins with the row nearest the mean. Ties go to the lower row, so rows in an order of their
    content give an order that depends on content alone.

    Args:
        vectors: [N, h] finite float32.

    Yields:
        row: Position of the next row.
        distance: Its Euclidean distance to the nearest row before it; of the first, to the mean.
    """
    if not len(vectors):
        return
    lengths = np.einsum("nh,nh->n", vectors, vectors, dtype=np.float64)
    tolerance = _SAME * float(lengths.max())
    nearest = _squared_distances(vectors, lengths, vectors.mean(axis=0, dtype=np.float64))
    for number in range(len(vectors)):
        goal = nearest.min() + tolerance if number == 0 else nearest.max() - tolerance
        fits = nearest <= goal if number == 0 else nearest >= max(goal, 0.0)
        row = int(np.argmax(fits))
        yield row, float(np.sqrt(max(0.0, nearest[row])))
        away = _squared_distances(vectors, lengths, vectors[row].astype(np.float64))
        nearest = away if number == 0 else np.minimum(nearest, away)
        nearest[row] = -np.inf


def _squared_distances(vectors: np.ndarray, lengths: np.ndarray, point: np.ndarray) -> np.ndarray:
    """[N] float64 squared distances to a point, a tile of rows at a time."""
    out = np.empty(len(vectors))
    direction = point.astype(vectors.dtype)
    for start in range(0, len(vectors), _TILE):
        rows = slice(start, start + _TILE)
        out[rows] = lengths[rows] - 2.0 * (vectors[rows] @ direction) + float(point @ point)
    return np.maximum(out, 0.0)
