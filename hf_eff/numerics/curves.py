"""Bayesian averaging over a fixed grid of learning curves, in closed form.

Each curve m of the grid is linear in its two unknowns::

    loss(c) = limit + amplitude * phi_m(c) + noise,   amplitude ~ Normal(0, A^2), noise ~ Normal(0, s^2)

with phi_m a power law ``(1 + c / c0) ** -alpha``, an exponential ``exp(-c / t)`` or the line ``-c``. The clock c is
compute as a share of the budget, so the grid covers the same shapes at every scale. Conjugate regression gives
amplitude and noise of each curve, its evidence gives the weight of each curve, and the mixture predicts the gain of
spending more.
"""

# M curves in the grid, n observations

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from hf_eff.errors import DataError

POWER_EXPONENTS = (0.15, 0.3, 0.5, 0.8, 1.2, 2.0)
POWER_OFFSETS = (0.003, 0.01, 0.03, 0.1, 0.3)
TIME_CONSTANTS = (0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6)

_POWERS = np.array(list(itertools.product(POWER_EXPONENTS, POWER_OFFSETS)))
_TIMES = np.array(TIME_CONSTANTS)

FAMILIES = (
    *(f"pow(alpha={alpha:g},c0={offset:g})" for alpha, offset in _POWERS),
    *(f"exp(t={time:g})" for time in TIME_CONSTANTS),
    "lin",
)
"""Name of each curve of the grid, in the order of every [M] array here."""

# Keeps logarithms and divisions finite when observations lie exactly on a curve.
_TINY = 1e-200


def curve_values(clock: ArrayLike) -> np.ndarray:
    """phi_m(c): every curve of the grid at every clock value; all fall as the clock runs.

    Args:
        clock: [n] shares of the budget, at or above 0.

    Returns:
        [M, n] values.
    """
    c = np.asarray(clock, dtype=np.float64)
    power = (1.0 + c[None, :] / _POWERS[:, 1:]) ** -_POWERS[:, :1]
    exponential = np.exp(-c[None, :] / _TIMES[:, None])
    return np.concatenate([power, exponential, -c[None, :]])


@dataclass(frozen=True)
class GainForecast:
    """What the mixture expects of a further stretch of compute.

    Attributes:
        gain: Expected drop of the loss over the stretch.
        probability: P(drop > threshold).
        negative: P(drop < 0), from amplitudes that may be negative (a rising loss).
        family: Name of the curve with the largest weight.
        entropy: Entropy of the curves' weights, nats: 0 when one curve holds all.
    """

    gain: float
    probability: float
    negative: float
    family: str
    entropy: float


@dataclass(frozen=True)
class _Mixture:
    """Amplitudes and weights of all curves.

    Attributes:
        amplitude: [M] posterior means.
        amplitude_sd: [M] posterior standard deviations.
        noise: [M] residual variances s^2.
        weight: [M] posterior weights, adding to 1.
    """

    amplitude: np.ndarray
    amplitude_sd: np.ndarray
    noise: np.ndarray
    weight: np.ndarray


@dataclass(frozen=True)
class CurvePosterior:
    """Posterior over the grid.

    Attributes:
        falling: Amplitudes clipped at zero: only curves that fall. Predicts gains.
        free: Amplitudes of any sign. Recognises a rising loss.
        mean_clock_values: [M] weighted mean of each phi_m over the observations.
        mean_level: Weighted mean of the observed losses.
        effective_count: Sum of the observation weights.
    """

    falling: _Mixture
    free: _Mixture
    mean_clock_values: np.ndarray
    mean_level: float
    effective_count: float

    def forecast(self, start: float, horizon: float, threshold: float = 0.0) -> GainForecast:
        """Gain expected between ``start`` and ``start + horizon``.

        Args:
            start: Clock at the beginning of the stretch.
            horizon: Its length on the same clock, above 0.
            threshold: Gain that ``probability`` refers to, in units of the loss.
        """
        ends = curve_values([start, start + horizon])
        drop = ends[:, 0] - ends[:, 1]
        weight = self.falling.weight
        return GainForecast(
            gain=float(weight @ (self.falling.amplitude * drop)),
            probability=_mass_above(self.falling, drop, threshold),
            negative=1.0 - _mass_above(self.free, drop, 0.0),
            family=FAMILIES[int(np.argmax(weight))],
            entropy=float(-np.sum(weight * np.log(np.maximum(weight, _TINY)))),
        )

    def predict(self, clock: float) -> tuple[float, float]:
        """Mean and standard deviation of one new observation at ``clock``, noise included."""
        offset = curve_values([clock])[:, 0] - self.mean_clock_values
        means = self.mean_level + self.falling.amplitude * offset
        spread = (self.falling.amplitude_sd * offset) ** 2
        variances = spread + self.falling.noise * (1.0 + 1.0 / self.effective_count)
        mean = float(self.falling.weight @ means)
        variance = float(self.falling.weight @ (variances + (means - mean) ** 2))
        return mean, float(np.sqrt(variance))


