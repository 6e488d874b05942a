from __future__ import annotations

import itertools
import json
import math
import statistics
from functools import partial

import numpy as np
import pytest

from hf_eff.contracts.governor import Decision, Governor, ProbeReading, Telemetry
from hf_eff.simulation import stopping
from hf_eff.simulation.curves import INSIDE, OUTSIDE, SMOOTH, STEPS, make_curve, make_curves
from hf_eff.simulation.rivals import FEWEST_PROBES, RIVALS, EwmaSlope, KalmanTrend, TheilSenWindow
from hf_eff.simulation.stopping import Aims, Criterion, PolicyRow, aims_of, criteria, judge, play, registered, watch


class StopsAt(Governor):
    """Probes every ``gap`` steps and ends at a step."""

    def __init__(self, step, gap=10, action="stop"):
        self.step, self.gap, self.action, self.looks = step, gap, action, []

    def next_probe(self, telemetry, probe_cost):
        return telemetry.step % self.gap == 0

    def observe(self, telemetry):
        self.looks.append(telemetry)
        return Decision(self.action if telemetry.step >= self.step else "continue", "by hand")


# the player


@pytest.mark.parametrize("action", ["stop", "cooldown"])
def test_play_ends_at_the_first_stop(action):
    stop = play(StopsAt(300, action=action), make_curve("power", 0), probe_cost=0.001)
    assert (stop.share, stop.probed) == (0.3, pytest.approx(30 * 0.001))


def test_the_budget_pays_for_training_and_probes_and_is_never_passed():
    governor = StopsAt(10**9)
    stop = play(governor, make_curve("power", 0), probe_cost=0.001)
    assert governor.looks[-1].compute <= 1.0
    assert stop.share + stop.probed == pytest.approx(1.0, abs=1 / STEPS + 1e-9)
    assert stop.share == governor.looks[-1].step / STEPS


def test_looks_are_what_a_trainer_reports():
    curve = make_curve("lr-drop", 2)
    looks = [look for look, _ in watch(StopsAt(10**9), curve, 0.0005)]
    assert all(after.compute > before.compute for before, after in itertools.pairwise(looks))
    probed = [look for look in looks if look.probe is not None]
    noise = curve.probe_noise()
    means = [float(curve.loss[look.step]) + next(noise) for look in probed]
    assert [look.probe.mean for look in probed] == means
    assert probed[0].probe.paired_delta is None
    assert [look.probe.paired_delta for look in probed[1:]] == [
        before - after for before, after in itertools.pairwise(means)
    ]
    assert [look.probe_spent for look in probed] == pytest.approx([0.0005 * (n + 1) for n in range(len(probed))])
    assert [look.compute for look in looks] == pytest.approx([look.step / STEPS + look.probe_spent for look in looks])
    assert looks[-1].peak_learning_rate == 1.0
    assert looks[-1].learning_rate == 0.1


def test_a_registered_governor_is_told_what_it_can_be_told():
    aims = Aims(price=0.7, target=1.9)
    assert registered("marginal_gain", {}, aims).config.price == 0.7
    assert registered("marginal_gain", {}, aims).config.threshold == "price"
    assert registered("target", {}, aims).config.target == 1.9
    assert registered("fixed", {"share": 0.25}, aims).config.share == 0.25
    assert registered("tail", {}, aims).config.epsilon == 0.02


# rows


def test_a_row_is_what_ten_lines_of_arithmetic_give():
    curves = make_curves(INSIDE, range(10))
    row = judge("third", partial(registered, "fixed", {"share": 1 / 3}), curves)
    stop = math.ceil(STEPS / 3) / STEPS
    least = [min(curve.loss + curve.price * np.arange(STEPS + 1) / STEPS) for curve in curves]
    regret = [curve.loss_at(stop) + curve.price * stop - low for curve, low in zip(curves, least, strict=True)]
    best = [curve.best_stop for curve in curves]
    forgone = [(c.loss_at(stop) - c.loss.min()) / (c.loss[0] - c.loss.min()) for c in curves]
    assert row.mean == pytest.approx(statistics.mean(regret))
    assert row.se == pytest.approx(statistics.stdev(regret) / math.sqrt(10))
    assert row.median == pytest.approx(statistics.median(regret))
    assert row.p90 == pytest.approx(np.quantile(regret, 0.9))
    assert row.families == {
        name: pytest.approx(statistics.mean(r for r, c in zip(regret, curves, strict=True) if c.family == name))
        for name in INSIDE
    }
    assert row.share == pytest.approx(stop)
    assert row.early == statistics.mean(stop < each - 0.1 for each in best)
    assert row.late == statistics.mean(stop > each + 0.1 for each in best)
    assert row.forgone == pytest.approx(statistics.mean(forgone))


