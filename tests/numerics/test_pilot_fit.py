"""The fit of a pilot against a plain loop over its grid, and against curves that are known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_eff.errors import DataError
from hf_eff.numerics.pilot_fit import COARSENED_TO, PRIOR_SCALE, fit_pilot, point_noise, turning_point

CURVES = {
    "power": lambda x: 1.5 + 40.0 * x**-0.35,
    "steep power": lambda x: 1.5 + 800.0 * x**-0.6,
    "offset power": lambda x: 1.5 + 2.0 * (1.0 + x / 3e4) ** -0.5,
    "slow offset power": lambda x: 1.5 + 2.0 * (1.0 + x / 1e4) ** -0.25,
}
END = 1e6


def points(curve, noise, seed=0, count=24):
    x = np.geomspace(END / 50, END, count)
    return x, curve(x) + noise * np.random.default_rng(seed).normal(size=count)


def literal_loss_and_slope(x, y, at):
    """The posterior, curve by curve in plain numbers."""
    noise_sd, n = point_noise(x, y), len(x)
    counted = n / (1 + n / COARSENED_TO)
    curves = [
        (lambda z, b=b, o=o: ((z + o) / (x[0] + o)) ** -b, lambda z, b=b, o=o: b / (z + o))
        for b in np.geomspace(0.05, 3, 36)
        for o in np.geomspace(x[0] / 100, 3 * x[-1], 16)
    ]
    curves += [
        (lambda z, t=t: math.exp((x[0] - z) / t), lambda z, t=t: 1 / t) for t in np.geomspace(x[-1] / 20, 3 * x[-1], 36)
    ]
    logs, means, slopes = [], [], []
    for phi, steepness in curves:
        values = [phi(each) for each in x]
        middle, level = sum(values) / n, sum(y) / n
        sxx = sum((value - middle) ** 2 for value in values)
        sxy = sum((value - middle) * (loss - level) for value, loss in zip(values, y, strict=True))
        a = max(0.0, sxy / (sxx + (noise_sd / PRIOR_SCALE) ** 2))
        residual = sum((loss - level - a * (value - middle)) ** 2 for value, loss in zip(values, y, strict=True))
        variance = (residual + 2 * noise_sd**2) / (n + 2)
        precision = counted / n * sxx / variance + PRIOR_SCALE**-2
        logs.append(-0.5 * (counted * math.log(variance) + math.log(precision) + (a / PRIOR_SCALE) ** 2))
        means.append(level + a * (phi(at) - middle))
        slopes.append(a * phi(at) * steepness(at))
    weights = np.exp(np.array(logs) - max(logs))
    return float(weights @ means / weights.sum()), float(weights @ slopes / weights.sum())


@pytest.mark.parametrize("seed", [0, 1])
def test_the_average_is_that_of_a_plain_loop(seed):
    x, y = points(CURVES["offset power"], 0.01, seed, count=9)
    found = fit_pilot(x, y)
    loss, slope = literal_loss_and_slope(x.tolist(), y.tolist(), 3.7e6)
    assert found.loss(3.7e6)[0] == pytest.approx(loss, rel=1e-9)
    assert found.slope(3.7e6) == pytest.approx(slope, rel=1e-9)
    assert found.weight.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("noise", [0.0, 0.003])
def test_known_curves_are_extrapolated_four_pilots_ahead(name, noise):
    curve = CURVES[name]
    found = fit_pilot(*points(curve, noise))
    at = 4.0 * END
    true_slope = (curve(at * 0.9999) - curve(at * 1.0001)) / (at * 0.0002)
    assert found.loss(at)[0] == pytest.approx(curve(at), abs=0.03)
    assert found.slope(at) == pytest.approx(true_slope, rel=0.25)


def test_the_band_holds_the_truth():
    scores = []
    for name, curve in CURVES.items():
        for seed in range(8):
            mean, sd = fit_pilot(*points(curve, 0.01, seed)).loss(5.0 * END)
            scores.append((name, abs(mean - curve(5.0 * END)) / sd))
    assert sum(score < 2.0 for _, score in scores) >= 0.9 * len(scores), scores


def test_more_points_do_not_make_it_ever_surer():
    spreads = [fit_pilot(*points(CURVES["offset power"], 0.01, count=count)).loss(4 * END)[1] for count in (20, 400)]
    assert spreads[1] > 0.4 * spreads[0]


@given(st.floats(1e-6, 1e6), st.floats(-3.0, 3.0))
@settings(max_examples=20, deadline=None)
def test_units_of_tokens_and_level_of_losses_do_not_matter(unit, level):
    x, y = points(CURVES["power"], 0.01)
    mean, sd = fit_pilot(x, y).loss(3 * END)
    other_mean, other_sd = fit_pilot(x * unit, y + level).loss(3 * END * unit)
    assert other_mean == pytest.approx(mean + level, rel=1e-6, abs=1e-6)
    assert other_sd == pytest.approx(sd, rel=1e-4)


def test_the_slope_is_that_of_the_loss_and_falls():
    found = fit_pilot(*points(CURVES["power"], 0.01))
    for at in (0.5 * END, END, 8.0 * END):
        step = 1e-4 * at
        rise = found.loss(at - step)[0] - found.loss(at + step)[0]
        assert found.slope(at) == pytest.approx(rise / (2 * step), rel=1e-5)
    slopes = [found.slope(at) for at in np.geomspace(0.01 * END, 100 * END, 50)]
    assert all(later < earlier for earlier, later in itertools.pairwise(slopes))


def test_chances_of_a_slope_fall_with_it():
    found = fit_pilot(*points(CURVES["power"], 0.01))
    slope = found.slope(3 * END)
    chances = [found.steeper(3 * END, factor * slope) for factor in (0.0, 0.5, 1.0, 2.0, math.inf)]
    assert chances[0] == pytest.approx(1.0, abs=1e-3)
    assert chances == sorted(chances, reverse=True)
    assert 0.2 < chances[2] < 0.8
    assert chances[-1] == 0.0


def test_floor_and_exponent_of_a_clean_power_law():
    found = fit_pilot(*points(CURVES["power"], 0.0))
    assert found.floor == pytest.approx(1.5, abs=0.05)
    assert found.exponent == pytest.approx(0.35, abs=0.03)


def test_noise_is_told_from_the_curve():
    x, y = points(CURVES["power"], 0.02, count=200)
    assert point_noise(x, y) == pytest.approx(0.02, rel=0.25)
    assert point_noise(*points(CURVES["power"], 0.0, count=200)) < 1e-3


def test_a_pilot_that_begins_at_no_tokens_is_fitted():
    x = np.array([0.0, 1e4, 3e4, 1e5, 3e5, 1e6])
    found = fit_pilot(x, CURVES["offset power"](x))
    assert found.loss(0.0)[0] == pytest.approx(3.5, abs=0.05)


def test_a_rise_is_seen_and_noise_is_none():
    x = np.linspace(1.0, 20.0, 20)
    falling = 2.0 + 3.0 / x
    assert turning_point(x, falling) is None
    noise = 0.01 * np.random.default_rng(0).normal(size=20)
    assert turning_point(x, falling + noise) is None
    assert turning_point(x, 2.0 + 0.05 * (x - 12.0) ** 2 + noise) in (10, 11, 12)
    assert turning_point(x, np.concatenate([falling[:18], [2.4, 2.9]])) is None  # two points are no rise
    assert turning_point(x, 1.0 + x) == 0


@pytest.mark.parametrize(
    ("x", "y", "sentence"),
    [
        ([1, 2, 3], [3, 2, 1], "needs 6 points or more"),
        (range(1, 8), range(6), "needs 6 points or more"),
        ([1, 2, 3, 3, 4, 5], [6, 5, 4, 3, 2, 1], "must increase"),
        ([1, 2, 3, 4, 5, 6], [6, 5, math.nan, 3, 2, 1], "finite"),
        ([-1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1], "at or above 0"),
    ],
)
def test_what_is_no_pilot_is_refused(x, y, sentence):
    with pytest.raises(DataError, match=sentence):
        fit_pilot(list(x), list(y))
