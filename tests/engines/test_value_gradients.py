"""The length is that of the gradient of a LoRA that is really attached, and the backward stops at the last layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_eff.contracts.memory import BatchShape
from hf_eff.engines.facts import model_facts
from hf_eff.engines.value_gradients import ValueFactor, value_gradient_norms, value_projection
from hf_eff.errors import BudgetExceededError, ManifestError, PlanError
from hf_eff.registry import get_method
from hf_eff.testing.selection_scene import make_context, pool_of, toy_pool
from hf_eff.testing.tiny import tiny_model

peft = pytest.importorskip("peft")
SPEC = get_method("selection", "perplexity")
FACTOR = ValueFactor(rank=4, alpha=16, draws=3, seed=5)


def context(**changes):
    return make_context(SPEC, **changes)


def literal(row, factor):
    """Mean over the draws of ||d loss / d lora_B|| of the last value projection of a PEFT model in float64."""
    lengths = []
    for first in factor.firsts(32, torch.device("cpu")):
        model = tiny_model(layers=2, width=32, attn_implementation="eager").double()
        config = peft.LoraConfig(r=factor.rank, lora_alpha=factor.alpha, target_modules=["v_proj"])
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=False).eval()
        layer = model.base_model.model.model.layers[-1].self_attn.v_proj
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(first)
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        loss = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], labels[1:])
        lengths.append(torch.autograd.grad(loss, layer.lora_B["default"].weight)[0].norm())
    return float(torch.stack(lengths).mean())


def test_lengths_are_those_of_an_attached_adapter():
    scene = context(pool=toy_pool(8))
    found = value_gradient_norms(scene, scene.pool, FACTOR)
    np.testing.assert_allclose(found, [literal(row, FACTOR) for row in scene.pool.rows], rtol=2e-4)


@pytest.mark.parametrize("changes", [{"batch_tokens": 1}, {"extra_padding": 9}])
def test_batches_and_padding_do_not_matter(changes):
    plain, other = context(), context(**changes)
    np.testing.assert_allclose(
        value_gradient_norms(plain, plain.pool, FACTOR), value_gradient_norms(other, other.pool, FACTOR), rtol=1e-4
    )


def test_the_flops_charged_are_those_counted():
    pool, bills = pool_of([{"input_ids": list(range(5, 45)), "labels": list(range(5, 45))}] * 4), []
    scene = context(pool=pool, spend=lambda flops, tokens: bills.append(flops))
    with FlopCounterMode(display=False) as counter:
        value_gradient_norms(scene, pool, FACTOR)
    assert sum(bills) == FACTOR.flops(model_facts(scene.model), BatchShape(4, 40))
    assert sum(bills) == pytest.approx(counter.get_total_flops(), rel=0.06)


def test_interrupted_and_resumed_is_bit_identical(tmp_path):
    expected = value_gradient_norms(context(), toy_pool(), FACTOR)
    for limit in (0, 1, 2):
        left, folder = [limit], tmp_path / str(limit)

        def spend(flops, tokens, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise BudgetExceededError("enough")

        with pytest.raises(BudgetExceededError):
            value_gradient_norms(context(spend=spend, folder=folder), toy_pool(), FACTOR)
        assert np.array_equal(value_gradient_norms(context(folder=folder), toy_pool(), FACTOR), expected)
    with pytest.raises(ManifestError, match="another selection"):
        value_gradient_norms(context(folder=tmp_path / "0"), toy_pool(), ValueFactor(rank=2))


def test_a_models_own_adapter_and_flags_stay():
    model = peft.get_peft_model(tiny_model(layers=2, width=32), peft.LoraConfig(r=2, target_modules=["v_proj"]))
    flags = [parameter.requires_grad for parameter in model.parameters()]
    found = value_gradient_norms(context(model=model), toy_pool(4), FACTOR)
    assert np.isfinite(found).all()
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_fused_projections_and_models_without_one():
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=262, n_embd=32, n_layer=2, n_head=2, n_positions=64))
    assert value_projection(gpt2) is gpt2.transformer.h[-1].attn.c_attn
    assert np.isfinite(value_gradient_norms(context(model=gpt2), toy_pool(4), FACTOR)).all()
    with pytest.raises(PlanError, match="no value projection"):
        value_projection(torch.nn.Sequential(torch.nn.Linear(2, 2)))
