"""The verdict on paying back, against the rule written out."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_eff.numerics.payback import PayBack

FLOPS = st.floats(1.0, 1e18)


@given(FLOPS, FLOPS, st.floats(1.001, 50.0), st.integers(1, 10_000))
def test_the_verdict_is_the_inequality(selection, training, speedup, uses):
    left, right = training * (speedup - 1.0), selection / uses
    if math.isclose(left, right, rel_tol=1e-9):
        return
    assert PayBack(selection, training, speedup).pays(uses) is (left > right)


def test_the_verdict_flips_at_the_break_even():
    payback = PayBack(selection_flops=10.0, training_flops=4.0, speedup=1.5)
    assert payback.break_even_uses == 5.0
    assert not payback.pays(5)
    assert payback.pays(5.0001)
    assert "pays after 6 uses" in str(payback)
    assert "needs 3.5x" in str(payback)
    assert PayBack(1.0, 4.0, 1.2501).pays()
    assert not PayBack(1.0, 4.0, 1.2499).pays()


def test_what_costs_nothing_pays_and_what_teaches_nothing_never_does():
    assert PayBack(0.0, 0.0, 1.0).pays()
    assert str(PayBack(0.0, 5.0, 1.5)) == "selection costs no FLOPs."
    never = PayBack(1.0, 5.0, 1.0)
    assert math.isinf(never.break_even_uses)
    assert "never pays" in str(never)
    assert math.isinf(PayBack(1.0, 0.0, 2.0).needed_speedup)


@pytest.mark.parametrize("speedup", [1.2, 3.0])
def test_at_the_needed_speedup_the_first_use_breaks_even(speedup):
    training = 7.0
    payback = PayBack(training * (speedup - 1.0), training, speedup)
    assert payback.needed_speedup == pytest.approx(speedup)
    assert payback.break_even_uses == pytest.approx(1.0)