def test_the_full_run_pays_for_everything_and_forgoes_nothing_of_a_falling_curve():
    row = judge("full", partial(registered, "budget", {}), make_curves(SMOOTH, range(4)))
    assert (row.share, row.forgone, row.early) == (1.0, pytest.approx(0.0, abs=1e-9), 0.0)


def test_criteria_say_when_they_do_not_hold():
    def row(name, mean, smooth=0.01):
        families = dict.fromkeys(INSIDE, mean) | dict.fromkeys(SMOOTH, smooth)
        return PolicyRow(name, mean, 0.0, 0.0, 0.0, families, 0.5, 0.0, 0.0, 0.0)

    others = [row("patience-3", 0.2), row("fixed-1/3", 0.3), *(row(name, 0.1) for name in RIVALS)]
    good = criteria([row("marginal_gain", 0.1), *others])
    assert all(each.holds for each in good)
    assert [each.bound for each in good] == pytest.approx([0.1, 0.15, 0.11, 0.02])
    bad = criteria([row("marginal_gain", 0.12, smooth=0.03), *others])
    assert [each.holds for each in bad] == [False, True, False, False]
    assert "NO" in stopping.render_criteria(bad)
    assert not Criterion("x", math.nan, 1.0).holds


def test_tables_keep_families_outside_the_grid_apart(monkeypatch):
    monkeypatch.setattr(stopping, "policies", lambda: {"full": partial(registered, "budget", {})})
    monkeypatch.setattr(stopping, "unpriced_policies", dict)
    tables = stopping.stop_tables(range(40), {"early": lambda aims: StopsAt(2)})
    assert [row.policy for row in tables["inside"]] == ["full", "early"]
    assert set(tables["inside"][0].families) == set(INSIDE)
    assert set(tables["outside"][0].families) == set(OUTSIDE)
    assert tables["unpriced"] == []
    text = stopping.render_rows(tables["outside"])
    assert "double descent" in text
    assert "power" not in text


# the rivals


def probe(level, compute, previous, noise, limit):
    reading = ProbeReading(level, None if previous is None else previous - level, math.sqrt(2.0) * noise, 64)
    if previous is None:
        reading = ProbeReading(level, None, None, 64)
    return Telemetry(
        step=int(compute * 1000),
        max_steps=4000,
        spent={"flops": compute},
        limits={"flops": limit},
        compute=compute,
        compute_limit=limit,
        probe=reading,
    )


def shown(rule, noise=0.01, count=30, unit=1.0):
    """Levels over compute, and the decisions of a rule on them."""
    generator = np.random.default_rng(5)
    compute = np.cumsum(generator.uniform(0.02, 0.2, count)).tolist()
    level = [2.0 + math.exp(-each) + generator.normal(0.0, noise) for each in compute]
    looks = [
        probe(value, spent * unit, level[index - 1] if index else None, noise, 4.0 * unit)
        for index, (value, spent) in enumerate(zip(level, compute, strict=True))
    ]
    return compute, level, [rule.observe(look) for look in looks]


def test_ewma_is_the_weighted_mean_of_slopes():
    compute, level, decisions = shown(EwmaSlope(0.0))
    slopes = [(level[i] - level[i + 1]) / (compute[i + 1] - compute[i]) for i in range(len(level) - 1)]
    mean = slopes[0]
    for slope, decision in zip(slopes, decisions[1:], strict=True):
        mean = mean if slope is slopes[0] else 0.9 * mean + 0.1 * slope
        assert decision.details["rate"] == pytest.approx(mean)


