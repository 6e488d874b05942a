"""Theil-Sen slope: the median of all pairwise slopes, which a quarter of wild points cannot move far."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from hf_eff.errors import DataError


def robust_slope(x: ArrayLike, y: ArrayLike, window: int) -> float:
    """Median pairwise slope of ``y`` over ``x`` among the last ``window`` points.

    Pairs at equal positions have no slope and are left out. The breakdown point is 1 - sqrt(1/2), about 29 %
    (Sen, 1968).

    Args:
        x: [n] positions, in any unit.
        y: [n] values.
        window: Points used, counted from the end; at least 2.

    Returns:
        Slope in units of ``y`` per unit of ``x``.

    Raises:
        DataError: The vectors differ in shape, or no two of the points used differ in position.

    >>> robust_slope([0, 1, 2, 3, 4], [0, 2, 4, 6, 100], window=5)
    2.0
    """
    xs = np.asarray(x, dtype=np.float64)
    ys = np.asarray(y, dtype=np.float64)
    if xs.shape != ys.shape or xs.ndim != 1 or window < 2:
        raise DataError(f"a slope needs two equal vectors and window >= 2, got {xs.shape}, {ys.shape} and {window}.")
    xs, ys = xs[-window:], ys[-window:]
    first, second = np.triu_indices(xs.size, k=1)
    run = xs[second] - xs[first]
    known = run != 0
    if not known.any():
        raise DataError(f"a slope needs two points at different positions, got {xs.tolist()}.")
    return float(np.median((ys[second] - ys[first])[known] / run[known]))
