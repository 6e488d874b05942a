import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_eff.engines.gain_thresholds import reservation_rate
from hf_eff.errors import OptionError
from hf_eff.governor.reservation import Reservation, ReservationConfig
from hf_eff.testing.tapes import Tape, falling, flat, play, replay

LONG = {"steps": 1000, "limit": 144.0}


def late(compute):
    """Falls fastest in the middle."""
    return 4.0 - 2.0 / (1.0 + math.exp((60.0 - compute) / 8.0))


@pytest.mark.parametrize("curve", [falling, flat, late])
@pytest.mark.parametrize("epsilon", [0.02, 0.3])
def test_stops_where_the_next_stretch_is_below_the_reservation(literal, watched, curve, epsilon):
    looks, decisions = watched(Reservation(ReservationConfig(epsilon=epsilon)), Tape(curve, noise=0.01, **LONG))
    start, best = looks[0].compute, []

    def law(spent, limit, gain, level):
        stretch = min(0.05 * limit, limit - spent)
        if not best or spent - start <= 0.05 * (limit - start):
            best.append(gain(stretch) / stretch)
        u, low = max(best), epsilon * max(best)
        return stretch, (u * math.e / low) ** (spent / limit) * low / math.e * stretch

    at_probes = [each for look, each in zip(looks, decisions, strict=True) if look.probe is not None]
    expected = literal(looks, law)
    assert [each.action == "stop" for each in at_probes] == expected
    assert any(expected) or curve is late  # which shows little at its beginning, so little is asked of it
    assert not all(expected)
    told = [each.details["best_rate"] for each in at_probes if "best_rate" in each.details]
    assert told[-1] == pytest.approx(max(best))


@given(st.floats(0, 1), st.floats(1e-9, 1e9), st.floats(1e-6, 1.0))
def test_the_threshold_rises_from_the_least_value_over_e_to_the_best_one(share, best, epsilon):
    rate = reservation_rate(share, best, epsilon)
    assert reservation_rate(0.0, best, epsilon) == pytest.approx(epsilon * best / math.e)
    assert reservation_rate(1.0, best, epsilon) == pytest.approx(best)
    assert epsilon * best / math.e * (1 - 1e-9) <= rate <= best * (1 + 1e-9)
    assert rate <= reservation_rate(min(1.0, share + 0.01), best, epsilon)


@given(st.lists(st.floats(0.02, 1.0), min_size=1, max_size=3000))
def test_small_items_are_worth_what_the_bound_promises(values):
    """Items of 1/1000 of the budget: the best in hindsight are worth at most ln(u/l) + 1 times as much."""
    size, epsilon, spent, taken = 1e-3, 0.02, 0.0, 0.0
    for value in values * 5:
        if spent + size <= 1.0 + 1e-12 and value >= reservation_rate(spent, 1.0, epsilon):
            spent, taken = spent + size, taken + value * size
    optimum = sum(sorted(values * 5, reverse=True)[:1000]) * size
    # A thousandth of the budget of the best value is lost to the size of the items.
    assert optimum <= (math.log(1 / epsilon) + 1) * taken + 5 * size


def test_a_run_that_can_wait_is_stopped_before_one_that_cannot():
    """The same gain is enough early and too little late: what remains is worth more."""
    ends = [play(Reservation(ReservationConfig(epsilon=low)), Tape(falling, **LONG)).last_step for low in (0.001, 0.5)]
    assert ends[0] > ends[1]


def test_the_best_rate_survives_a_restart():
    tape = Tape(falling, **LONG)
    recording = play(Reservation(ReservationConfig()), tape)
    for cut in (10, 30, 60):
        first, second = Reservation(ReservationConfig()), Reservation(ReservationConfig())
        for question, look in list(zip(recording.questions, recording.telemetry, strict=False))[:cut]:
            first.next_probe(question, tape.probe_cost)
            first.observe(look)
        second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
        later = replay(second, tape, recording, start=cut)
        assert [decision for _, decision in later] == recording.decisions[cut:]


def test_no_value_at_all_is_refused():
    with pytest.raises(OptionError, match="epsilon"):
        ReservationConfig(epsilon=0.0)
