import dataclasses
import logging

import pytest

from hf_eff.contracts.cost import Facts
from hf_eff.governor.target import Target, TargetConfig, cost
from hf_eff.testing.tapes import Tape, falling, flat, play, steep

LONG = {"steps": 1000, "limit": 144.0}


def target(value, **options):
    return Target(TargetConfig(target=value, **options))


def test_stops_at_the_first_probe_that_reads_the_target():
    recording = play(target(2.2), Tape(falling, **LONG))
    losses = [look.probe.mean for look in recording.telemetry if look.probe is not None]
    assert recording.stopped
    assert losses[-1] <= 2.2 < min(losses[:-1])
    assert recording.decisions[-1].reason.startswith("the target 2.2 is reached")


@pytest.mark.parametrize(("curve", "aim"), [(falling, 1.4), (flat, 1.9), (falling, 1.85)])
def test_gives_up_where_the_rest_will_not_reach_it(literal, watched, curve, aim):
    looks, decisions = watched(target(aim), Tape(curve, noise=0.01, **LONG))
    first = next(look for look in looks if look.probe is not None).probe.mean

    asked = []

    def law(spent, limit, gain, level):
        asked.append(first + level - aim)
        return limit - spent, asked[-1]

    at_probes = [each for look, each in zip(looks, decisions, strict=True) if look.probe is not None]
    expected = literal(looks, law, chance=0.05)
    assert [each.action == "stop" for each in at_probes] == expected
    assert any(expected)
    assert [each.details["needed"] for each in at_probes if "needed" in each.details] == pytest.approx(asked)


def test_what_is_in_reach_is_not_given_up():
    assert not any(each.action == "stop" for each in play(target(35.3), Tape(steep, **LONG)).decisions[:-1])
    assert play(target(35.3), Tape(steep, noise=0.0, **LONG)).telemetry[-1].probe.mean <= 35.3


def test_a_larger_chance_is_given_up_earlier():
    ends = [play(target(1.8, futility=chance), Tape(falling, noise=0.02, **LONG)).last_step for chance in (1e-6, 0.5)]
    assert ends[0] >= ends[1]


def test_explore_floor_holds_for_the_target_too():
    recording = play(target(4.0, explore_floor=0.5), Tape(falling, **LONG))
    assert recording.telemetry[-1].compute >= 0.5 * 144


def test_nothing_ends_a_run_that_cools_down():
    """The rate is lowered as far as planned, also where the target is reached on the way."""
    policy = target(4.0)
    looks = [dataclasses.replace(look, phase="cooldown") for look in play(target(0.1), Tape(falling)).telemetry]
    decisions = [policy.observe(look) for look in looks]
    assert {each.action for each in decisions} == {"continue"}
    assert any(look.probe is not None and look.probe.mean < 4.0 for look in looks)


def test_without_a_target_it_only_keeps_the_budget(caplog):
    with caplog.at_level(logging.WARNING, logger="hf_eff.governor.target"):
        policy = Target(TargetConfig())
    assert "no target" in caplog.text
    recording = play(policy, Tape(flat, **LONG))
    assert recording.probes == 0
    assert not recording.stopped
    seen = play(target(0.0), Tape(flat, **LONG)).telemetry
    assert {policy.observe(look).action for look in seen} == {"continue"}
    assert cost(TargetConfig(), Facts).flops == 0.0
