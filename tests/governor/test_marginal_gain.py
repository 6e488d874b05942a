import dataclasses
import itertools
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_eff.contracts.cost import BlockFacts, Facts, ModelFacts, PoolFacts, RunFacts
from hf_eff.contracts.governor import Decision, Offer, ProbeReading, Telemetry
from hf_eff.contracts.memory import BatchShape
from hf_eff.engines import gain_rule
from hf_eff.engines.gain_probe import GainProbe
from hf_eff.engines.probe_history import ProbeHistory
from hf_eff.errors import OptionError
from hf_eff.governor.marginal_gain import MarginalGain, MarginalGainConfig, cost
from hf_eff.numerics.curves import fit_curves
from hf_eff.numerics.flops import forward_flops, training_flops
from hf_eff.registry import build, get_method
from hf_eff.testing import tapes as shipped

STEPS = 300


def governor(**options):
    return MarginalGain(MarginalGainConfig(**options))


def exponential(share):
    return 1.0 + 1.5 * math.exp(-share / 0.08)


def play(policy, loss=exponential, *, noise=0.002, probe_cost=0.0003, limit=1.0, steps=STEPS, rate=None, seed=0):
    """Every look that a run of at most ``steps`` steps gives, and what was decided; the run goes on after a stop.

    ``rate(share)`` is the learning rate; it rises while it is warming up and is 1 at its peak.
    """
    random, looks, decisions = np.random.default_rng(seed), [], []
    probes, previous, rates = 0, None, [0.0]
    for step in range(1, steps + 1):
        if step / steps + probes * probe_cost > 1.0:
            break
        rates.append(rate(step / steps) if rate else 1.0)
        look, error = take_look(step, steps, rates, probes * probe_cost, limit), random.normal(0.0, noise)
        if policy.next_probe(look, probe_cost * limit):
            probes += 1
            mean = loss(step / steps) + error
            delta, se = (None, None) if previous is None else (previous - mean, math.sqrt(2) * noise)
            look = take_look(step, steps, rates, probes * probe_cost, limit)
            look, previous = dataclasses.replace(look, probe=ProbeReading(mean, delta, se, 64)), mean
        looks.append(look)
        decisions.append(policy.observe(look))
    return looks, decisions


def take_look(step, steps, rates, probed, limit):
    spent = (step / steps + probed) * limit
    return Telemetry(
        step=step,
        max_steps=steps,
        spent={"flops": spent},
        limits={"flops": limit},
        compute=spent,
        compute_limit=limit,
        learning_rate=rates[-1],
        peak_learning_rate=max(rates),
        in_warmup=step > 1 and rates[-1] > rates[-2],
        probe_spent=probed * limit,
    )


def first_stop(decisions):
    return next((index + 1 for index, each in enumerate(decisions) if each.action == "stop"), None)


def probe_looks(looks):
    return [look for look in looks if look.probe is not None]


# the rule


def literal_decisions(looks, *, price=None, epsilon=0.02, delta=0.3, confirm=0.02, horizon=0.05):
    """The stop rule on a run at constant learning rate whose curve does not break, written out."""
    clock, levels, errors, stops, pending = [], [], [], [], None
    start = spent_on_probes = None
    for look in probe_looks(looks):
        if start is None:
            start, spent_on_probes, trained = look.compute, look.probe_spent, 0.0
            levels.append(0.0)
        else:
            trained = (look.compute - start) - (look.probe_spent - spent_on_probes)
            levels.append(levels[-1] - look.probe.paired_delta)
            errors.append(look.probe.paired_se)
        clock.append(trained / (look.compute_limit - start))
        # The first probe comes after one step, which ends the first rise of the learning rate.
        if len(levels) < 5 or look.compute - start < confirm * look.compute_limit:
            stops.append(False)
            continue
        weights = [0.95 ** (len(levels) - 1 - i) for i in range(len(levels))]
        posterior = fit_curves(clock, levels, weights, noise_sd=statistics.median(errors[-8:]) / math.sqrt(2))
        left = look.compute_limit - look.compute
        stretch = left if price is None else min(horizon * look.compute_limit, left)
        needed = epsilon * max(0.0, -posterior.predict(clock[-1])[0]) if price is None else price * stretch
        forecast = posterior.forecast(clock[-1], stretch / (look.compute_limit - start), needed)
        recent = [i for i in range(len(clock)) if clock[i] >= clock[-1] - 1 / 15]
        recent = range(len(clock) - min(8, max(3, len(recent))), len(clock))
        slopes = [(levels[j] - levels[i]) / (clock[j] - clock[i]) for i in recent for j in recent if i < j]
        rate = -statistics.median(slopes) / (look.compute_limit - start)
        if forecast.probability < delta:
            held, pending = pending is not None, look.compute if pending is None else pending
            stop = held and look.compute - pending >= confirm * look.compute_limit and rate < needed / stretch
        else:
            stop, pending = False, None
        # Both of the last levels lie above every earlier one by more than the errors explain.
        error, least = statistics.median(errors[-8:]), min(levels[:-2])
        chances = [math.erfc((level - least) / error / math.sqrt(2)) / 2 for level in levels[-2:]]
        stops.append(stop or forecast.negative > 0.95 or max(chances) * len(levels[:-2]) < 0.05)
    return stops


