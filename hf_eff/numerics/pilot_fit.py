"""The learning curve of a pilot run, with its uncertainty, for extrapolation far beyond the pilot.

Curves of two families are averaged by their evidence::

    L(x) = E + a ((x + x0) / (x1 + x0))^-beta        x0 is what the model had learnt before: 0 from scratch
    L(x) = E + a exp(-(x - x1) / t)

with x1 the pilot's first point, so that a, the loss above the floor E there, has the same meaning for all. Each is
linear in E and a, whose posterior under a ~ Normal(0, 3^2) is closed, as for the governor's curves
(``numerics/curves.py``). That grid is coarse, because a governor looks a few probes ahead; a plan looks ten pilots
ahead, where a wrong exponent costs most, so this one is dense.
"""

# M curves in the grid, n points

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from hf_eff.errors import DataError

FEWEST_POINTS = 6
"""Points below which three unknowns of a curve and its noise cannot be told apart."""
PRIOR_SCALE = 3.0
"""Prior standard deviation of the loss above the floor at the first point, nats."""
COARSENED_TO = 10.0
"""Independent points that any number of points counts for at most: no curve of the grid is quite the true one, so more
points must not make the fit ever surer of it (the power posterior of Miller and Dunson 2019, arXiv:1506.06101)."""
EXPONENTS = np.geomspace(0.05, 3.0, 36)
_OFFSETS, _TIMES = 16, 36
_TINY = 1e-200
_CLEAR_RISE = 4.0  # standard errors of one point


@dataclass(frozen=True)
class _Grid:
    """Shapes of the curves; the unknown two of each are not among them.

    Attributes:
        first: x1.
        exponents: [P] beta of the power laws.
        offsets: [P] x0 of the power laws.
        times: [T] t of the exponentials; M = P + T.
    """

    first: float
    exponents: np.ndarray
    offsets: np.ndarray
    times: np.ndarray

    def values(self, x: ArrayLike) -> np.ndarray:
        """[M, n] every curve at ``x`` for E = 0 and a = 1."""
        at = np.asarray(x, dtype=np.float64)[None, :]
        powers = ((at + self.offsets[:, None]) / (self.first + self.offsets[:, None])) ** -self.exponents[:, None]
        return np.concatenate([powers, np.exp((self.first - at) / self.times[:, None])])

    def slopes(self, x: float) -> np.ndarray:
        """[M] minus the derivative of each curve at ``x``."""
        steepness = np.concatenate([self.exponents / (x + self.offsets), 1.0 / self.times])
        return self.values([x])[:, 0] * steepness


@dataclass(frozen=True)
class PilotFit:
    """Posterior over the curves.

    Attributes:
        weight: [M] posterior weights, adding to 1.
        amplitude: [M] posterior means of a, at least 0.
        amplitude_sd: [M] posterior standard deviations.
        noise: [M] residual variances.
        mean_value: [M] mean of each curve over the points.
        mean_loss: Mean loss over the points.
        num_points: Points that count, at most ``COARSENED_TO``.
    """

    grid: _Grid
    weight: np.ndarray
    amplitude: np.ndarray
    amplitude_sd: np.ndarray
    noise: np.ndarray
    mean_value: np.ndarray
    mean_loss: float
    num_points: float

    def loss(self, x: float) -> tuple[float, float]:
        """Mean and standard deviation of the curve at ``x``, without the noise of one measurement."""
        offset = self.grid.values([x])[:, 0] - self.mean_value
        means = self.mean_loss + self.amplitude * offset
        mean = float(self.weight @ means)
        variances = (self.amplitude_sd * offset) ** 2 + self.noise / self.num_points
        return mean, math.sqrt(float(self.weight @ (variances + (means - mean) ** 2)))

    def slope(self, x: float) -> float:
        """Expected -dL/dx at ``x``; at least 0, and falling in ``x``."""
        return float(self.weight @ (self.amplitude * self.grid.slopes(x)))

    def steeper(self, x: float, threshold: float) -> float:
        """P(-dL/dx > threshold) at ``x``."""
        slopes = self.grid.slopes(x)
        spread = np.maximum(self.amplitude_sd * slopes, _TINY)
        scores = (self.amplitude * slopes - threshold) / spread
        below = [0.5 * math.erfc(math.sqrt(0.5) * score) for score in scores.tolist()]
        return 1.0 - float(self.weight @ np.array(below))

    @property
    def exponent(self) -> float:
        """Mean beta of the power laws; NaN where exponentials hold all weight."""
        weight = self.weight[: len(self.grid.exponents)]
        return float(weight @ self.grid.exponents / weight.sum()) if weight.sum() > 0 else math.nan

    @property
    def floor(self) -> float:
        """Mean E: the loss that no amount of such training passes."""
        return float(self.mean_loss - self.weight @ (self.amplitude * self.mean_value))


