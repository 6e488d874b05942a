"""The best of a stream of scores, in memory that does not grow with it."""

from __future__ import annotations

import numpy as np


class TopK:
    """Keeps the k highest of the scores it is shown; of equal ones those that came first.

    Args:
        k: How many, at least 0.

    >>> top = TopK(2)
    >>> top.add(np.array([0, 1]), np.array([3.0, float("nan")]))
    >>> top.add(np.array([2, 3]), np.array([1.0, 7.0]))
    >>> top.positions.tolist(), top.scores.tolist()
    ([3, 0], [7.0, 3.0])
    """

    def __init__(self, k: int) -> None:
        self._k = k
        self.positions = np.empty(0, dtype=np.int64)
        self.scores = np.empty(0)

    def add(self, positions: np.ndarray, scores: np.ndarray) -> None:
        """Take in some rows.

        Args:
            positions: [B] which rows.
            scores: [B] their scores; NaN is never kept.
        """
        places, values = np.asarray(positions, dtype=np.int64), np.asarray(scores, dtype=np.float64)
        # Nothing below the worst that is kept can enter a full list.
        floor = self.scores[-1] if len(self.scores) == self._k and self._k else -np.inf
        entering = values > floor if len(self.scores) == self._k else ~np.isnan(values)
        places = np.concatenate([self.positions, places[entering]])
        values = np.concatenate([self.scores, values[entering]])
        order = np.argsort(-values, kind="stable")[: self._k]
        self.positions, self.scores = places[order], values[order]