SHAPES = {
    "exponential": exponential,
    "power": lambda share: 0.5 + 2.0 * (1 + share / 0.02) ** -0.7,
    "overfit": lambda share: exponential(share) + 0.8 * max(0.0, share - 0.3),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, {"threshold": "price", "price": 0.3}], ids=["tail", "price"])
def test_decides_by_the_documented_rule(shape, options):
    looks, decisions = play(governor(**options), SHAPES[shape], noise=0.004, seed=3, probe_cost=0.00025)
    at_probes = [each for look, each in zip(looks, decisions, strict=True) if look.probe is not None]
    expected = literal_decisions(looks, price=options.get("price"))
    assert [each.action == "stop" for each in at_probes] == expected
    assert any(expected)
    assert not all(expected[5:])
    assert all(each.action == "continue" for each, look in zip(decisions, looks, strict=True) if look.probe is None)


def test_an_exhausted_run_stops_and_a_paying_one_goes_on():
    _, flat = play(governor())
    _, steep = play(governor(), lambda share: 3.0 - 2.0 * share)
    assert 0.2 * STEPS < first_stop(flat) < 0.7 * STEPS
    assert first_stop(steep) is None or first_stop(steep) > 0.95 * STEPS


def test_a_higher_price_stops_earlier():
    stops = [first_stop(play(governor(threshold="price", price=price))[1]) for price in (0.1, 0.5, 2.0)]
    assert stops[0] > stops[1] > stops[2]


def u_shaped(share):
    """Falls by 2.6 nats, then over-fits."""
    return exponential(share) + 1.1 * math.exp(-share / 0.02) + 2.0 * max(0.0, share - 0.6) ** 1.5


def test_a_rise_after_a_deep_fall_stops_a_run_with_few_rough_probes():
    looks, decisions = play(governor(probe_share=0.15), u_shaped, noise=0.02, probe_cost=0.0125, seed=1)
    assert 8 < len(probe_looks(looks)) < 16
    stop = first_stop(decisions)
    assert "rises" in decisions[stop - 1].reason
    assert 0.6 * STEPS < stop < 0.85 * STEPS


@pytest.mark.parametrize(("fall", "most"), [(0.0, 12), (0.3, 6)], ids=["level", "falling slowly"])
def test_noise_is_seldom_taken_for_a_rise_in_a_whole_run(fall, most):
    wrong = 0
    for seed in range(40):
        looks, _ = play(governor(), lambda share: 2.0 - fall * share, noise=0.05, seed=seed)
        history, chances = ProbeHistory(discount=0.95, prior_scale=3.0, window=8), []
        for look in probe_looks(looks):
            history.take_in(look)
            chances.append(history.chance_of_rise())
        wrong += max(chances) > 0.95
    assert wrong <= most


def test_a_rising_loss_stops_the_run():
    _, decisions = play(governor(epsilon=0.0), lambda share: 2.0 - 0.5 * share + 1.5 * max(0.0, share - 0.4))
    stop = first_stop(decisions)
    assert 0.4 * STEPS < stop < 0.6 * STEPS
    assert "rises" in decisions[stop - 1].reason
    assert decisions[stop - 1].details["probability_rising"] > 0.95


def test_one_verdict_is_not_enough():
    looks, decisions = play(governor(threshold="price", price=0.3, confirm=0.1))
    first = next(i for i, each in enumerate(decisions) if each.details.get("too_little"))
    stop = first_stop(decisions) - 1
    assert looks[stop].compute - looks[first].compute >= 0.1
    between = [each for each in decisions[first : stop + 1] if each.details]
    assert all(each.details["too_little"] for each in between)


def test_without_a_span_the_next_probe_still_has_to_agree():
    _, decisions = play(governor(threshold="price", price=50.0, confirm=0.0))
    verdicts = [each.action for each in decisions if "too_little" in each.details]
    assert verdicts[:2] == ["continue", "stop"]


