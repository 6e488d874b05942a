"""The refresh law against its equation, a brute search for the best cycle, and an integral summed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_eff.numerics.refresh_law import (
    approximate_age,
    break_even_compute,
    fresh_gain,
    optimal_age,
    refresh_surplus,
)

UPLIFT, LIFETIME, COST = st.floats(0.05, 5.0), st.floats(0.01, 3.0), st.floats(1e-4, 0.2)


def gain(uplift, lifetime, start, end, pieces=4000):
    """Integral of 1 + u exp(-s / h), midpoint rule."""
    edges = np.linspace(start, end, pieces + 1)
    middles = 0.5 * (edges[1:] + edges[:-1])
    return float((1.0 + uplift * np.exp(-middles / lifetime)).sum() * (end - start) / pieces)


@pytest.mark.parametrize(
    ("uplift", "lifetime", "cost", "exact", "approximate"),
    [(1, 0.2, 0.01, 0.0940, 0.0894), (1, 0.2, 0.05, 0.2345, 0.2000), (3, 0.05, 0.01, 0.0361, 0.0365)],
)
def test_known_ages(uplift, lifetime, cost, exact, approximate):
    assert optimal_age(uplift, lifetime, cost) == pytest.approx(exact, abs=5e-5)
    assert approximate_age(uplift, lifetime, cost) == pytest.approx(approximate, abs=5e-5)


def test_what_cannot_pay_is_never_due():
    assert math.isinf(optimal_age(0.1, 0.2, 0.03))
    assert math.isinf(optimal_age(0.0, 0.2, 0.0))
    assert math.isinf(approximate_age(0.0, 0.2, 0.01))
    assert optimal_age(1.0, 0.2, 0.0) == 0.0


@given(UPLIFT, LIFETIME, COST)
def test_the_age_solves_the_equation(uplift, lifetime, cost):
    age = optimal_age(uplift, lifetime, cost)
    assert math.isinf(age) is (uplift * lifetime <= cost)
    if not math.isinf(age):
        stale = math.exp(-age / lifetime)
        average = (age + uplift * lifetime * (1.0 - stale)) / (age + cost)
        assert 1.0 + uplift * stale == pytest.approx(average, rel=1e-8)


@pytest.mark.parametrize(("uplift", "lifetime", "cost"), [(1.0, 0.2, 0.01), (3.0, 0.05, 0.03), (0.3, 1.5, 0.1)])
def test_no_other_period_has_a_better_average(uplift, lifetime, cost):
    periods = np.geomspace(1e-3, 20.0, 4001)
    averages = (periods + uplift * lifetime * (1.0 - np.exp(-periods / lifetime))) / (periods + cost)
    assert optimal_age(uplift, lifetime, cost) == pytest.approx(periods[averages.argmax()], rel=4e-3)


@given(UPLIFT, LIFETIME, COST)
def test_dearer_refreshes_are_rarer(uplift, lifetime, cost):
    assert optimal_age(uplift, lifetime, 1.1 * cost) >= optimal_age(uplift, lifetime, cost)


def test_the_square_root_is_the_limit_of_small_costs():
    ratios = [approximate_age(1.0, 1.0, cost) / optimal_age(1.0, 1.0, cost) for cost in (1e-2, 1e-4, 1e-6)]
    assert ratios == sorted(ratios)
    assert ratios[-1] == pytest.approx(1.0, abs=1e-3)


def test_fresh_gain_is_the_integral_of_the_rate():
    assert fresh_gain(0.7, 1.5, 0.2) == pytest.approx(gain(1.5, 0.2, 0.0, 0.7), rel=1e-6)
    assert fresh_gain(0.0, 1.5, 0.2) == 0.0


@pytest.mark.parametrize(("remaining", "age"), [(0.5, 0.1), (0.06, 0.3), (2.0, 0.0)])
def test_the_surplus_is_one_refresh_against_none(remaining, age):
    uplift, lifetime, cost = 1.5, 0.2, 0.05
    refreshed = gain(uplift, lifetime, 0.0, remaining - cost)
    unchanged = gain(uplift, lifetime, age, age + remaining)
    assert refresh_surplus(uplift, lifetime, cost, remaining, age) == pytest.approx(refreshed - unchanged, abs=1e-6)


@given(UPLIFT, LIFETIME, COST, st.floats(0.21, 2.0))
def test_stale_rows_are_worth_refreshing_when_the_inequality_says_so(uplift, lifetime, cost, remaining):
    fresh = uplift * lifetime * (1.0 - math.exp(-(remaining - cost) / lifetime))
    assert refresh_surplus(uplift, lifetime, cost, remaining) == pytest.approx(fresh - cost, abs=1e-12)
    assert refresh_surplus(uplift, lifetime, cost, remaining, age=0.0) < 0.0


def test_a_refresh_that_takes_all_that_is_left_loses_its_cost():
    assert refresh_surplus(4.0, 1.0, 0.3, 0.3) == -0.3


@given(st.floats(0.01, 10.0), st.floats(1.01, 10.0))
def test_break_even(cost, speedup):
    assert break_even_compute(cost, speedup) == pytest.approx(cost / (1.0 - 1.0 / speedup), rel=1e-9)


def test_selecting_without_a_speedup_never_breaks_even():
    assert math.isinf(break_even_compute(1.0, 1.0))
    assert math.isinf(break_even_compute(1.0, 0.5))
    assert break_even_compute(0.0, 2.0) == 0.0