def fit_pilot(x: ArrayLike, losses: ArrayLike) -> PilotFit:
    """Average all curves over the points of a pilot.

    Args:
        x: [n] strictly increasing effective tokens (or any other clock), at or above 0; n >= ``FEWEST_POINTS``.
        losses: [n] held-out losses.

    Raises:
        DataError: The vectors differ in length, are too short, not finite or not increasing.
    """
    at, y = np.asarray(x, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    _check(at, y)
    grid, noise_sd = _grid(at), point_noise(at, y)
    values = grid.values(at)
    mean_value, mean_loss, count = values.mean(axis=1), float(y.mean()), len(y)
    counted = count / (1.0 + count / COARSENED_TO)
    centred, residual_loss = values - mean_value[:, None], y - mean_loss
    sxx = np.square(centred).sum(axis=1)
    amplitude = np.maximum(centred @ residual_loss / (sxx + (noise_sd / PRIOR_SCALE) ** 2 + _TINY), 0.0)
    residual = np.square(residual_loss - amplitude[:, None] * centred).sum(axis=1)
    noise = np.maximum((residual + 2.0 * noise_sd**2) / (count + 2.0), _TINY)
    precision = counted / count * sxx / noise + PRIOR_SCALE**-2
    evidence = -0.5 * (counted * np.log(noise) + np.log(precision)) - 0.5 * (amplitude / PRIOR_SCALE) ** 2
    weight = np.exp(evidence - evidence.max())
    return PilotFit(grid, weight / weight.sum(), amplitude, precision**-0.5, noise, mean_value, mean_loss, counted)


def point_noise(x: ArrayLike, losses: ArrayLike) -> float:
    """Standard error of one point, from how far points lie off the line through their neighbours.

    Args:
        x: [n] strictly increasing positions; n >= 3.
        losses: [n] losses along a smooth curve, with noise.

    Returns:
        A robust estimate, a little high where the curve bends within three points.

    >>> point_noise([0, 1, 2, 3, 4], [4.0, 3.0, 2.0, 1.0, 0.0])
    0.0
    """
    at, y = np.asarray(x, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    share = (at[1:-1] - at[:-2]) / (at[2:] - at[:-2])
    off = (y[1:-1] - (1.0 - share) * y[:-2] - share * y[2:]) / np.sqrt(1.0 + share**2 + (1.0 - share) ** 2)
    return float(1.4826 * np.median(np.abs(off - np.median(off))))


def turning_point(x: ArrayLike, losses: ArrayLike) -> int | None:
    """Index of the lowest point of a curve that clearly rises afterwards; None where it does not.

    The lowest median of three neighbours counts, and the rise is clear when each of the last three points lies four
    standard errors above it.

    >>> turning_point(range(10), [5.0, 4.0, 3.2, 2.6, 2.3, 2.2, 2.4, 2.9, 3.5, 4.2])
    5
    """
    at, y = np.asarray(x, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    smooth = np.array([y[0], *np.median([y[:-2], y[1:-1], y[2:]], axis=0)])
    lowest = int(np.argmin(smooth))
    rise = float(y[-3:].min() - smooth[lowest])
    if rise <= max(_CLEAR_RISE * point_noise(at, y), 1e-9):
        return None
    first = max(0, lowest - 1)
    return first + int(np.argmin(y[first : lowest + 2]))


def _grid(at: np.ndarray) -> _Grid:
    """Offsets from a hundredth of the first positive point to three times the last, times in the pilot's span."""
    smallest, last = float(at[at > 0].min()), float(at[-1])
    offsets = np.geomspace(smallest / 100.0, 3.0 * last, _OFFSETS)
    powers = np.array(list(itertools.product(EXPONENTS, offsets)))
    return _Grid(float(at[0]), powers[:, 0], powers[:, 1], np.geomspace(0.05 * last, 3.0 * last, _TIMES))


def _check(at: np.ndarray, y: np.ndarray) -> None:
    if at.shape != y.shape or at.ndim != 1 or at.size < FEWEST_POINTS:
        raise DataError(f"a pilot needs {FEWEST_POINTS} points or more, got shapes {at.shape} and {y.shape}.")
    if not np.isfinite([at, y]).all() or at[0] < 0:
        raise DataError("a pilot needs finite losses, and finite tokens at or above 0.")
    if not (np.diff(at) > 0).all():
        raise DataError("a pilot's tokens must increase from point to point.")
