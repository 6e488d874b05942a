"""Optimizers that update in the backward are refused where they would silently do something else."""

import pytest

from hf_eff.contracts.cost import RunFacts
from hf_eff.numerics.optim_rules import optim_problem, optim_warning, updates_in_backward

IN_BACKWARD = ["lomo", "adalomo", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "apollo_adamw_layerwise"]
PLAIN = ["adamw_torch", "galore_adamw", "apollo_adamw", "adafactor", "sgd"]


@pytest.mark.parametrize("optim", IN_BACKWARD)
def test_in_the_backward_there_is_no_accumulation_no_clipping_and_no_second_process(optim):
    assert updates_in_backward(optim)
    assert "gradient_accumulation_steps=4" in optim_problem(RunFacts(optim=optim, accumulation=4))
    assert "drift apart" in optim_problem(RunFacts(optim=optim), "ddp")
    assert "drift apart" in optim_problem(RunFacts(optim=optim), "fsdp2")
    assert "max_grad_norm=0.5" in optim_warning(RunFacts(optim=optim, max_grad_norm=0.5))
    assert optim_problem(RunFacts(optim=optim)) is None
    assert optim_warning(RunFacts(optim=optim, max_grad_norm=0.0)) is None


@pytest.mark.parametrize("optim", PLAIN)
def test_other_optimizers_may_accumulate_clip_and_average(optim):
    run = RunFacts(optim=optim, accumulation=4)
    assert not updates_in_backward(optim)
    assert optim_problem(run) is None
    assert optim_problem(run, "ddp") is None
    assert optim_warning(run) is None


@pytest.mark.parametrize("backend", ["fsdp2", "fsdp1", "deepspeed"])
def test_projections_need_whole_matrices(backend):
    assert backend in optim_problem(RunFacts(optim="galore_adamw"), backend)
    assert backend in optim_problem(RunFacts(optim="apollo_adamw"), backend)
    assert optim_problem(RunFacts(optim="adamw_torch"), backend) is None


def test_an_optimizer_that_was_passed_in_makes_the_name_irrelevant():
    run = RunFacts(optim="lomo", accumulation=4, custom_optimizer=True)
    assert optim_problem(run, "ddp") is None
    assert optim_warning(run) is None
