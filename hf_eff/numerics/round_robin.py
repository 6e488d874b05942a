"""Taking turns: one ranking over several groups, fair at every length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def round_robin(groups: Sequence[np.ndarray]) -> np.ndarray:
    """The best of every group, then the second best of every group, and so on; larger groups go first.

    Of every beginning of the result each group has its water-filling share: equally much, and what small
    groups cannot give comes from the others.

    Args:
        groups: Positions of each group, best first. Groups of equal size take turns as they are listed.

    >>> round_robin([np.array([7]), np.array([4, 2, 9]), np.array([1, 3])]).tolist()
    [4, 1, 7, 2, 3, 9]
    """
    by_size = sorted(groups, key=len, reverse=True)
    depths = [np.arange(len(group)) for group in by_size]
    owners = [np.full(len(group), owner) for owner, group in enumerate(by_size)]
    if not by_size:
        return np.zeros(0, dtype=np.int64)
    turns = np.lexsort((np.concatenate(owners), np.concatenate(depths)))
    return np.concatenate(by_size)[turns]
