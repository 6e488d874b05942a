"""embedding: mean cosine to the target, group by group, against a literal reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hf_eff.contracts.cost import Facts
from hf_eff.engines.embeddings import pool_embeddings
from hf_eff.engines.facts import model_facts
from hf_eff.errors import DataError
from hf_eff.registry import get_method
from hf_eff.selection import embedding as module
from hf_eff.selection.embedding import EmbeddingConfig, cost
from hf_eff.testing.selection_scene import make_context, pick, pool_facts_of, pool_of, toy_pool, toy_target, unlabelled

SPEC = get_method("selection", "embedding")


def grouped_target():
    target = toy_target()
    return replace(target, groups=["odd" if i % 2 else "even" for i in range(len(target))])


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def literal(context, pooling, center, reduce):
    pool, goals = (
        pool_embeddings(context, rows, pooling=pooling).astype(np.float64) for rows in (context.pool, context.reference)
    )
    if center:
        mean = pool.mean(axis=0)
        pool, goals = unit(pool - mean), unit(goals - mean)
    names = np.array(context.reference.groups)
    by_group = [[np.mean([row @ goal for goal in goals[names == name]]) for name in sorted(set(names))] for row in pool]
    return getattr(np, reduce)(by_group, axis=1)


@pytest.mark.parametrize("pooling", ["mean", "last", "weighted"])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_scores_are_the_definition(pooling, center, reduce):
    context = make_context(SPEC, proxy=None, reference=grouped_target())
    picks = pick(SPEC, context, pooling=pooling, center=center, group_reduce=reduce)
    expected = literal(context, pooling, center, reduce)
    np.testing.assert_allclose(picks.scores, expected, atol=1e-5)
    assert set(picks.positions) == set(np.argsort(-expected)[:6])


def precision(picks, pool):
    return np.mean([pool.sources[row] == "sum" for row in picks.positions])


def test_planted_task_is_found_and_shuffled_vectors_do_not_find_it(monkeypatch):
    pool, target = toy_pool(400), toy_target(10)
    context = make_context(SPEC, proxy=None, pool=pool, reference=target, batch_tokens=4096)
    assert precision(pick(SPEC, context, fraction=0.1), pool) >= 0.9
    found = module.embeddings
    shuffle = np.random.default_rng(0).permutation(400)

    def misplaced(context, rows, **options):
        vectors = found(context, rows, **options)
        return vectors[shuffle] if len(rows) == 400 else vectors

    monkeypatch.setattr(module, "embeddings", misplaced)
    assert precision(pick(SPEC, context, fraction=0.1), pool) < 0.7


def test_vectors_of_a_column_are_compared_in_place_of_the_models():
    pool, target = toy_pool(6), replace(toy_target(2), groups=None)
    pool.examples = [{"v": vector} for vector in ([1, 0], [0, 2], [3, 3], [-1, 0], [0, -1], [2, 1])]
    target.examples = [{"v": [0, 1]}, {"v": [0, 5]}]
    bills = []
    context = make_context(
        SPEC, proxy=None, pool=pool, reference=target, spend=lambda flops, tokens: bills.append((flops, tokens))
    )
    picks = pick(SPEC, context, embedding_column="v", center=False, fraction=0.5)
    np.testing.assert_allclose(picks.scores, [0, 1, 0.5**0.5, 0, -1, 0.2**0.5], atol=1e-6)
    assert picks.positions.tolist() == [1, 2, 5]
    assert bills == [(2 * 6 * 2, 0.0)]
    assert picks.reasons[0] == "cos 1 to the target"


def test_rows_without_loss_have_no_score():
    pool = toy_pool()
    pool.loss_lengths[[3, 10]] = 0
    picks = pick(SPEC, make_context(SPEC, proxy=None, pool=pool), fraction=1.0)
    assert np.flatnonzero(np.isnan(picks.scores)).tolist() == [3, 10]
    assert sorted(picks.positions) == sorted(set(range(24)) - {3, 10})
    assert picks.notes["num_scored"] == 22


@pytest.mark.parametrize("change", [{"batch_tokens": 1}, {"batch_tokens": 10_000, "extra_padding": 7}])
def test_batches_and_padding_do_not_matter(change):
    plain, other = (pick(SPEC, make_context(SPEC, proxy=None, **options)) for options in ({}, change))
    np.testing.assert_allclose(other.scores, plain.scores, atol=1e-4)
    assert other.positions.tolist() == plain.positions.tolist()


def test_the_order_of_the_rows_does_not_matter_to_a_bit():
    order = np.random.default_rng(3).permutation(24)
    first, second = (
        pick(SPEC, make_context(SPEC, proxy=None, pool=pool)) for pool in (toy_pool(), toy_pool(order=order))
    )
    assert np.array_equal(first.scores[order], second.scores)


def test_predicted_cost_is_what_is_charged():
    rows = [{"input_ids": [5 + i] * 20, "labels": [5 + i] * 20} for i in range(16)]
    pool, bills = pool_of(rows), []
    target = pool_of([{"input_ids": [50 + i] * 10, "labels": [50 + i] * 10} for i in range(4)])
    context = make_context(
        SPEC, proxy=None, pool=pool, reference=target, spend=lambda flops, tokens: bills.append((flops, tokens))
    )
    pick(SPEC, context)
    facts = Facts(model=model_facts(context.model), pool=pool_facts_of(pool, target))
    predicted = cost(EmbeddingConfig(), facts)
    assert sum(flops for flops, _ in bills) == pytest.approx(predicted.flops, rel=1e-9)
    assert sum(tokens for _, tokens in bills) == predicted.tokens == 360
    assert cost(EmbeddingConfig(embedding_column="v"), facts).flops == 2 * 16 * 32


def test_a_missing_target_is_named():
    for reference in (None, unlabelled(toy_target())):
        with pytest.raises(DataError, match="selection='embedding' needs target rows"):
            pick(SPEC, make_context(SPEC, proxy=None, reference=reference))
