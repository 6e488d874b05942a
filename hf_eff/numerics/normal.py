"""Standard normal distribution on arrays, without scipy."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

_SQRT_HALF = math.sqrt(0.5)


def normal_cdf(z: ArrayLike) -> np.ndarray:
    """P(Z <= z) of a standard normal Z, by ``erfc`` so that both tails keep full relative precision.

    Args:
        z: Any shape; infinities are allowed.

    Returns:
        Probabilities in [0, 1], same shape as ``z``.

    >>> float(normal_cdf(0.0))
    0.5
    """
    values = np.asarray(z, dtype=np.float64)
    tail = [0.5 * math.erfc(-_SQRT_HALF * each) for each in values.ravel().tolist()]
    return np.array(tail, dtype=np.float64).reshape(values.shape)
