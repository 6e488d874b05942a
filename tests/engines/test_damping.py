"""Dwell, purse and backoff against their formulas."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_eff.contracts.governor import Telemetry
from hf_eff.engines.damping import Damping


def look(compute, *, budget=1.0, probes=0.0, overhead=0.0):
    return Telemetry(
        step=1,
        max_steps=2,
        spent={},
        limits={},
        compute=compute,
        compute_limit=budget,
        probe_spent=probes,
        overhead_spent=overhead,
    )


def test_the_dwell_is_two_costs_or_two_percent_of_the_budget():
    damping = Damping(0.03)
    assert damping.dwell("refresh", 0.001, 1.0) == 0.02
    assert damping.dwell("refresh", 0.05, 1.0) == 0.1
    damping.note_action(0.2, look(0.5))
    assert damping.dwell("refresh", 0.05, 1.0) == 0.4


def test_the_dwell_runs_from_the_last_action_of_any_kind_and_at_first_from_the_start():
    damping = Damping(0.03)
    assert damping.dwell_left("widen", 0.0, look(0.015)) == pytest.approx(0.005)
    assert damping.dwell_left("widen", 0.0, look(0.02)) == 0.0
    damping.note_action(0.0, look(0.3))
    assert damping.dwell_left("widen", 0.0, look(0.305)) == pytest.approx(0.015)


def test_failures_double_the_dwell_and_the_second_in_a_row_retires():
    damping = Damping(0.03)
    damping.note_outcome("refresh", failed=True)
    assert damping.dwell("refresh", 0.0, 1.0) == 0.04
    assert damping.dwell("widen", 0.0, 1.0) == 0.02
    assert not damping.is_retired("refresh")
    damping.note_outcome("refresh", failed=False)
    damping.note_outcome("refresh", failed=True)
    assert not damping.is_retired("refresh")
    damping.note_outcome("refresh", failed=True)
    assert damping.is_retired("refresh")
    assert not damping.is_retired("widen")


@given(st.floats(0.0, 1.0), st.floats(0.1, 1e15), st.floats(0.0, 0.1), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_what_the_purse_pays_keeps_the_cap(share, budget, probe_share, part, reallocations):
    compute = share * budget
    allowed = compute + 0.2 * budget
    probes = part * probe_share * allowed
    seen = look(compute, budget=budget, probes=probes, overhead=probes + reallocations * budget)
    purse = Damping(probe_share).purse(seen)
    cap = 0.15 * compute + 0.03 * budget
    # Even when the probes go on to take all of their own share.
    assert reallocations * budget + purse + probe_share * allowed == pytest.approx(cap, rel=1e-9)


def test_probes_beyond_their_share_come_out_of_the_purse():
    assert Damping(0.0).purse(look(0.5, probes=0.1, overhead=0.1)) == pytest.approx(0.105 - 0.1)
    assert Damping(1.0).purse(look(0.5)) == pytest.approx(0.0)


def test_state_goes_through_json():
    damping, copy = Damping(0.03), Damping(0.03)
    damping.note_action(0.01, look(0.4))
    damping.note_outcome("widen", failed=True)
    copy.load_state_dict(json.loads(json.dumps(damping.state_dict())))
    assert copy.state_dict() == damping.state_dict()
    copy.note_outcome("widen", failed=True)
    assert damping.failures("widen") == 1
