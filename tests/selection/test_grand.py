"""grand: norms against autograd, what is differentiated, the window, cost."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from hf_eff.contracts.cost import Facts
from hf_eff.engines.adapter import LoraShape, temporary_adapter
from hf_eff.engines.facts import model_facts
from hf_eff.engines.scoring import scoring_mode
from hf_eff.engines.warmup import WarmupSettings, warm_up
from hf_eff.errors import BudgetExceededError, DataError, ManifestError, PlanError
from hf_eff.numerics.keyed_random import content_order
from hf_eff.registry import get_method
from hf_eff.testing.selection_scene import chosen_hashes, make_context, pick, pool_facts_of, toy_pool
from hf_eff.testing.tiny import tiny_model

pytest.importorskip("peft")

SPEC = get_method("selection", "grand")
AS_IT_IS = {"warmup_fraction": 0.0, "fraction": 0.5}


def gpt2():
    """A float64 model whose norms and attention compute in float64."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = {"vocab_size": 262, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
        return GPT2LMHeadModel(GPT2Config(**shape)).double().eval()


def head_only(model):
    """Weights of an untied copy of the head, so that its use as an embedding does not count."""
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return [model.lm_head.weight]


PARTS = {
    "lm_head": head_only,
    "last_block": lambda model: list(model.transformer.h[-1].parameters()),
    "full": lambda model: list(model.parameters()),
}


def norms_by_autograd(model, weights, pool, scale=1.0):
    found = []
    for row in pool.rows:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        loss = scale * cross_entropy(model(input_ids=ids[None], use_cache=False).logits[0, :-1], labels[1:])
        gradients = torch.autograd.grad(loss, weights)
        found.append(torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt().item())
    return np.array(found)


@pytest.mark.parametrize("params", sorted(PARTS))
def test_norms_equal_autograd(params):
    picks = pick(SPEC, make_context(SPEC, proxy=None, model=gpt2()), **AS_IT_IS, params=params)
    model = gpt2()
    expected = norms_by_autograd(model, PARTS[params](model), toy_pool())
    assert np.abs(picks.scores / expected - 1).max() < 1e-6
    assert picks.positions.tolist() == np.argsort(-expected)[:12].tolist()


def test_lora_norms_are_the_mean_over_checkpoints_and_adapters():
    options = {"warmup_fraction": 0.25, "warmup_epochs": 2, "warmup_batch_size": 3, "learning_rate": 1e-2, "lora_r": 2}
    picks = pick(SPEC, make_context(SPEC, proxy=None), **options, lora_dropout=0.0, num_adapters=2)
    context, found = make_context(SPEC, proxy=None), []
    for seed in (context.seed, context.seed + 1):
        with scoring_mode(context.model), temporary_adapter(context.model, LoraShape(2, 32), seed) as adapter:
            rows = content_order(context.pool.row_hash, seed)[:6]
            settings = WarmupSettings(epochs=2, batch_size=3, learning_rate=1e-2, dropout=0.0, seed=seed)
            for checkpoint in warm_up(context, adapter, rows, settings):
                adapter.load(checkpoint.weights)
                weights = [factor.weight for factor in adapter.factors.values()]
                found.append(norms_by_autograd(context.model, weights, context.pool))
    assert picks.notes["models"] == 4
    assert np.allclose(picks.scores, np.mean(found, axis=0), rtol=1e-4)
    assert np.ptp(found, axis=0).min() > 1e-4


def test_at_initialisation_the_first_factor_has_no_gradient():
    """Why the score is void there: B is zero, so that only B itself has a gradient."""
    context = make_context(SPEC, proxy=None)
    picks = pick(SPEC, context, warmup_epochs=0, lora_r=2)
    with scoring_mode(context.model), temporary_adapter(context.model, LoraShape(2, 32), context.seed) as adapter:
        second = [factor.weight for name, factor in adapter.factors.items() if ".lora_B." in name]
        first = [factor.weight for name, factor in adapter.factors.items() if ".lora_A." in name]
        assert np.allclose(picks.scores, norms_by_autograd(context.model, second, context.pool), rtol=1e-4)
        assert not norms_by_autograd(context.model, first, context.pool).any()


def test_a_loss_times_c_gives_norms_times_c():
    mean = pick(SPEC, make_context(SPEC, proxy=None), **AS_IT_IS, params="lm_head").scores
    total = pick(SPEC, make_context(SPEC, proxy=None), **AS_IT_IS, params="lm_head", reduction="sum").scores
    assert np.allclose(total, mean * toy_pool().loss_lengths, rtol=1e-5)
    model = gpt2()
    weights = PARTS["full"](model)
    once, thrice = (norms_by_autograd(model, weights, toy_pool(4), scale) for scale in (1.0, 3.0))
    assert np.allclose(thrice, 3 * once)


@pytest.mark.parametrize("params", ["lora", "lm_head", "last_block", "full"])
def test_order_and_batches_do_not_matter(params):
    order = np.random.default_rng(2).permutation(24).tolist()
    plain, shuffled = (
        make_context(SPEC, proxy=None),
        make_context(SPEC, proxy=None, pool=toy_pool(order=order), batch_tokens=64),
    )
    first, second = pick(SPEC, plain, params=params), pick(SPEC, shuffled, params=params)
    assert chosen_hashes(first, plain.pool) == chosen_hashes(second, shuffled.pool)
    # Warm-up batches sum in another order.
    assert np.allclose(first.scores[order], second.scores, rtol=1e-4)


