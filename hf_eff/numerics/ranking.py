"""Ordering by score with ties broken by content, so that a result does not depend on row order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def rank(scores: np.ndarray, *, descending: bool, ties: Sequence[str] | None = None) -> np.ndarray:
    """Positions from best to worst; positions with a score of NaN are left out.

    Args:
        scores: [N] finite or NaN.
        descending: Whether the highest score comes first.
        ties: [N] keys, such as row hashes, that order equal scores; position orders them without.

    >>> rank(np.array([1.0, 3.0, float("nan"), 3.0]), descending=True, ties=["d", "c", "b", "a"]).tolist()
    [3, 1, 0]
    """
    values = np.asarray(scores, dtype=np.float64)
    keys: list[np.ndarray] = [-values if descending else values]
    if ties is not None:
        keys.insert(0, np.asarray(ties))
    order = np.lexsort(keys)
    return order[~np.isnan(values[order])]