def test_explore_floor_forbids_early_stops():
    free = first_stop(play(governor())[1])
    looks, decisions = play(governor(explore_floor=0.8))
    assert free < 0.7 * STEPS
    assert looks[first_stop(decisions) - 1].compute >= 0.8


def test_strict_spends_delta_over_all_checks():
    _, decisions = play(governor(strict=True), noise=0.01)
    deltas = [each.details["delta"] for each in decisions if "delta" in each.details]
    assert deltas == pytest.approx([0.3 * 6 / (math.pi * j) ** 2 for j in range(1, len(deltas) + 1)])
    assert sum(deltas) < 0.3
    assert first_stop(decisions) >= first_stop(play(governor(), noise=0.01)[1])


def test_the_unit_of_compute_does_not_matter():
    plain = play(governor(threshold="price", price=0.4))[1]
    in_flops = play(governor(threshold="price", price=0.4 / 2.0**60), limit=2.0**60)[1]
    assert [each.action for each in in_flops] == [each.action for each in plain]


# the learning rate


def warm(share, until=0.2):
    return min(1.0, share / until)


def test_no_stop_while_the_rate_rises_nor_soon_after():
    looks, decisions = play(governor(threshold="price", price=50.0), rate=warm)
    after = [i for i, look in enumerate(looks) if look.probe is not None and look.step > 0.2 * STEPS]
    rising = {each.reason for each in decisions[1 : after[0]] if each.details}
    assert rising == {"the learning rate is still rising"}
    # At this price every verdict is to stop: the first one may come at the fifth probe, the stop at a later one.
    assert all("since the curve began or broke" in decisions[i].reason for i in after[:4])
    assert decisions[after[4]].details["too_little"]
    assert first_stop(decisions) - 1 > after[4]


def test_a_drop_of_the_rate_suspends_stopping():
    def rate(share):
        return 1.0 if share < 0.6 else 0.1

    looks, decisions = play(governor(threshold="price", price=0.02), rate=rate)
    after = [i for i, look in enumerate(looks) if look.probe is not None and look.step >= 0.6 * STEPS]
    before = [i for i, look in enumerate(looks) if look.probe is not None and look.step < 0.6 * STEPS]
    assert decisions[before[-1]].details["too_little"]
    assert all("since the curve began or broke" in decisions[i].reason for i in after[:4])
    assert "probability" in decisions[after[4]].details


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_a_smooth_decay_is_no_break_and_is_marked(decay):
    def rate(share):
        return 1.0 - share if decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * share))

    looks, decisions = play(governor(), rate=rate)
    told = [each.details for look, each in zip(looks, decisions, strict=True) if look.probe is not None]
    assert all(details["confounded"] for details in told[1:])
    assert [details["probes_since_break"] for details in told] == list(range(1, len(told) + 1))
    assert all("probability" in details for details in told[5:])
    _, constant = play(governor())
    assert not any(each.details["confounded"] for each in constant if each.details)


def test_under_a_decay_the_curve_is_fitted_over_the_integrated_rate():
    """Loss is a power of sum(rate) since the first probe: over that clock the next gain is known, over compute not."""
    start = 1 / STEPS

    def loss(share):
        return 1.0 + 1.5 * (1.0 + (share - share**2 / 2 - start + start**2 / 2) / 0.03) ** -0.8

    looks, _ = play(governor(), loss, rate=lambda share: 1.0 - share, noise=1e-4)
    history, blind = (ProbeHistory(discount=0.95, prior_scale=3.0, window=8) for _ in range(2))
    for look in probe_looks(looks):
        if look.compute < 0.75:
            history.take_in(look)
            blind.take_in(dataclasses.replace(look, learning_rate=1.0, peak_learning_rate=1.0))
            last = look
    done = last.compute - last.probe_spent
    # Ten steps on, the rate has hardly fallen further.
    truth = loss(done) - loss(done + 10 / STEPS)
    told = history.outlook(last).forecast(10 / STEPS, 0.0).gain
    assert told == pytest.approx(truth, rel=0.12)
    constant = dataclasses.replace(last, learning_rate=1.0, peak_learning_rate=1.0)
    rest = loss(done) - loss(1.0)
    left = 1.0 - done
    assert blind.outlook(constant).forecast(left, 0.0).gain > 1.5 * rest