@pytest.mark.parametrize("params", ["lm_head", "full"])
def test_the_model_is_left_as_found(params):
    model = tiny_model(layers=2, width=32).train()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pick(SPEC, make_context(SPEC, proxy=None, model=model), params=params)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model.lm_head.weight.grad, torch.ones_like(model.lm_head.weight))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_no_graph_is_kept_below_a_tied_head():
    context, graphs = make_context(SPEC, proxy=None), []
    norm = context.model.model.norm
    norm.register_forward_hook(lambda module, inputs, output: graphs.append(output.requires_grad))
    pick(SPEC, context, **AS_IT_IS, params="lm_head")
    assert graphs
    assert not any(graphs)


def test_the_hardest_can_be_skipped():
    context = make_context(SPEC, proxy=None)
    whole = pick(SPEC, context, **AS_IT_IS, params="lm_head").scores
    picks = pick(SPEC, context, params="lm_head", warmup_fraction=0.0, fraction=0.25, skip_hardest=0.5)
    assert picks.positions.tolist() == np.argsort(-whole)[12:18].tolist()
    assert picks.notes["skipped"] == 12
    with pytest.raises(DataError, match=r"skip_hardest=0\.5 leaves 12 of 24 rows, and 18 are asked for"):
        pick(SPEC, context, params="lm_head", warmup_fraction=0.0, fraction=0.75, skip_hardest=0.5)


def test_mislabelled_rows_have_the_largest_norms():
    """Random answers under a model that has learned the true ones: what makes the score risky on noise."""
    model, pool = tiny_model(layers=2, width=32), toy_pool(48)
    batch = make_context(SPEC, proxy=None, pool=pool).collate(pool.rows)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(200):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    noisy, rng = toy_pool(48), np.random.default_rng(0)
    for row in range(0, 48, 4):
        values = noisy.rows[row]
        for place, label in enumerate(values["labels"]):
            if label != -100:
                values["labels"][place] = values["input_ids"][place] = int(rng.integers(6, 262))
    picks = pick(
        SPEC,
        make_context(SPEC, proxy=None, pool=noisy, model=model),
        **{**AS_IT_IS, "fraction": 0.25},
        params="lm_head",
    )
    assert np.mean([row % 4 == 0 for row in picks.positions]) >= 0.9


class Tally:
    def __init__(self, limit=10**9):
        self.flops, self.limit = [], limit

    def __call__(self, flops, tokens):
        if len(self.flops) >= self.limit:
            raise BudgetExceededError("enough")
        self.flops.append(flops)


def equal_rows(count=40):
    """Rows of one length, all tokens labelled."""
    pool = toy_pool(count)
    for row in pool.rows:
        row["input_ids"] = (row["input_ids"] * 3)[:24]
        row["labels"] = list(row["input_ids"])
    pool.lengths[:], pool.loss_lengths[:] = 24, 23
    return pool


@pytest.mark.parametrize("params", ["lora", "lm_head", "last_block", "full"])
def test_cost_is_what_is_charged(params):
    # As many key as query heads: the adapter's size is then known exactly.
    model = tiny_model(layers=2, width=32, num_key_value_heads=4, attn_implementation="eager")
    for options in ({"warmup_fraction": 0.0}, {"warmup_fraction": 0.25}):
        tally = Tally()
        context = make_context(SPEC, proxy=None, model=model, pool=equal_rows(), spend=tally)
        facts = Facts(model=model_facts(model), pool=pool_facts_of(context.pool, None))
        context.forward_flops = _forward(model)
        pick(SPEC, context, params=params, **options)
        forecast = SPEC.cost(SPEC.config.from_dict({**SPEC.tiny, "params": params, **options}), facts).flops
        assert forecast == pytest.approx(sum(tally.flops), rel=0.01)


def _forward(model):
    from hf_eff.contracts.memory import BatchShape
    from hf_eff.numerics.flops import forward_flops

    facts = model_facts(model)
    return lambda rows, length: forward_flops(facts, BatchShape(rows, length))


@pytest.mark.parametrize("params", ["lora", "lm_head", "last_block", "full"])
def test_charged_flops_are_near_the_counted_ones(params):
    from torch.utils.flop_counter import FlopCounterMode

    tally = Tally()
    context = make_context(SPEC, proxy=None, spend=tally)
    with FlopCounterMode(display=False) as counter:
        pick(SPEC, context, params=params, warmup_fraction=0.0)
    assert 0.5 < counter.get_total_flops() / sum(tally.flops) < 2


def test_interrupted_anywhere_and_resumed(tmp_path):
    whole = Tally()
    expected = pick(SPEC, make_context(SPEC, proxy=None, spend=whole))
    for limit in range(0, len(whole.flops), 2):
        folder, rest = tmp_path / str(limit), Tally()
        with pytest.raises(BudgetExceededError):
            pick(SPEC, make_context(SPEC, proxy=None, spend=Tally(limit), folder=folder))
        found = pick(SPEC, make_context(SPEC, proxy=None, spend=rest, folder=folder))
        assert np.array_equal(found.scores, expected.scores)
        # A half-finished epoch of two steps is redone, a finished scoring batch never.
        assert len(rest.flops) <= len(whole.flops) - limit + 1
    with pytest.raises(ManifestError, match="another selection: reduction is"):
        pick(SPEC, make_context(SPEC, proxy=None, folder=folder), reduction="sum")


def test_reasons_notes_and_unknown_parts():
    picks = pick(SPEC, make_context(SPEC, proxy=None), params="full", warmup_fraction=0.0)
    best = picks.positions[0]
    assert picks.reasons[0] == f"gradient norm {picks.scores[best]:.3g}"
    assert json.loads(json.dumps(dict(picks.notes)))["params"] == "full"
    model = tiny_model(layers=2, width=32)
    model.model.extra = torch.nn.Conv1d(4, 4, 1)
    with pytest.raises(PlanError, match=r"model\.extra .Conv1d.: known are linear"):
        pick(SPEC, make_context(SPEC, proxy=None, model=model), params="full", warmup_fraction=0.0)
