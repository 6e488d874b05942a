"""perplexity: equals the definition row by row, and bands cut the distribution exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_eff.contracts.cost import Facts
from hf_eff.contracts.memory import BatchShape
from hf_eff.engines.facts import model_facts
from hf_eff.errors import BudgetExceededError, DataError
from hf_eff.numerics.flops import forward_flops
from hf_eff.registry import get_method
from hf_eff.selection.perplexity import PerplexityConfig, cost
from hf_eff.testing.selection_scene import chosen_hashes, make_context, pick, pool_facts_of, pool_of, toy_pool
from hf_eff.testing.tiny import tiny_model

SPEC = get_method("selection", "perplexity")


def sharp_model(seed=0, **changes):
    """Random model whose rows differ in perplexity by more than rounding."""
    model = tiny_model(layers=2, width=32, seed=seed, attn_implementation="eager", **changes)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def literal(model, row, labels):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
    nll = [-logits[t].log_softmax(0)[y] for t, y in enumerate(labels[1:]) if y != -100]
    return float(torch.stack(nll).mean().exp())


@pytest.mark.parametrize("tokens", ["loss", "all"])
def test_scores_are_the_definition_row_by_row(tokens):
    model, pool = sharp_model(), toy_pool(24)
    picks = pick(SPEC, make_context(SPEC, proxy=None, pool=pool, model=model), tokens=tokens)
    expected = [literal(model, row, row["labels"] if tokens == "loss" else row["input_ids"]) for row in pool.rows]
    np.testing.assert_allclose(picks.scores, expected, rtol=1e-4)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    model = tiny_model(layers=2, width=32).double()
    torch.nn.init.zeros_(model.lm_head.weight)
    picks = pick(SPEC, make_context(SPEC, proxy=None, model=model))
    np.testing.assert_allclose(picks.scores, 262.0, rtol=1e-14)


@pytest.mark.parametrize("batch_tokens", [1, 64, 10_000])
def test_the_batch_size_and_padding_do_not_matter(batch_tokens):
    model = sharp_model()
    alone = pick(SPEC, make_context(SPEC, proxy=None, model=model, batch_tokens=1))
    other = pick(SPEC, make_context(SPEC, proxy=None, model=model, batch_tokens=batch_tokens, extra_padding=7))
    np.testing.assert_allclose(other.scores, alone.scores, rtol=1e-4)
    assert other.positions.tolist() == alone.positions.tolist()


def test_the_order_of_the_rows_does_not_matter_to_the_last_bit():
    plain, order = toy_pool(24), np.random.default_rng(3).permutation(24)
    turned = toy_pool(24, order)
    first = pick(SPEC, make_context(SPEC, proxy=None, pool=plain, model=sharp_model()))
    second = pick(SPEC, make_context(SPEC, proxy=None, pool=turned, model=sharp_model()))
    assert np.array_equal(first.scores[order], second.scores)
    assert chosen_hashes(first, plain) == chosen_hashes(second, turned)


def test_dropout_plays_no_part():
    plain, dropping = sharp_model(), sharp_model(attention_dropout=0.5)
    dropping.train()
    scores = [pick(SPEC, make_context(SPEC, proxy=None, model=model)).scores for model in (plain, dropping)]
    assert np.array_equal(*scores)
    assert dropping.training


def spearman(a, b):
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])


def test_half_precision_ranks_alike():
    exact = pick(SPEC, make_context(SPEC, proxy=None, model=sharp_model())).scores
    half = pick(SPEC, make_context(SPEC, proxy=None, model=sharp_model().to(torch.bfloat16))).scores
    assert spearman(exact, half) >= 0.99


def bands(count, **size):
    pool = toy_pool(count)
    return {
        band: pick(
            SPEC,
            make_context(SPEC, proxy=None, pool=pool, model=sharp_model()),
            **{"fraction": None, **size},
            band=band,
        )
        for band in ("low", "mid", "high")
    }


@pytest.mark.parametrize("count", [9, 12, 24])
def test_thirds_partition_the_pool_exactly(count):
    found = bands(count, fraction=1 / 3)
    kept = np.concatenate([found[band].positions for band in ("low", "mid", "high")])
    assert sorted(kept.tolist()) == list(range(count))
    scores = {band: found[band].scores[found[band].positions] for band in found}
    assert scores["low"].max() <= scores["mid"].min()
    assert scores["mid"].max() <= scores["high"].min()


@pytest.mark.parametrize("quota", [0.25, 0.5, 0.75])
def test_bands_are_those_of_the_empirical_distribution(quota):
    found = bands(24, fraction=quota)
    scores = found["low"].scores
    u = (np.argsort(np.argsort(scores)) + 0.5) / 24  # mid-point of each row's step of the distribution
    members = {"low": u < quota, "mid": np.abs(u - 0.5) <= quota / 2, "high": u > 1 - quota}
    for band, inside in members.items():
        assert sorted(found[band].positions.tolist()) == np.flatnonzero(inside).tolist(), band
        assert found[band].higher_is_better == (band == "high")


def test_the_core_of_a_band_comes_first():
    found = bands(24, fraction=0.5)
    scores = found["low"].scores
    assert found["low"].positions[0] == scores.argmin()
    assert found["high"].positions[0] == scores.argmax()
    assert found["mid"].positions[0] in np.argsort(scores)[11:13]


def test_rows_without_a_finite_score_are_left_out():
    model, pool = sharp_model(tie_word_embeddings=False), toy_pool(12)
    tokens = [set(row["input_ids"]) for row in pool.rows]
    token = next(t for t in sorted(set.union(*tokens)) if 2 <= sum(t in row for row in tokens) <= 4)
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = float("nan")
    broken = [i for i, row in enumerate(tokens) if token in row]
    picks = pick(SPEC, make_context(SPEC, proxy=None, pool=pool, model=model), fraction=1.0)
    assert np.flatnonzero(np.isnan(picks.scores)).tolist() == broken
    assert sorted(picks.positions.tolist()) == sorted(set(range(12)) - set(broken))


def test_a_broken_model_is_named():
    model = sharp_model()
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    with pytest.raises(DataError, match="no finite loss for any row of the pool"):
        pick(SPEC, make_context(SPEC, proxy=None, model=model))


def test_prompts_are_read_by_decoders_only():
    with pytest.raises(DataError, match="with other models use tokens='loss'"):
        pick(SPEC, make_context(SPEC, proxy=None, is_causal_lm=False), tokens="all")


def test_an_impossible_size_costs_nothing():
    def spend(flops, tokens):
        raise BudgetExceededError("computed")

    with pytest.raises(DataError, match="num_examples=99 is more than the 24 valid rows"):
        pick(SPEC, make_context(SPEC, proxy=None, spend=spend), fraction=None, num_examples=99)


def test_the_predicted_cost_is_what_is_spent():
    model = sharp_model()
    rows = [{"input_ids": [5 + i] * 20, "labels": [5 + i] * 20} for i in range(16)]
    pool, bills = pool_of(rows), []
    context = make_context(
        SPEC, proxy=None, pool=pool, model=model, spend=lambda flops, tokens: bills.append((flops, tokens))
    )
    pick(SPEC, context)
    facts = Facts(model=model_facts(model), pool=pool_facts_of(pool, None))
    predicted = cost(PerplexityConfig(), facts)
    assert sum(flops for flops, _ in bills) == pytest.approx(predicted.flops, rel=1e-12)
    assert sum(tokens for _, tokens in bills) == predicted.tokens == 320
    assert predicted.flops == pytest.approx(16 * forward_flops(facts.model, BatchShape(1, 20)), rel=1e-12)
