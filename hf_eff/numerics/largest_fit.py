"""The largest size that fits a budget, where needing more is only known by asking."""

from __future__ import annotations

import math
from collections.abc import Callable

MOST = 1 << 24
"""Where a search for the largest batch or the longest row ends."""


def largest(needed: Callable[[int], float], budget: float, limit: int = MOST) -> int:
    """Largest number in [1, limit] whose need is within a budget; 0 for none.

    Bisection that first looks where a straight line through the ends of the interval passes the budget: needs that grow
    evenly take a handful of looks.

    Args:
        needed: Bytes that a number needs; never falls.
        budget: Bytes.
        limit: Largest answer.

    >>> largest(lambda number: number**2, 50, 100)
    7
    """
    low, high = 1, max(1, limit)
    need_low, need_high = needed(low), needed(high)
    if need_high <= budget or need_low > budget:
        return high if need_high <= budget else 0
    straight = True
    while high - low > 1:
        share = (budget - need_low) / (need_high - need_low) if straight else 0.0
        middle = low + int(share * (high - low)) if straight else math.isqrt(low * high)
        middle, width = min(max(middle, low + 1), high - 1), high - low
        need = needed(middle)
        if need <= budget:
            low, need_low = middle, need
        else:
            high, need_high = middle, need
        # A line that hardly narrows the interval is left for one step of bisection (of the number's logarithm).
        straight = not straight or high - low < width / 2
    return low
