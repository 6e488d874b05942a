"""Limits: reading them, combining them, and the rule that keeps them."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_eff.contracts.budget import DETERMINISTIC, Budget
from hf_eff.errors import OptionError
from hf_eff.units import CURRENCIES

AMOUNTS = st.floats(1e-3, 1e15)
LIMITS = st.dictionaries(st.sampled_from(CURRENCIES), AMOUNTS)


def test_reads_several_limits():
    assert Budget.parse("2h, 3e15flop,22GiB").limits == {"seconds": 7200.0, "flops": 3e15, "bytes": 22 * 2.0**30}


@pytest.mark.parametrize("nothing", [None, "", {}])
def test_nothing_is_unlimited(nothing):
    budget = Budget.parse(nothing)
    assert not budget
    assert budget.first_passed({}, {"flops": 1e30}) is None


def test_the_lower_of_two_limits_binds():
    assert Budget.parse("2h, 30min").limits == {"seconds": 1800.0}
    assert Budget.parse("30min, 2h").limits == {"seconds": 1800.0}


def test_a_budget_and_a_mapping_are_taken_as_they_are():
    budget = Budget.parse("2h")
    assert Budget.parse(budget) is budget
    assert Budget.parse({"flops": 2.0}).limits == {"flops": 2.0}


@pytest.mark.parametrize("text", [",", " , ", "2h;3h", "2h, much"])
def test_refuses_text(text):
    with pytest.raises(OptionError, match="budget"):
        Budget.parse(text)


@pytest.mark.parametrize("limits", [{"euros": 3.0}, {"flops": 0.0}, {"flops": -1.0}, {"flops": float("nan")}])
def test_refuses_limits(limits):
    with pytest.raises(OptionError, match="budget"):
        Budget(limits)


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Budget.parse("2h").limits = {}


def test_deterministic_currencies_exist():
    assert set(DETERMINISTIC) <= set(CURRENCIES)


@given(LIMITS, LIMITS, LIMITS)
def test_first_passed_agrees_with_arithmetic(limits, spent, need):
    budget = Budget(limits)
    passed = [
        currency
        for currency, limit in limits.items()
        if (
            max(spent.get(currency, 0.0), need.get(currency, 0.0))
            if currency == "bytes"
            else spent.get(currency, 0.0) + need.get(currency, 0.0)
        )
        > limit
    ]
    assert budget.first_passed(spent, need) == (passed[0] if passed else None)


def test_spending_exactly_the_limit_is_allowed():
    budget = Budget({"tokens": 100.0})
    assert budget.first_passed({"tokens": 60.0}, {"tokens": 40.0}) is None
    assert budget.first_passed({"tokens": 60.0}, {"tokens": 41.0}) == "tokens"


def test_memory_does_not_add_up():
    budget = Budget({"bytes": 100.0})
    assert budget.first_passed({"bytes": 90.0}, {"bytes": 90.0}) is None
    assert budget.first_passed({"bytes": 90.0}, {"bytes": 101.0}) == "bytes"


@given(LIMITS, LIMITS)
def test_share_is_that_of_the_scarcest(limits, spent):
    shares = [min(1.0, spent.get(name, 0.0) / limit) for name, limit in limits.items() if name != "bytes"]
    assert Budget(limits).share(spent) == pytest.approx(max(shares, default=0.0))


@given(LIMITS.filter(bool))
def test_prints_every_limit(limits):
    assert len(str(Budget(limits)).split(", ")) == len(limits)


@given(LIMITS, LIMITS)
def test_the_binding_limit_has_the_largest_share(limits, spent):
    budget = Budget(limits)
    shares = {name: spent.get(name, 0.0) / limit for name, limit in limits.items()}
    assert budget.shares(spent) == {name: shares[name] for name in limits if name in spent}
    additive = {name: share for name, share in shares.items() if name != "bytes"}
    binding = budget.binding(spent)
    assert (binding is None) == (not additive)
    if binding is not None:
        assert additive[binding] == max(additive.values())
        assert min(1.0, additive[binding]) == budget.share(spent)


def test_energy_and_money_are_read_together():
    budget = Budget.parse("3e6J, 0.5kWh, 4usd")
    assert budget.limits == {"kwh": 0.5, "usd": 4.0}  # 3e6 J are 0.83 kWh: the lower one binds
    assert budget.binding({"kwh": 0.25, "usd": 3.0}) == "usd"
