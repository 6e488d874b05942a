"""Interrupted and resumed equals uninterrupted, bit for bit: every registered method, without exception."""

import pytest

from hf_eff.contracts.spec import KINDS
from hf_eff.registry import get_method, list_methods
from hf_eff.testing.trial import Trial

SPECS = [get_method(kind, name) for kind in KINDS for name in list_methods(kind)]
GRID = [
    pytest.param(spec, trainer, accumulation, id=f"{spec.kind}={spec.name}-{trainer}-accumulate{accumulation}")
    for spec in SPECS
    for trainer in ("trainer", "sft")
    for accumulation in (1, 2)
]


@pytest.mark.parametrize(("spec", "trainer", "accumulation"), GRID)
def test_resumed_equals_uninterrupted(spec, trainer, accumulation, tmp_path):
    if accumulation > 1 and not spec.traits.grad_accum:
        pytest.skip("refused by the plan")
    trial = Trial(spec, tmp_path, trainer, accumulation)
    whole = trial.whole()
    assert whole.steps == trial.epoch_steps + 2
    assert whole.spent["flops"] > 0
    middle, boundary = 1, trial.epoch_steps
    assert middle < boundary
    assert {step: trial.interrupted(step).differences(whole) for step in (middle, boundary)} == {middle: [], boundary: []}