def test_a_change_point_restarts_the_fit():
    def loss(share):
        return exponential(share) - (0.4 if share > 0.5 else 0.0)

    looks, decisions = play(governor(explore_floor=0.99), loss, noise=0.001)
    told = [(look.step, each.details) for look, each in zip(looks, decisions, strict=True) if look.probe is not None]
    restarts = [
        step
        for (step, now), (_, old) in zip(told[1:], told, strict=False)
        if now["probes_since_break"] < old["probes_since_break"] and step > 5
    ]
    assert len(restarts) == 1
    assert 0.5 * STEPS < restarts[0] < 0.6 * STEPS
    # What lies before the jump is forgotten: the curve is flat again, and expected to stay so.
    history = ProbeHistory(discount=0.95, prior_scale=3.0, window=8)
    for look in probe_looks(looks):
        if look.step <= restarts[0] + 12:
            history.take_in(look)
            last = look
    assert history.outlook(last).forecast(0.4, 0.0).gain < 0.01


# probes


def tapes():
    random = np.random.default_rng(8)
    for seed in range(40):
        yield {
            "probe_cost": float(10 ** random.uniform(-5, -1)),
            "steps": int(random.integers(5, 600)),
            "limit": float(10 ** random.uniform(0, 18)),
            "noise": 0.01,
            "seed": seed,
        }


@pytest.mark.parametrize("share", [0.03, 0.15, 0.0])
def test_probes_never_pass_the_purse(share):
    for tape in tapes():
        for look in play(governor(probe_share=share), **tape)[0]:
            assert look.probe_spent <= share * min(look.compute + 0.2 * look.compute_limit, look.compute_limit) * (
                1 + 1e-12
            )
            assert look.probe_spent <= 0.15 * look.compute + 0.03 * look.compute_limit


def test_cheap_probes_are_spaced_geometrically_and_never_far_apart():
    looks = probe_looks(play(governor(), probe_cost=1e-6, steps=4000)[0])
    at = [look.compute - looks[0].compute for look in looks]
    gaps = list(np.diff(at))
    step = 1 / 4000
    early = [(gap, now) for gap, now in zip(gaps, at, strict=False) if 20 * step < now < 0.1]
    assert all(0.08 * now - 1e-9 <= gap <= 0.08 * now + 2 * step for gap, now in early)
    assert max(gaps) <= 1 / 40
    assert all(gap <= step * 1.01 for gap, now in zip(gaps, at, strict=False) if now < 10 * step)


def test_dear_probes_are_spread_over_the_run():
    looks = probe_looks(play(governor(), probe_cost=0.0027)[0])
    assert len(looks) >= 11
    assert np.diff([look.step for look in looks]).max() < 0.15 * STEPS


def test_without_a_finite_budget_it_neither_probes_nor_stops():
    looks, decisions = play(governor(), limit=math.inf)
    assert not probe_looks(looks)
    assert first_stop(decisions) is None


def test_what_the_steps_leave_counts_where_it_is_less_than_the_limit():
    def look(step, limits):
        reading = ProbeReading(3.0 - 0.01 * step, None if step == 1 else 0.01, None if step == 1 else 0.001, 8)
        return Telemetry(step, 50, {}, limits, 2.0 * step, 500.0, probe=reading, learning_rate=1.0)

    for limits, expected in (({"flops": 500.0}, 100.0), ({"flops": 60.0}, 60.0), ({}, 100.0), ({"bytes": 1.0}, 100.0)):
        policy = governor()
        for step in range(1, 20):
            seen = look(step, limits)
            ends = policy.observe(dataclasses.replace(seen, compute_limit=limits.get("flops", 70.0))).details["end"]
        assert ends == pytest.approx(expected), limits


def look_with(reading, step, limit=1.0):
    compute = step / STEPS
    return Telemetry(step, STEPS, {}, {}, compute, limit, probe=reading, learning_rate=1.0, peak_learning_rate=1.0)


@pytest.mark.parametrize(
    "reading", [ProbeReading(math.nan, None, None, 0), ProbeReading(math.inf, math.nan, math.nan, 3)]
)
def test_a_probe_without_a_loss_changes_nothing_but_the_schedule(reading):
    policy = governor()
    for step in range(1, 20):
        delta, se = (None, None) if step == 1 else (0.01, 0.001)
        policy.observe(look_with(ProbeReading(3.0 - 0.01 * step, delta, se, 8), step))
    before = policy.state_dict()
    decision = policy.observe(look_with(reading, 20))
    assert decision.action == "continue"
    assert "no finite" in decision.reason
    assert policy.state_dict() == {**before, "last_probe": 20 / STEPS}


# replay and resume


def test_the_tape_decides():
    policy = governor(strict=True)
    looks, decisions = play(policy, noise=0.02, seed=4)
    again = governor(strict=True)
    assert [again.observe(look) for look in looks] == decisions
    from_probes = governor(strict=True)
    told = [from_probes.observe(look) for look in probe_looks(looks)]
    assert told == [each for look, each in zip(looks, decisions, strict=True) if look.probe is not None]


