from __future__ import annotations

import itertools

import numpy as np
import pytest

from hf_eff.errors import OptionError
from hf_eff.simulation.curves import INSIDE, OUTSIDE, SHARES, SMOOTH, STEPS, make_curve, make_curves

FAMILIES = (*INSIDE, *OUTSIDE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_names_one_curve(family):
    first, again, other = make_curve(family, 3), make_curve(family, 3), make_curve(family, 4)
    assert np.array_equal(first.loss, again.loss)
    assert (first.price, first.noise, first.correlation) == (again.price, again.noise, again.correlation)
    assert not np.array_equal(first.loss, other.loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_curve_is_a_plausible_run(family):
    for seed in range(20):
        curve = make_curve(family, seed)
        assert curve.loss.shape == curve.learning_rate.shape == (STEPS + 1,)
        assert np.isfinite(curve.loss).all()
        assert curve.loss.min() < curve.loss[0]
        assert 0.003 <= curve.noise <= 0.05
        assert 0.05 <= curve.price <= 2.0
        assert curve.learning_rate.max() == 1.0


def test_what_each_family_is_about():
    def shape(family, seed):
        curve = make_curve(family, seed)
        return curve.loss, curve.learning_rate

    for seed in range(20):
        for family in (*SMOOTH, "weibull", "janoschek", "mmf", "linear decay", "late"):
            assert (np.diff(shape(family, seed)[0]) <= 1e-12).all(), family
        loss, _ = shape("overfit", seed)
        assert loss[-1] > loss.min()
        loss, rate = shape("lr-drop", seed)
        assert set(rate.tolist()) == {0.1, 1.0}
        assert np.diff(loss)[np.flatnonzero(np.diff(rate))[0]] < 0
        assert shape("linear decay", seed)[1][-1] == 0.0
    humps = [loss for loss, _ in (shape("double descent", seed) for seed in range(20)) if np.diff(loss).max() > 0]
    assert len(humps) >= 15
    for loss in humps:
        top = int(np.argmax(np.diff(loss)))
        assert loss[-1] < loss[top:].max()


def test_the_late_drop_speeds_up_again():
    slopes = [-np.diff(make_curve("late", seed).loss)[150:] for seed in range(20)]
    speeds_up = [bool((slope > 1.5 * np.minimum.accumulate(slope)).any()) for slope in slopes]
    assert sum(speeds_up) >= 16
    power = -np.diff(make_curve("power", 0).loss)
    assert not (power > 1.5 * np.minimum.accumulate(power)).any()


def test_regret_is_least_at_the_best_stop_and_probes_cost_the_price():
    for seed, family in enumerate(FAMILIES):
        curve = make_curve(family, seed)
        by_hand = [curve.loss[step] + curve.price * step / STEPS for step in range(STEPS + 1)]
        regrets = [curve.regret(share, share) for share in SHARES.tolist()]
        assert np.allclose(regrets, np.array(by_hand) - min(by_hand))
        assert curve.regret(curve.best_stop, curve.best_stop) == pytest.approx(0.0, abs=1e-12)
        assert curve.regret(0.5, 0.52) - curve.regret(0.5, 0.5) == pytest.approx(0.02 * curve.price)


def test_probe_noise_is_the_same_for_every_policy_and_of_the_stated_size():
    curve = make_curve("power", 11)
    first = list(itertools.islice(curve.probe_noise(), 4000))
    assert first[:50] == list(itertools.islice(curve.probe_noise(), 50))
    assert np.std(first) == pytest.approx(curve.noise, rel=0.1)
    assert np.corrcoef(first[:-1], first[1:])[0, 1] == pytest.approx(curve.correlation, abs=0.06)


def test_loss_between_steps_is_interpolated():
    curve = make_curve("power", 0)
    assert curve.loss_at(0.0005) == pytest.approx((curve.loss[0] + curve.loss[1]) / 2)


def test_curves_are_dealt_round_the_families():
    curves = make_curves(INSIDE, range(3, 13))
    assert [curve.seed for curve in curves] == list(range(3, 13))
    assert [curve.family for curve in curves[:3]] == [INSIDE[3], INSIDE[4], INSIDE[0]]
    assert {curve.family for curve in curves} == set(INSIDE)


def test_an_unknown_family_is_refused():
    with pytest.raises(OptionError, match="family must be one of"):
        make_curve("wavy", 0)
