"""Which matrix a tensor is taken for when directions are drawn in subspaces of it."""

from __future__ import annotations

import math

CACHE_BYTES = 2**30
"""Factors that are kept while their window lasts; what does not fit is made again each time."""

RESHAPE_BELOW = 4
"""A matrix whose shorter side is less than so many ranks is taken for one that is closer to a square."""


def squared(shape: tuple[int, int], rank: int) -> tuple[int, int]:
    """Shape of the matrix, or of the squarest one with as many entries where it is thin for the rank.

    >>> squared((576, 576), 8), squared((8, 576), 8)
    ((576, 576), (64, 72))
    """
    return shape if min(shape) >= RESHAPE_BELOW * rank else nearest_square(shape[0] * shape[1])


def nearest_square(entries: int) -> tuple[int, int]:
    """The two factors of a number that lie closest together.

    >>> nearest_square(4608), nearest_square(7)
    ((64, 72), (1, 7))
    """
    short = next(side for side in range(math.isqrt(entries), 0, -1) if entries % side == 0)
    return short, entries // short