class Interrupted:
    """A governor that is saved as JSON and restored into a fresh one before step ``cut``."""

    def __init__(self, cut):
        self.policy, self.cut = governor(), cut

    def next_probe(self, look, probe_cost):
        if look.step == self.cut:
            saved = json.dumps(self.policy.state_dict(), allow_nan=False)
            self.policy = governor()
            self.policy.load_state_dict(json.loads(saved))
        return self.policy.next_probe(look, probe_cost)

    def observe(self, look):
        return self.policy.observe(look)


@pytest.mark.parametrize("rate", [None, warm, lambda share: 1.0 - share], ids=["constant", "warm-up", "linear"])
def test_resumes_exactly_after_every_step(rate):
    options = {"noise": 0.02, "steps": 60, "rate": rate, "probe_cost": 0.0015}
    looks, decisions = play(governor(), **options)
    assert 15 < len(probe_looks(looks)) < 30
    for cut in range(1, 61):
        assert play(Interrupted(cut), **options) == (looks, decisions)


class Foreseen:
    """A governor whose plan foresaw a share of the compute that the steps really take."""

    def __init__(self, policy, share):
        self.policy, self.share = policy, share

    def _as_planned(self, look):
        return dataclasses.replace(look, limits={}, compute_limit=self.share * look.compute_limit)

    def next_probe(self, look, probe_cost):
        return self.policy.next_probe(self._as_planned(look), probe_cost)

    def observe(self, look):
        return self.policy.observe(self._as_planned(look))


def test_probes_go_on_to_the_end_of_a_run_that_takes_more_than_was_planned():
    looks, _ = play(Foreseen(governor(), 0.5), lambda share: 3.0 - share, probe_cost=0.001)
    steps = [look.step for look in probe_looks(looks)]
    assert steps[-1] > 0.94 * STEPS
    assert max(after - before for before, after in itertools.pairwise(steps)) < 0.06 * STEPS
    assert looks[-1].probe_spent <= 0.03


def test_a_restored_state_is_not_shared():
    looks, _ = play(governor())
    policy, other = governor(), governor()
    for look in looks[:100]:
        policy.observe(look)
    saved = policy.state_dict()
    kept = json.dumps(saved)
    other.load_state_dict(saved)
    for look in looks[100:200]:
        policy.observe(look)
        other.observe(look)
    assert json.dumps(saved) == kept != json.dumps(other.state_dict())


FROZEN = json.loads(Path(__file__).with_name("frozen_marginal_gain.json").read_text(encoding="utf-8"))


def drop(share):
    return 1.0 if share < 0.6 else 0.1


RATES = {"warm": warm, "drop": drop, "decay": lambda share: 1.0 - share, None: None}


@pytest.mark.parametrize("name", FROZEN)
def test_decides_as_it_did(name):
    """Looks and decisions recorded once: a change of the code that means to change none changes none."""
    frozen = FROZEN[name]
    given = {**frozen["play"], "rate": RATES[frozen["play"].get("rate")]}
    looks, decisions = play(governor(**frozen["options"]), SHAPES[given.pop("loss", "exponential")], **given)
    probed = [(look, each) for look, each in zip(looks, decisions, strict=True) if look.probe is not None]
    assert [[look.step, each.reason] for look, each in probed] == [row[:2] for row in frozen["looks"]]
    assert [look.step for look, each in probed if each.action == "stop"] == frozen["stops"]
    chances = [each.details.get("probability") for _, each in probed]
    assert [chance is None for chance in chances] == [row[2] is None for row in frozen["looks"]]
    known = [(now, row[2]) for now, row in zip(chances, frozen["looks"], strict=True) if now is not None]
    assert [now for now, _ in known] == pytest.approx([then for _, then in known], rel=1e-4, abs=1e-9)


# the other thresholds


@pytest.mark.parametrize(
    ("name", "options"), [("tail", {"epsilon": 0.1}), ("reservation", {"epsilon": 0.1}), ("target", {"target": 1.2})]
)
def test_a_threshold_is_the_policy_of_that_name(name, options):
    looks, decisions = play(governor(threshold=name, **options), noise=0.01)
    alone = build(get_method("governor", name), options)
    assert [alone.observe(look) for look in looks] == decisions
    assert first_stop(decisions) is not None


# what is guaranteed


def gaining(compute):
    return 6.0 - 0.04 * compute


