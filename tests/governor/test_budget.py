import pytest

from hf_eff.contracts.budget import Budget as Limits
from hf_eff.contracts.governor import Governor, Telemetry
from hf_eff.governor.budget import SPEC, Budget, BudgetConfig, cost
from hf_eff.hardware.ledger import Ledger


def test_has_no_rule_besides_the_gate():
    policy = SPEC.build(BudgetConfig())
    looks = [Telemetry(step, 9, {"flops": step}, {"flops": 9.0}, float(step), 9.0) for step in range(1, 10)]
    assert {policy.observe(look).action for look in looks} == {"continue"}
    assert not any(policy.next_probe(look, 0.0) for look in looks)
    assert Budget.next_probe is Governor.next_probe
    assert Budget.observe is Governor.observe


@pytest.mark.parametrize(("limit", "steps"), [(10.0, 3), (9.0, 3), (8.9, 2), (2.9, 0)])
def test_the_gate_uses_all_of_the_budget_and_no_more(limit, steps):
    """What the trainer does before each step: start it only when it fits."""
    ledger, done = Ledger(Limits({"flops": limit})), 0
    while done < 100 and ledger.need_fits({"flops": 3.0}) is None:
        ledger.charge("train", flops=3.0, steps=1)
        done += 1
    assert done == steps
    assert ledger.spent()["flops"] <= limit


def test_costs_nothing():
    assert cost(BudgetConfig(), None).flops == 0.0
