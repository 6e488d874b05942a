"""When to refresh what goes stale: the period, whether it pays, and what selecting must save.

Rows chosen by scores of the present model teach at the rate r (1 + u f). Their freshness f = exp(-s / h) falls with the
training s done since they were chosen; choosing again costs c and makes f = 1. The best age T is where the present rate
has fallen to the average of a whole cycle, its cost included (the marginal value theorem, Charnov 1976):

    1 + u exp(-T/h) = [T + u h (1 - exp(-T/h))] / (T + c)

Letters: u uplift, h lifetime, c cost; h, c and every age in one unit of compute.
"""

from __future__ import annotations

import math

from hf_eff.numerics.payback import PayBack

_HALVINGS = 200


def fresh_gain(stretch: float, uplift: float, lifetime: float) -> float:
    """Gain of training ``stretch`` on rows just chosen, in units of the gain per compute of stale ones."""
    return stretch - uplift * lifetime * math.expm1(-stretch / lifetime)


def optimal_age(uplift: float, lifetime: float, cost: float) -> float:
    """Age T at which to choose again when much compute is left; infinite when it can never pay.

    Args:
        uplift: u, at or above 0: how much faster fresh rows teach than stale ones.
        lifetime: h, above 0: training after which freshness has fallen to 1/e.
        cost: c, at or above 0.

    >>> round(optimal_age(1.0, 0.2, 0.05), 4)
    0.2345
    """
    most = uplift * lifetime
    if most <= cost:
        return math.inf
    if cost <= 0:
        return 0.0

    def too_late(age: float) -> bool:
        stale = math.exp(-age / lifetime)
        return most * (1.0 - stale) - cost > uplift * stale * (age + cost)

    low, high = 0.0, lifetime
    while not too_late(high):
        low, high = high, 2.0 * high
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        low, high = (low, middle) if too_late(middle) else (middle, high)
    return 0.5 * (low + high)


def approximate_age(uplift: float, lifetime: float, cost: float) -> float:
    """Square-root law sqrt(2 h c (1 + u) / u), the limit of ``optimal_age`` at small costs; infinite at u = 0."""
    return math.sqrt(2.0 * lifetime * cost * (1.0 + uplift) / uplift) if uplift > 0 else math.inf


def refresh_surplus(uplift: float, lifetime: float, cost: float, remaining: float, age: float = math.inf) -> float:
    """What one refresh now gains over none for the rest of the run, in units of the gain per compute of stale rows.

    u h [(1 - e^{-(R - c)/h}) - e^{-s/h} (1 - e^{-R/h})] - c with R compute left and rows of age s. A refresh can pay
    only where this is positive; at infinite age it is u h (1 - e^{-(R - c)/h}) > c.

    Args:
        uplift: u, at or above 0.
        lifetime: h, above 0.
        cost: c, at or above 0.
        remaining: R, compute left before the refresh.
        age: s, training since the rows were chosen.
    """
    if remaining <= cost:
        return -cost
    after = -math.expm1(-(remaining - cost) / lifetime)
    without = -math.exp(-age / lifetime) * math.expm1(-remaining / lifetime)
    return uplift * lifetime * (after - without) - cost


def break_even_compute(selection_cost: float, speedup: float) -> float:
    """Training on random rows above which selecting pays: c / (1 - 1 / speedup); infinite when it never does.

    Args:
        selection_cost: Compute of selecting once.
        speedup: How much faster chosen rows teach than random ones, above 0.

    >>> break_even_compute(3.0, 2.0)
    6.0
    """
    # Compute on the chosen rows times the speed-up is the compute that random rows would have taken.
    return speedup * PayBack(selection_cost, 1.0, speedup).break_even_uses
