"""4-bit scorers: scored like any model, left as found, and never cut off from gradients without a word."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from hf_eff import BudgetedTrainer, BudgetedTrainingArguments
from hf_eff.engines.packed_weights import never_packed, refuse_packed
from hf_eff.errors import PlanError
from hf_eff.numerics.agreement import spearman
from hf_eff.registry import get_method, list_methods
from hf_eff.testing.selection_scene import make_context, pick, toy_pool
from hf_eff.testing.tiny import collator, tiny_model, tiny_pool, tokenised

bitsandbytes = pytest.importorskip("bitsandbytes")
SCORERS = [spec for name in list_methods("selection") if (spec := get_method("selection", name)).traits.needs_model]


def quantised():
    """A toy model whose layers hold 4-bit weights, and the exact model it was made of."""
    exact = tiny_model(layers=2, width=64, attn_implementation="eager")
    model = copy.deepcopy(exact)
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, old in list(parent.named_children()):
                if isinstance(old, torch.nn.Linear):
                    new = bitsandbytes.nn.Linear4bit(
                        old.in_features, old.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
                    )
                    new.weight = bitsandbytes.nn.Params4bit(
                        old.weight.detach(), requires_grad=False, quant_type="nf4"
                    ).to("cpu")
                    setattr(parent, name, new)
    return model, exact


def inputs():
    ids = torch.arange(20).view(2, 10)
    return {"input_ids": ids, "labels": ids}


def packs():
    """Whether this machine's bitsandbytes repacks weights at all."""
    model, _ = quantised()
    return any(getattr(module, "support_avx512bf16_for_cpu", False) for module in model.modules())


needs_packing = pytest.mark.skipif(not packs(), reason="bitsandbytes repacks weights with AVX-512 bf16 only")


@pytest.mark.parametrize("spec", SCORERS, ids=lambda spec: spec.name)
def test_every_selector_scores_with_a_quantised_model(spec):
    model, exact = quantised()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    context = make_context(spec, proxy=None, model=model, pool=toy_pool(40))
    picks = pick(spec, context)
    assert len(picks.positions) > 0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    refuse_packed(model)
    if spec.name == "perplexity":
        whole = pick(spec, make_context(spec, proxy=None, model=exact, pool=toy_pool(40)))
        assert spearman(picks.scores, whole.scores) > 0.8


@needs_packing
def test_gradients_after_scoring_are_those_before_it():
    spec, less = get_method("selection", "perplexity"), get_method("selection", "less")
    fresh, used = quantised()[0], quantised()[0]
    pick(spec, make_context(spec, proxy=None, model=used))
    scores = [pick(less, make_context(less, proxy=None, model=model)).scores for model in (fresh, used)]
    np.testing.assert_array_equal(*scores)


@needs_packing
def test_a_model_cut_off_from_gradients_is_refused(tmp_path):
    model, _ = quantised()
    with torch.no_grad():
        model.eval()(**inputs())
    less = get_method("selection", "less")
    with pytest.raises(PlanError, match="gradients no longer pass through it; load the model again"):
        pick(less, make_context(less, proxy=None, model=model))
    args = BudgetedTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=1, budget="1Gtok", memory="lora"
    )
    trainer = BudgetedTrainer(model=model, args=args, train_dataset=tokenised(tiny_pool(8)), data_collator=collator())
    with pytest.raises(PlanError, match="repacked the 4-bit weight of"):
        trainer.train()


@needs_packing
def test_inside_no_forward_repacks():
    model, _ = quantised()
    with never_packed(model), torch.no_grad():
        model.eval()(**inputs())
    refuse_packed(model)
    with torch.no_grad():
        model(**inputs())
    with pytest.raises(PlanError):
        refuse_packed(model)
