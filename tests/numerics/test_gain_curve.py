"""Fits of accuracy over compute, against the curve that made the points."""

from __future__ import annotations

import numpy as np
import pytest

from hf_eff.numerics.gain_curve import GainCurve, fit_gain_curve


@pytest.mark.parametrize("rate", [0.3, 2.0, 9.0, 60.0])
@pytest.mark.parametrize("ends", [(0.4, 0.65), (-3.0, -1.0)])
def test_the_curve_behind_the_points_is_found(rate, ends):
    costs = np.geomspace(0.01, 1.0, 9) * 5e15
    values = ends[0] + (ends[1] - ends[0]) * (1 - np.exp(-rate * costs / 5e15))
    curve = fit_gain_curve(costs, values, 5e15)
    assert curve.start == pytest.approx(ends[0], rel=0.02)
    assert curve.rate == pytest.approx(rate, rel=0.02)
    assert [curve.at(cost) for cost in costs] == pytest.approx(values, abs=1e-4)


def test_noise_moves_it_a_little():
    costs = np.linspace(0.02, 1.0, 40)
    truth = GainCurve(start=0.4, ceiling=0.6, rate=6.0, full_cost=1.0)
    noise = np.random.default_rng(0).normal(0.0, 0.002, size=40)
    curve = fit_gain_curve(costs, np.array([truth.at(cost) for cost in costs]) + noise, 1.0)
    assert curve.rate == pytest.approx(6.0, rel=0.15)


def test_two_points_are_too_few():
    with pytest.raises(ValueError, match="at least 3 different costs and a value for each, got 2"):
        fit_gain_curve([1.0, 1.0, 2.0], [0.1, 0.2, 0.3], 1.0)