def false_stops(**options):
    """Runs that are ended although each step gains a third more than its price."""
    ended = 0
    for seed in range(20):
        policy = governor(threshold="price", price=0.03, horizon=0.3, delta=0.2, confirm=0.0, slope_window=2, **options)
        ended += shipped.play(policy, shipped.Tape(gaining, steps=60, limit=60.0, noise=0.15, seed=seed)).stopped
    return ended / 20


def test_strict_keeps_false_stops_below_delta():
    assert false_stops(strict=True) <= 0.2 < false_stops()


@pytest.mark.parametrize("price", [0.05, 0.2, 0.6])
@pytest.mark.parametrize("shape", ["exponential", "power"])
def test_regret_is_bounded_where_gain_only_falls(shape, price):
    """J-regret <= e |C_stop - C*| + price (confirmation span + probe gap), e the largest error of a rate at a check."""
    loss = SHAPES[shape]
    policy = governor(threshold="price", price=price, delta=0.5, horizon=0.01)
    looks, decisions = play(policy, loss, noise=1e-5, probe_cost=1e-6, steps=1000)
    stop = first_stop(decisions)
    end = 1.0 if stop is None else looks[stop - 1].compute
    shares = np.linspace(0.001, 1.0, 20_000)
    total = np.array([loss(share) + price * share for share in shares])
    best = shares[total.argmin()]
    checks = [(look, each.details) for look, each in zip(looks, decisions, strict=True) if "gain" in each.details]
    rates = [(look.compute, told["gain"] / told["stretch"], told["recent_rate"]) for look, told in checks]
    errors = [
        abs(rate - (loss(at - 1e-5) - loss(at + 1e-5)) / 2e-5)
        for at, *told in rates
        if min(best, end) - 0.05 <= at <= max(best, end)
        for rate in told
    ]
    regret = loss(end) + price * end - total.min()
    assert regret + 1e-9 >= 0
    assert regret <= max(errors) * abs(end - best) + price * (0.02 + 1 / 120 + 2e-3)
    assert regret < 0.05 * (total[0] - total.min())


# reallocations and the end of a run


class Recorder:
    """Stands in for the rule that weighs reallocations, and takes what a test tells it to."""

    def __init__(self, config):
        self.calls, self.noted, self.takes, self.blocks = [], [], {}, False
        Recorder.last = self

    def note_probe(self, telemetry, recent_rate):
        self.noted.append((telemetry.step, recent_rate))

    def consider(self, telemetry, continue_rate, threshold_rate, horizon):
        self.calls.append((telemetry.step, continue_rate, threshold_rate, horizon))
        return self.takes.get(telemetry.step)

    def blocks_stop(self, telemetry, threshold_rate):
        return self.blocks

    def facts(self, telemetry):
        return {"indices": {"refresh": 0.5}}

    def state_dict(self):
        return {"calls": len(self.calls)}

    def load_state_dict(self, state):
        self.loaded = state


REFRESH = Offer("refresh", fixed_cost=0.01)


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(gain_rule, "ReallocationRule", Recorder)
    return Recorder


def offered(looks, **facts):
    return [dataclasses.replace(look, offers=(REFRESH,), **facts) for look in probe_looks(looks)]


def test_reallocations_are_weighed_at_every_settled_probe(recorder):
    looks = offered(play(governor(), rate=warm, noise=0.01)[0])
    policy = governor(actions="refresh+widen", explore_floor=1.0)
    decisions = [policy.observe(look) for look in looks]
    rule = recorder.last
    assert [step for step, _ in rule.noted] == [look.step for look in looks]
    settled = [look.step for look in looks if look.step > 0.2 * STEPS][4:]
    assert [step for step, *_ in rule.calls] == settled  # explore_floor forbids stops only
    assert {horizon for look, (*_, horizon) in zip(looks[-len(settled) :], rule.calls, strict=True)} <= {
        min(0.05 * each.details["end"], each.details["end"] - look.compute)
        for look, each in zip(looks, decisions, strict=True)
    }
    assert {each.action for each in decisions} == {"continue"}
    told = [each.details["indices"] for each in decisions if "indices" in each.details]
    assert told == [{"refresh": 0.5}] * len(told)
    assert len(told) > len(settled)
    assert policy.state_dict()["reallocation"] == {"calls": len(settled)}
    policy.load_state_dict(policy.state_dict())
    assert rule.loaded == {"calls": len(settled)}


