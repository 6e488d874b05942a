"""What accuracy a training reaches with how much compute.

P(C) = P0 + (P1 - P0) (1 - exp(-r C / C1)), with C1 the cost of training on everything (Yin and Rush 2025,
arXiv:2410.16208). Rows with rate r reach in C what rows with rate r0 reach in C r / r0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RATES = np.geomspace(1e-2, 1e3, 400)


@dataclass(frozen=True)
class GainCurve:
    """P(C) = start + (ceiling - start) (1 - exp(-rate C / full_cost)).

    Attributes:
        start: P at no compute.
        ceiling: P with unlimited compute.
        rate: How fast it is approached, per ``full_cost``.
        full_cost: Compute of training on everything.
    """

    start: float
    ceiling: float
    rate: float
    full_cost: float

    def at(self, cost: float) -> float:
        """P after ``cost`` compute."""
        return self.start + (self.ceiling - self.start) * -math.expm1(-self.rate * cost / self.full_cost)


def fit_gain_curve(costs: Sequence[float], values: Sequence[float], full_cost: float) -> GainCurve:
    """Least squares over a grid of rates, refined once; start and ceiling are exact for each rate.

    Args:
        costs: [n] compute of each training, at least 3 different ones.
        values: [n] accuracy, or negative loss, after it.
        full_cost: Compute of training on everything, above 0.

    Raises:
        ValueError: Fewer than 3 different costs, or lengths differ.
    """
    x, y = np.asarray(costs, dtype=np.float64) / full_cost, np.asarray(values, dtype=np.float64)
    if x.shape != y.shape or len(np.unique(x)) < 3:
        raise ValueError(f"a gain curve needs at least 3 different costs and a value for each, got {len(np.unique(x))}")
    coarse = min(_RATES, key=lambda rate: _residual(rate, x, y))
    step = _RATES[1] / _RATES[0]
    rate = float(min(np.geomspace(coarse / step, coarse * step, 400), key=lambda rate: _residual(rate, x, y)))
    start, rise = _linear(rate, x, y)
    return GainCurve(start=float(start), ceiling=float(start + rise), rate=rate, full_cost=full_cost)


def _linear(rate: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Start and rise that fit best for a rate."""
    design = np.stack([np.ones_like(x), -np.expm1(-rate * x)], axis=1)
    return np.linalg.lstsq(design, y, rcond=None)[0]


def _residual(rate: float, x: np.ndarray, y: np.ndarray) -> float:
    start, rise = _linear(rate, x, y)
    return float(np.square(start - rise * np.expm1(-rate * x) - y).sum())