def fit_curves(
    clock: ArrayLike, levels: ArrayLike, weights: ArrayLike, *, noise_sd: float, prior_scale: float = 3.0
) -> CurvePosterior:
    """Fit the whole grid to weighted observations.

    Args:
        clock: [n] strictly increasing shares of the budget; n >= 2.
        levels: [n] losses.
        weights: [n] weights at or above 0, such as ``discount ** age``.
        noise_sd: Standard error of one level, known from the probe; counts as two observations of the noise.
        prior_scale: Prior standard deviation A of the amplitudes, in units of the loss.

    Raises:
        DataError: The vectors differ in length, hold fewer than two points, or hold NaN or infinity.
    """
    c, y, w = (np.asarray(each, dtype=np.float64) for each in (clock, levels, weights))
    if not (c.shape == y.shape == w.shape) or c.ndim != 1 or c.size < 2:
        raise DataError(f"a curve fit needs equal vectors of two or more, got {c.shape}, {y.shape}, {w.shape}.")
    if not np.isfinite([c, y, w]).all():
        raise DataError("a curve fit needs finite clock values, losses and weights.")
    total = w.sum()
    phi = curve_values(c)
    mean_phi = phi @ w / total
    mean_level = float(y @ w / total)
    x, centred = phi - mean_phi[:, None], y - mean_level
    sxx, sxy = x**2 @ w, x @ (w * centred)
    sums = (sxx, sxy, float(w @ centred**2), float(total))
    slope = sxy / (sxx + (noise_sd / prior_scale) ** 2 + _TINY)
    return CurvePosterior(
        falling=_mixture(np.maximum(slope, 0.0), sums, noise_sd, prior_scale),
        free=_mixture(slope, sums, noise_sd, prior_scale),
        mean_clock_values=mean_phi,
        mean_level=mean_level,
        effective_count=float(total),
    )


def _mixture(
    amplitude: np.ndarray, sums: tuple[np.ndarray, np.ndarray, float, float], noise_sd: float, prior_scale: float
) -> _Mixture:
    """Noise, uncertainty and evidence that follow from the amplitudes; ``sums``: Sxx, Sxy, Syy, sum of the weights."""
    sxx, sxy, syy, total = sums
    residual = np.maximum(syy - 2.0 * amplitude * sxy + amplitude**2 * sxx, 0.0)
    noise = np.maximum((residual + 2.0 * noise_sd**2) / (total + 2.0), _TINY)
    precision = sxx / noise + prior_scale**-2
    evidence = -0.5 * total * np.log(noise) - 0.5 * np.log(precision) - np.log(prior_scale)
    weight = np.exp(evidence - evidence.max())
    return _Mixture(amplitude, precision**-0.5, noise, weight / weight.sum())


def _mass_above(mixture: _Mixture, drop: np.ndarray, threshold: float) -> float:
    spread = np.maximum(mixture.amplitude_sd * np.abs(drop), _TINY)
    return float(mixture.weight @ _normal_cdf((mixture.amplitude * drop - threshold) / spread))


def _normal_cdf(z: np.ndarray) -> np.ndarray:
    """P(Z <= z) of a standard normal Z; ``erfc`` keeps full relative precision in both tails."""
    return np.array([0.5 * math.erfc(-math.sqrt(0.5) * each) for each in z.tolist()])