def test_the_rates_it_is_told_are_those_of_the_curve(recorder):
    looks = offered(play(governor(), lambda share: 3.0 - 2.0 * share, noise=1e-4)[0])
    policy = governor(threshold="price", price=0.7, actions="refresh")
    for look in looks:
        policy.observe(look)
    rule = recorder.last
    assert [rate for _, rate, *_ in rule.calls] == pytest.approx([2.0] * len(rule.calls), rel=0.05)
    assert [threshold for _, _, threshold, _ in rule.calls] == pytest.approx([0.7] * len(rule.calls))
    assert math.isnan(rule.noted[0][1])
    assert [rate for _, rate in rule.noted[8:]] == pytest.approx([2.0] * (len(looks) - 8), rel=0.2)


def test_without_actions_or_offers_it_may_only_stop(recorder):
    looks = probe_looks(play(governor())[0])
    policy = governor(actions="refresh")
    decisions = [policy.observe(look) for look in looks]
    assert not recorder.last.calls
    assert any(each.action == "stop" for each in decisions)
    plain = governor()
    assert [plain.observe(dataclasses.replace(look, offers=(REFRESH,))) for look in looks] == decisions


@pytest.mark.parametrize("phase_changes", [True, False], ids=["rows", "memory"])
def test_a_reallocation_breaks_the_curve(recorder, phase_changes):
    looks = offered(play(governor())[0])
    turn = 40
    if phase_changes:
        looks = looks[: turn + 1] + [dataclasses.replace(look, data_phase=1) for look in looks[turn + 1 :]]
    policy = governor(threshold="price", price=50.0, confirm=0.0, actions="refresh")
    taken = Decision("refresh" if phase_changes else "switch_memory", "it pays", {"index": 2.0}, "x")
    recorder.last.takes[looks[turn].step] = taken
    decisions = [policy.observe(look) for look in looks]
    assert (decisions[turn].action, decisions[turn].target) == (taken.action, "x")
    assert decisions[turn].details["index"] == 2.0
    assert "level" in decisions[turn].details
    assert [each.details["probes_since_break"] for each in decisions[turn : turn + 7]] == [turn + 1, *range(1, 7)]
    assert all("curve began or broke" in each.reason for each in decisions[turn + 1 : turn + 5])
    assert "too_little" in decisions[turn + 5].details
    assert [step for step, *_ in recorder.last.calls if looks[turn].step < step <= looks[turn + 4].step] == []
    weights = policy.state_dict()["history"]["weight"]
    assert weights == [0.3] * (turn + 1) + [1.0] * (len(looks) - turn - 1)


@pytest.mark.parametrize("action", ["refresh", "switch_memory"])
def test_what_the_run_does_not_carry_out_breaks_nothing(recorder, action):
    still = Offer(action, "x")
    looks = [dataclasses.replace(look, offers=(still,)) for look in probe_looks(play(governor())[0])]
    policy = governor(threshold="price", price=50.0, confirm=0.0, actions="refresh+memory")
    recorder.last.takes[looks[20].step] = Decision(action, "it pays", {}, "x")
    told = [policy.observe(look).details["probes_since_break"] for look in looks[:26]]
    assert told == [*range(1, 27)]


def test_new_rows_break_the_curve_whoever_chose_them():
    looks = probe_looks(play(governor())[0])
    looks = looks[:30] + [dataclasses.replace(look, data_phase=1) for look in looks[30:]]
    policy = governor()
    told = [policy.observe(look).details["probes_since_break"] for look in looks]
    assert told == [*range(1, 31), *range(1, len(looks) - 29)]


def test_what_may_still_pay_blocks_the_stop(recorder):
    looks = offered(play(governor())[0])
    policy = governor(actions="refresh")
    recorder.last.blocks = True
    decisions = [policy.observe(look) for look in looks]
    assert {each.action for each in decisions} == {"continue"}
    assert any("a reallocation may still pay" in each.reason for each in decisions)
    recorder.last.blocks = False
    assert policy.observe(dataclasses.replace(looks[-1], compute=looks[-1].compute + 1e-3)).action == "stop"


def test_it_works_with_the_rule_itself():
    looks = offered(play(governor(), noise=0.004)[0])
    policy = governor(actions="refresh+next_band+widen+memory")
    decisions = [policy.observe(look) for look in looks]
    again = governor(actions="refresh+next_band+widen+memory")
    half = len(looks) // 2
    for look in looks[:half]:
        again.observe(look)
    third = governor(actions="refresh+next_band+widen+memory")
    third.load_state_dict(json.loads(json.dumps(again.state_dict())))
    assert [third.observe(look) for look in looks[half:]] == decisions[half:]
    assert {"indices", "purse", "feasible"} <= set(decisions[6].details)
    assert any(each.action == "refresh" for each in decisions)


