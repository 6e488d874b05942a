"""The index against a search over a dense grid, and against the refresh law."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_eff.numerics.action_index import action_index
from hf_eff.numerics.refresh_law import fresh_gain, optimal_age


@given(
    rate=st.floats(0.01, 10.0),
    decay=st.floats(0.0, 20.0),
    fixed_cost=st.floats(0.0, 2.0),
    cost_factor=st.floats(0.2, 5.0),
    longest=st.floats(0.1, 10.0),
)
def test_no_stretch_does_better(rate, decay, fixed_cost, cost_factor, longest):
    def gain(stretch):
        return rate * (stretch if decay == 0.0 else -math.expm1(-decay * stretch) / decay)

    found = action_index(gain, longest, fixed_cost=fixed_cost, cost_factor=cost_factor)
    grid = np.geomspace(1e-6 * longest, longest, 400)
    best = max(gain(stretch) / (fixed_cost + cost_factor * stretch) for stretch in grid)
    assert found.value >= best * (1.0 - 1e-7)
    reached = gain(found.stretch) / (fixed_cost + cost_factor * found.stretch)
    assert found.value == pytest.approx(reached, rel=1e-9)


@pytest.mark.parametrize(("uplift", "lifetime", "cost"), [(1.0, 0.2, 0.01), (3.0, 0.05, 0.01), (1.0, 0.2, 0.05)])
def test_a_refresh_is_worth_the_rate_at_which_it_is_due(uplift, lifetime, cost):
    found = action_index(lambda stretch: fresh_gain(stretch, uplift, lifetime), 10.0, fixed_cost=cost)
    age = optimal_age(uplift, lifetime, cost)
    assert found.stretch == pytest.approx(age, rel=1e-3)
    assert found.value == pytest.approx(1.0 + uplift * math.exp(-age / lifetime), rel=1e-6)


def test_what_costs_nothing_first_is_worth_its_present_rate():
    found = action_index(lambda stretch: 3.0 * -math.expm1(-stretch), 5.0, cost_factor=1.5)
    assert found.value == pytest.approx(2.0, rel=1e-4)


def test_a_steady_gain_spreads_its_cost_over_all_that_is_left():
    found = action_index(lambda stretch: 2.0 * stretch, 4.0, fixed_cost=1.0, cost_factor=0.5)
    assert found.value == pytest.approx(8.0 / 3.0)
    assert found.stretch == pytest.approx(4.0)


def test_a_loss_that_rises_has_a_negative_index():
    assert action_index(lambda stretch: -stretch, 1.0, fixed_cost=0.5).value < 0.0
