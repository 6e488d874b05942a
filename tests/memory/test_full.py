"""The baseline changes nothing, and its forecast fits plain AdamW."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_eff.contracts.cost import Facts, PoolFacts, RunFacts
from hf_eff.contracts.memory import MemoryMethod
from hf_eff.engines.facts import model_facts
from hf_eff.memory.full import SPEC, Full, FullConfig, cost
from hf_eff.testing.tiny import tiny_model


def facts_of(model):
    return Facts(
        model=model_facts(model),
        pool=PoolFacts(num_rows=100, mean_tokens=16, max_tokens=16),
        run=RunFacts(batch_size=2, length=16, accumulation=3),
    )


def test_no_hook_of_the_contract_is_taken():
    hooks = [name for name in vars(MemoryMethod) if not name.startswith("_")]
    assert len(hooks) >= 10
    assert all(getattr(Full, name) is getattr(MemoryMethod, name) for name in hooks)


@pytest.mark.parametrize("frozen", [False, True])
def test_cost_equals_weights_gradients_state_and_counted_flops(frozen):
    model = tiny_model(attn_implementation="eager")
    if frozen:
        model.model.embed_tokens.requires_grad_(False)
    predicted = cost(FullConfig(), facts_of(model))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert predicted.bytes["weights"] == sum(parameter.nbytes for parameter in model.parameters()) + buffers
    assert predicted.bytes["gradients"] == 4 * trained
    counters = 4 * sum(parameter.requires_grad for parameter in model.parameters())  # AdamW's step, one a tensor
    assert predicted.bytes["optimizer"] == 8 * trained + counters
    with FlopCounterMode(display=False) as counter:
        for _ in range(3):
            ids = torch.arange(32).view(2, 16)
            model(input_ids=ids, labels=ids).loss.backward()
    assert predicted.step_flops == counter.get_total_flops()


def test_spec_is_consistent():
    assert SPEC.traits.baseline
    assert SPEC.paper is None
    assert SPEC.build(SPEC.config()).config == FullConfig()