def test_too_little_gain_begins_the_cooldown_and_a_rising_loss_does_not():
    _, plain = play(governor())
    looks, decisions = play(governor(cooldown=0.25))
    verdict = next(each for each in decisions if each.action != "continue")
    assert verdict.action == "cooldown"
    assert "probability" in verdict.reason
    # A fifth of the budget is kept for it, so that the main part ends at four fifths.
    assert verdict.details["end"] == pytest.approx(0.8)
    assert {each.action for look, each in zip(looks, decisions, strict=True) if look.compute >= 0.8} == {"continue"}
    assert first_stop(plain) is not None
    _, risen = play(governor(cooldown=0.25), lambda share: 2.0 - 0.5 * share + 1.5 * max(0.0, share - 0.4))
    stop = next(each for each in risen if each.action != "continue")
    assert stop.action == "stop"
    assert "rises" in stop.reason


def test_it_never_ends_a_cooldown():
    looks, _ = play(governor(), SHAPES["overfit"])
    policy = governor(cooldown=0.1)
    decisions = [policy.observe(dataclasses.replace(look, phase="cooldown")) for look in probe_looks(looks)]
    assert {each.action for each in decisions} == {"continue"}
    assert "being lowered" in decisions[-1].reason


def test_every_record_names_the_best_probe():
    looks, decisions = play(governor(), SHAPES["overfit"], noise=0.02)
    level, best = 0.0, (math.inf, None, None)
    for look, each in zip(looks, decisions, strict=True):
        if look.probe is None:
            continue
        level -= look.probe.paired_delta or 0.0
        best = min(best, (level, look.step, look.compute))
        assert each.details["best_level"] == pytest.approx(best[0])
        assert (each.details["best_step"], each.details["best_compute"]) == best[1:]
    assert best[1] < looks[-1].step


# options and cost


@pytest.mark.parametrize("options", [{"threshold": "price"}, {"price": 0.1}])
def test_a_price_is_given_exactly_when_it_is_used(options):
    with pytest.raises(OptionError, match="price must be given with threshold='price' and only then"):
        MarginalGainConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": "target"}, "target must be given with threshold='target' and only then"),
        ({"target": 1.0}, "target must be given with threshold='target' and only then"),
        ({"threshold": "reservation", "epsilon": 0.0}, "epsilon must be above 0"),
        ({"actions": "refresh+memry"}, "Did you mean 'memory'"),
        ({"actions": "refresh,memory"}, "joined by '\\+'"),
        ({"cooldown": 1.5}, "cooldown"),
        ({"window_steps": -1}, "window_steps"),
    ],
)
def test_contradicting_options_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        MarginalGainConfig(**options)


def facts(max_steps=200, num_reference=500):
    block = BlockFacts(params=10_000, matmul_params=9_000, attention_width=64)
    model = ModelFacts(
        architecture="Toy",
        params=60_000,
        blocks=(block,) * 4,
        head_matmul_params=16_000,
        embedding_params=16_000,
        hidden_size=64,
        vocab_size=250,
    )
    pool = PoolFacts(
        num_rows=4000, mean_tokens=40.0, max_tokens=80, num_reference=num_reference, mean_reference_tokens=40.0
    )
    return Facts(model=model, pool=pool, run=RunFacts(batch_size=16, max_steps=max_steps, length=40))


@pytest.mark.parametrize(("max_steps", "num_examples"), [(200, 16), (2000, 64), (500, 128), (40, 128)])
def test_the_cost_is_what_a_full_run_spends_on_probes(max_steps, num_examples):
    given, config = facts(max_steps), MarginalGainConfig(num_examples=num_examples)
    step = training_flops(given.model, BatchShape(rows=16, length=40))
    rows = [{"input_ids": [1] * 40, "labels": [1] * 40}] * 500
    probe = GainProbe(
        rows,
        lambda batch: {key: torch.tensor([row[key] for row in batch]) for key in batch[0]},
        is_causal_lm=True,
        num_examples=num_examples,
        forward_flops=lambda batch, length: forward_flops(given.model, BatchShape(rows=batch, length=length)),
        max_flops=config.probe_allowance(step * max_steps),
    )
    share = probe.cost_flops / (step * max_steps)
    looks, _ = play(MarginalGain(config), probe_cost=share, steps=max_steps, limit=step * max_steps)
    spent = looks[-1].probe_spent
    assert cost(config, given).flops == pytest.approx(spent, rel=0.15)
    assert cost(config, given).flops <= 0.03 * step * max_steps


def test_without_held_out_rows_nothing_is_forecast():
    assert cost(MarginalGainConfig(), facts(num_reference=0)).flops == 0.0