def test_theil_sen_is_the_median_of_pairs_in_the_window():
    compute, level, decisions = shown(TheilSenWindow(0.0))
    for last in range(2, len(level)):
        inside = range(max(0, last - 11), last + 1)
        pairs = [(level[i] - level[j]) / (compute[j] - compute[i]) for i in inside for j in inside if i < j]
        assert decisions[last].details["rate"] == pytest.approx(statistics.median(pairs))


def test_kalman_without_drift_is_a_least_squares_line(monkeypatch):
    monkeypatch.setattr(KalmanTrend, "drift", 0.0)
    compute, level, decisions = shown(KalmanTrend(0.0))
    for last in range(5, len(level)):
        slope = np.polyfit(compute[: last + 1], level[: last + 1], 1)[0]
        assert decisions[last].details["rate"] == pytest.approx(-slope, rel=1e-3)


def test_kalman_follows_a_slope_that_changes():
    compute, _, decisions = shown(KalmanTrend(0.0), noise=0.001, count=60)
    errors = [decision.details["rate"] - math.exp(-compute[i + 1]) for i, decision in enumerate(decisions[1:])]
    assert np.abs(errors[5:]).max() < 0.1 < math.exp(-compute[6]) - math.exp(-compute[-1])


@pytest.mark.parametrize("name", sorted(RIVALS))
def test_a_slope_rule_stops_below_its_price_and_not_before_five_probes(name):
    _, _, decisions = shown(RIVALS[name](1e9))
    actions = [decision.action for decision in decisions]
    assert actions[: FEWEST_PROBES - 1] == ["continue"] * (FEWEST_PROBES - 1)
    assert set(actions[FEWEST_PROBES - 1 :]) == {"stop"}
    assert {decision.action for decision in shown(RIVALS[name](-1e9))[2]} == {"continue"}


@pytest.mark.parametrize("name", sorted(RIVALS))
def test_a_slope_rule_goes_on_from_its_state(name):
    whole, begun = RIVALS[name](0.3), RIVALS[name](0.3)
    curve = make_curve("power", 1)
    looks = [look for look, _ in watch(whole, curve) if look.probe is not None]
    for look in looks[:20]:
        begun.observe(look)
    resumed = RIVALS[name](0.3)
    resumed.load_state_dict(json.loads(json.dumps(begun.state_dict())))
    assert [resumed.observe(look) for look in looks[20:]] == [begun.observe(look) for look in looks[20:]]
    assert resumed.state_dict() == whole.state_dict()


@pytest.mark.parametrize("name", sorted(RIVALS))
def test_a_slope_rule_probes_evenly(name):
    looks = [look for look, _ in watch(RIVALS[name](0.0), make_curve("power", 1)) if look.probe is not None]
    assert 105 <= len(looks) <= 120
    gaps = np.diff([look.compute for look in looks])
    assert gaps.min() >= 1 / 120 - 1e-9
    assert gaps.max() <= 1 / 120 + 2 / STEPS


@pytest.mark.parametrize("name", sorted(RIVALS))
def test_a_slope_rule_does_not_depend_on_the_unit_of_compute(name):
    one = [decision.details.get("rate", 0.0) for decision in shown(RIVALS[name](0.2))[2]]
    large = [decision.details.get("rate", 0.0) for decision in shown(RIVALS[name](0.2), unit=1e9)[2]]
    assert np.array(large) * 1e9 == pytest.approx(np.array(one), rel=1e-9)


# what is claimed


@pytest.fixture(scope="module")
def claimed():
    """On fewer curves than the published table has; patience-3 comes closest to its bound there."""
    curves, makers = make_curves(INSIDE, range(60)), stopping.policies()
    return criteria(
        [judge(name, makers[name], curves) for name in ("marginal_gain", "patience-3", "fixed-1/3", *RIVALS)]
    )


@pytest.mark.parametrize("index", range(4))
def test_what_is_claimed_of_marginal_gain_holds(claimed, index):
    assert claimed[index].holds, claimed[index]


def test_target_of_a_curve_is_nine_tenths_of_its_gain():
    curve = make_curve("exponential", 0)
    gained = curve.loss[0] - aims_of(curve).target
    assert gained == pytest.approx(0.9 * (curve.loss[0] - curve.loss.min()))
