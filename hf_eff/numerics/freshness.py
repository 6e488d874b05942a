"""What a run tells of its own staleness: how fast scores age, and how much fresh ones teach.

The lifetime h comes from rank correlations of scores then and now, without paying a refresh. The uplift u shows only in
the slopes on both sides of a refresh: the loss falls at the rate r (1 + u f), with the freshness f low before it and 1
just after it. Profiling out r leaves u.
"""

# R readings, n probes, U values of the uplift

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

UPLIFTS = (0.0, 0.1, 0.3, 0.6, 1.0, 1.5, 2.5, 4.0)
"""Values that an uplift may have."""
NO_UPLIFT_MASS = 0.2
"""Prior probability of none; the other values share the rest equally."""
LIFETIME_SPREAD = 1.2
"""Prior standard deviation of the logarithm of a lifetime."""
CORRELATION_ERROR = 0.02
"""Standard deviation of a rank correlation about exp(-age / h) that no sample size removes."""
RATE_DRIFT = 0.3
"""Prior standard deviation of the change of r over the probes around one refresh, relative to r."""

_LIFETIMES = np.geomspace(0.01, 100.0, 101)
_TINY = 1e-12


def estimate_lifetime(ages: ArrayLike, correlations: ArrayLike, counts: ArrayLike, prior: float) -> float:
    """Lifetime h from -ln(correlation) = age / h: a line through the origin, shrunk to a prior.

    The line is fitted with a logarithmic link, so that correlations near or below zero count for what they say: that
    ln cannot tell how old the scores are. Where correlations are well measured it is the plain regression.

    Args:
        ages: [R] training since the scores.
        correlations: [R] Spearman's correlation of a sample's scores, then and now.
        counts: [R] rows of each sample.
        prior: Median of the lifetime before any reading, above 0; the answer without readings.

    Returns:
        Lifetime in units of ``prior``'s: the posterior mean of its logarithm, as a lifetime.
    """
    s, rho, n = (np.asarray(each, dtype=np.float64)[None, :] for each in (ages, correlations, counts))
    expected = np.exp(-s / (prior * _LIFETIMES[:, None]))
    variance = np.square(1.0 - np.square(expected)) / np.maximum(n, 1.0) + CORRELATION_ERROR**2
    fit = -0.5 * (np.square(rho - expected) / variance + np.log(variance)).sum(axis=1)
    log_lifetimes = np.log(_LIFETIMES)
    log_posterior = fit - 0.5 * np.square(log_lifetimes / LIFETIME_SPREAD)
    weight = np.exp(log_posterior - log_posterior.max())
    return prior * math.exp(float(weight @ log_lifetimes / weight.sum()))


def uplift_log_likelihood(
    compute: ArrayLike, levels: ArrayLike, fresh_compute: ArrayLike, noise_sd: float
) -> np.ndarray:
    """How well each of ``UPLIFTS`` explains the losses on both sides of one change of the rows.

    Loss = a - r (x + u F) + q (x - mean x)^2 with x training compute and F the integral of the freshness over it. The
    likeliest a, r >= 0 and q are taken; q, a drift of r of its own, is held near zero by a prior.

    Args:
        compute: [n] training compute x at each probe, n >= 4 and not all equal.
        levels: [n] losses.
        fresh_compute: [n] F.
        noise_sd: Standard error of one level; the scatter about the best fit counts when it is larger.

    Returns:
        [U] logarithms, the largest 0.
    """
    x, y, fresh = (np.asarray(each, dtype=np.float64) for each in (compute, levels, fresh_compute))
    x, y, fresh = x - x.mean(), y - y.mean(), fresh - fresh.mean()
    bend = np.square(x) - np.square(x).mean()
    # A drift by one standard deviation changes the slope over the whole span, 2 q (x_n - x_1), by RATE_DRIFT r.
    drift_sd = RATE_DRIFT * abs(float(x @ y)) / float(x @ x) / (2.0 * float(np.ptp(x)))
    sums = np.stack([x, fresh, y])
    regressors = np.array([[1.0, uplift, 0.0] for uplift in UPLIFTS])  # [U, 3] x + u F in terms of ``sums``

    def misfit(variance: float) -> np.ndarray:
        """[U] squared residuals over the variance, q marginalised."""
        shared = drift_sd**2 / (variance + drift_sd**2 * float(bend @ bend))
        inner = (sums @ sums.T - shared * np.outer(sums @ bend, sums @ bend)) / variance
        power = np.einsum("ui,ij,uj->u", regressors, inner, regressors)
        base = np.maximum(-(regressors @ inner[2]) / np.maximum(power, _TINY), 0.0)
        return np.asarray(inner[2, 2] + 2.0 * base * (regressors @ inner[2]) + base**2 * power)

    variance = max(noise_sd**2, _TINY)
    scatter = float(misfit(variance).min()) / max(x.size - 3, 1)
    fit = -0.5 * misfit(variance * max(1.0, scatter))
    return np.asarray(fit - fit.max())


def uplift_posterior(log_likelihoods: Iterable[ArrayLike]) -> np.ndarray:
    """[U] probabilities of ``UPLIFTS`` after changes that spoke independently.

    >>> [round(float(mass), 2) for mass in uplift_posterior([])[:2]]
    [0.2, 0.11]
    """
    others = (1.0 - NO_UPLIFT_MASS) / (len(UPLIFTS) - 1)
    log_posterior = np.log(np.array([NO_UPLIFT_MASS, *[others] * (len(UPLIFTS) - 1)]))
    for log_likelihood in log_likelihoods:
        log_posterior += np.asarray(log_likelihood, dtype=np.float64)
    weight = np.exp(log_posterior - log_posterior.max())
    return np.asarray(weight / weight.sum())


def mean_uplift(log_likelihoods: Iterable[ArrayLike]) -> float:
    """Posterior mean of the uplift."""
    return float(uplift_posterior(log_likelihoods) @ np.array(UPLIFTS))
