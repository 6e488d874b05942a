"""Lifetime and uplift recovered from readings made with known ones, and a dense reference of the likelihood."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_eff.numerics.freshness import (
    CORRELATION_ERROR,
    LIFETIME_SPREAD,
    RATE_DRIFT,
    UPLIFTS,
    estimate_lifetime,
    mean_uplift,
    uplift_log_likelihood,
    uplift_posterior,
)


def levels_around_a_refresh(uplift, noise, seed, *, lifetime=0.2, rate=1.0, probes=24, width=0.3, bend=0.0):
    """Clock, losses and fresh compute: rows of age 0 at clock 0, chosen again in the middle."""
    clock = np.linspace(0.0, width, probes)
    old, new = np.minimum(clock, width / 2), np.maximum(clock - width / 2, 0.0)
    fresh = lifetime * (1.0 - np.exp(-old / lifetime)) + lifetime * (1.0 - np.exp(-new / lifetime))
    truth = 2.0 - rate * (clock + uplift * fresh) + bend * clock**2
    return clock, truth + noise * np.random.default_rng(seed).normal(size=probes), fresh


def reference(clock, losses, fresh, noise):
    """Misfit over -2 with the drift of r as correlated noise: a dense covariance and a search for a and r."""
    x = clock - clock.mean()
    drift = RATE_DRIFT * abs(np.polyfit(x, losses, 1)[0]) / (2.0 * (x[-1] - x[0]))
    inverse = np.linalg.inv(noise**2 * np.eye(len(x)) + drift**2 * np.outer(x**2 - (x**2).mean(), x**2 - (x**2).mean()))
    found = []
    for uplift in UPLIFTS:
        design = np.stack([np.ones_like(x), -(clock + uplift * fresh)], axis=1)
        level, rate = np.linalg.solve(design.T @ inverse @ design, design.T @ inverse @ losses)
        if rate < 0.0:
            level, rate = inverse.sum(axis=0) @ losses / inverse.sum(), 0.0
        rest = losses - design @ [level, rate]
        found.append(-0.5 * rest @ inverse @ rest)
    return np.array(found) - max(found)


def test_without_readings_the_prior_stands():
    assert estimate_lifetime([], [], [], prior=0.2) == pytest.approx(0.2)


@pytest.mark.parametrize("lifetime", [0.05, 0.2, 1.5])
def test_the_lifetime_is_found(lifetime):
    generator = np.random.default_rng(3)
    ages = np.linspace(0.02, 0.3, 12)
    truth = np.exp(-ages / lifetime)
    correlations = truth + (1.0 - truth**2) / 8.0 * generator.normal(size=12)
    assert estimate_lifetime(ages, correlations, [64] * 12, prior=0.2) == pytest.approx(lifetime, rel=0.25)


def test_with_good_readings_it_is_the_regression_through_the_origin():
    ages = np.linspace(0.05, 0.2, 30)
    correlations = np.exp(-ages / 0.1)
    plain = 1.0 / ((ages @ -np.log(correlations)) / (ages @ ages))
    assert estimate_lifetime(ages, correlations, [10_000] * 30, prior=0.3) == pytest.approx(plain, rel=0.02)


def test_few_readings_are_shrunk_to_the_prior():
    one = estimate_lifetime([0.1], [math.exp(-0.1 / 0.02)], [16], prior=0.2)
    many = estimate_lifetime(
        [0.01, 0.02, 0.03] * 9, [math.exp(-age / 0.02) for age in (0.01, 0.02, 0.03)] * 9, [64] * 27, 0.2
    )
    assert abs(math.log(many / 0.02)) < abs(math.log(one / 0.02)) < math.log(0.2 / 0.02)


def test_the_lifetime_is_the_posterior_mean_of_its_logarithm():
    ages, correlations, count, prior = (0.05, 0.2), (0.6, 0.3), 32, 0.2
    total = mean = 0.0
    for log_ratio in np.linspace(math.log(0.01), math.log(100.0), 2001):
        lifetime = prior * math.exp(log_ratio)
        density = math.exp(-0.5 * (log_ratio / LIFETIME_SPREAD) ** 2)
        for age, correlation in zip(ages, correlations, strict=True):
            expected = math.exp(-age / lifetime)
            sd = math.sqrt((1.0 - expected**2) ** 2 / count + CORRELATION_ERROR**2)
            density *= math.exp(-0.5 * ((correlation - expected) / sd) ** 2) / sd
        total, mean = total + density, mean + density * log_ratio
    assert estimate_lifetime(ages, correlations, [count] * 2, prior) == pytest.approx(
        prior * math.exp(mean / total), rel=2e-3
    )


def test_correlations_at_or_below_zero_say_that_scores_are_old():
    assert 0.0 < estimate_lifetime([0.3, 0.4], [-0.05, 0.0], [64, 64], prior=0.2) < 0.2


@given(st.floats(1e-3, 1e15), st.lists(st.floats(0.0, 1.0), min_size=1, max_size=5))
def test_the_lifetime_has_the_unit_of_the_ages(unit, correlations):
    ages = np.arange(1, len(correlations) + 1) * 0.05
    one = estimate_lifetime(ages, correlations, [64] * len(ages), prior=0.2)
    assert estimate_lifetime(ages * unit, correlations, [64] * len(ages), 0.2 * unit) == pytest.approx(one * unit)


@pytest.mark.parametrize("uplift", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("bend", [0.0, 0.4])
def test_the_likelihood_is_that_of_a_dense_covariance(uplift, bend):
    clock, losses, fresh = levels_around_a_refresh(uplift, 0.01, 1, bend=bend)
    # A noise above the scatter: only then is the variance the one that was given.
    ours = uplift_log_likelihood(clock, losses, fresh, 0.02)
    assert ours == pytest.approx(reference(clock, losses, fresh, 0.02), abs=1e-6)
    assert ours.max() == 0.0


def test_a_rising_loss_tells_nothing():
    clock, losses, fresh = levels_around_a_refresh(0.0, 0.01, 2, rate=-1.0)
    ours = uplift_log_likelihood(clock, losses, fresh, 0.05)
    assert ours == pytest.approx(np.zeros(len(UPLIFTS)), abs=1e-9)


@pytest.mark.parametrize("uplift", [0.0, 0.3, 1.0, 4.0])
def test_the_uplift_is_found(uplift):
    told = [uplift_log_likelihood(*levels_around_a_refresh(uplift, 0.002, seed), 0.002) for seed in range(6)]
    assert mean_uplift(told) == pytest.approx(uplift, abs=0.15 + 0.15 * uplift)


def test_a_curve_that_bends_by_itself_is_not_taken_for_an_uplift():
    told = [uplift_log_likelihood(*levels_around_a_refresh(0.0, 0.002, s, bend=0.8), 0.002) for s in range(4)]
    assert mean_uplift(told) < 0.15


def test_noise_leaves_the_prior():
    told = [uplift_log_likelihood(*levels_around_a_refresh(1.0, 1.0, 0), 1.0)]
    assert mean_uplift(told) == pytest.approx(mean_uplift([]), rel=0.25)


def test_scatter_beyond_the_stated_noise_counts():
    sure = levels_around_a_refresh(1.0, 0.05, 4)
    assert uplift_log_likelihood(*sure, 1e-6) == pytest.approx(uplift_log_likelihood(*sure, 1e-4), abs=0.05)


@settings(max_examples=30)
@given(st.floats(1e-3, 1e15), st.floats(1e-2, 1e2), st.integers(0, 50))
def test_units_do_not_matter(unit, scale, seed):
    clock, losses, fresh = levels_around_a_refresh(1.0, 0.01, seed)
    one = uplift_log_likelihood(clock, losses, fresh, 0.01)
    other = uplift_log_likelihood(clock * unit, losses * scale, fresh * unit, 0.01 * scale)
    assert other == pytest.approx(one, abs=1e-6)


def test_the_prior_is_the_stated_one():
    prior = uplift_posterior([])
    assert prior[0] == pytest.approx(0.2)
    assert prior[1:] == pytest.approx(0.8 / 7)
    assert mean_uplift([]) == pytest.approx(0.8 / 7 * 10.0)


def test_changes_are_multiplied():
    first, second = np.linspace(-1.0, 0.0, 8), np.linspace(0.0, -2.0, 8)
    expected = np.array([0.2, *[0.8 / 7] * 7]) * np.exp(first) * np.exp(second)
    assert uplift_posterior([first, second]) == pytest.approx(expected / expected.sum())
