"""One number by which unlike actions compare: the best gain per compute that each can reach.

An action costs F once and then c per unit of training, and gains G(x) over a stretch x of training: its index is the
largest G(x) / (F + c x). Going on unchanged has F = 0 and is worth its present rate; stopping is worth the threshold.
The index is that of Gittins (1979) for an arm whose gains are known and fall.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

_SHORTEST = 1e-6
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
_ROUNDS = 40


@dataclass(frozen=True)
class ActionIndex:
    """Worth of an action.

    Attributes:
        value: Gain per unit of compute, at best.
        stretch: Training after which that average is reached.
    """

    value: float
    stretch: float


def action_index(
    gain: Callable[[float], float], longest: float, *, fixed_cost: float = 0.0, cost_factor: float = 1.0
) -> ActionIndex:
    """Max over x in (0, ``longest``] of gain(x) / (fixed_cost + cost_factor * x).

    Args:
        gain: G: expected drop of the loss after a stretch of training; concave, as where rates fall.
        longest: Longest stretch looked at, above 0.
        fixed_cost: F, compute before training goes on, at or above 0.
        cost_factor: c, compute per unit of training, above 0.

    >>> round(action_index(lambda x: 2.0 * x, 10.0, fixed_cost=10.0).value, 6)
    1.0
    """

    def average(log_stretch: float) -> float:
        stretch = math.exp(log_stretch)
        return gain(stretch) / (fixed_cost + cost_factor * stretch)

    # A concave gain over a linear cost has one hump: golden section, on the logarithm of the stretch.
    low, high = math.log(_SHORTEST * longest), math.log(longest)
    ends = [(average(low), low), (average(high), high)]
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = average(left), average(right)
    for _ in range(_ROUNDS):
        if at_left > at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = average(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = average(right)
    value, where = max([*ends, (at_left, left), (at_right, right)])
    return ActionIndex(value=value, stretch=math.exp(where))
