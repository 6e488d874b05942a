"""facility_location: near the optimum on real embeddings, one of each group of copies, weights by quality."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from hf_eff.contracts.cost import Facts
from hf_eff.engines.embeddings import pool_embeddings
from hf_eff.engines.facts import model_facts
from hf_eff.errors import DataError, ScoringStoppedError
from hf_eff.registry import get_method
from hf_eff.selection import facility_location as module
from hf_eff.selection.facility_location import FacilityLocationConfig, cost
from hf_eff.testing.selection_scene import make_context, pick, pool_facts_of, pool_of, toy_pool

SPEC = get_method("selection", "facility_location")


def table_of(vectors, kind):
    if kind == "cosine":
        return np.maximum(vectors.astype(np.float64) @ vectors.T, 0)
    distances = ((vectors[:, None].astype(np.float64) - vectors[None]) ** 2).sum(axis=2)
    return distances.max() - distances


def value(table, chosen, weights=1.0):
    return float((table[:, list(chosen)].max(axis=1) * weights).sum())


@pytest.mark.parametrize("kind", ["cosine", "euclidean"])
@pytest.mark.parametrize("k", [1, 3])
def test_value_is_near_the_optimum(kind, k):
    context = make_context(SPEC, proxy=None, pool=toy_pool(12))
    table = table_of(pool_embeddings(context, context.pool), kind)
    picks = pick(SPEC, context, fraction=None, num_examples=k, similarity=kind)
    best = max(value(table, rows) for rows in itertools.combinations(range(12), k))
    assert value(table, picks.positions) >= (1 - 1 / math.e) * best
    assert picks.notes["mean_similarity"] == pytest.approx(value(table, picks.positions) / 12, abs=1e-5)


def naive(table, k, weights=1.0):
    chosen = []
    for _ in range(k):
        rest = [row for row in range(len(table)) if row not in chosen]
        chosen.append(max(rest, key=lambda row: value(table, [*chosen, row], weights)))
    return value(table, chosen, weights)


@pytest.mark.parametrize("kind", ["cosine", "euclidean"])
def test_value_is_that_of_the_naive_greedy(kind):
    context = make_context(SPEC, proxy=None, pool=toy_pool(60))
    table = table_of(pool_embeddings(context, context.pool), kind)
    picks = pick(SPEC, context, similarity=kind)
    assert value(table, picks.positions) == pytest.approx(naive(table, 15), rel=1e-6)


def vectors_pool(vectors):
    rows = [{"input_ids": [5 + i % 200, 5 + i // 200, 7, 9], "labels": [-100, 3, 7, 9]} for i in range(len(vectors))]
    pool = pool_of(rows)
    pool.examples = [{"vector": list(map(float, vector))} for vector in vectors]
    return pool


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kind", ["cosine", "euclidean"])
def test_one_of_each_planted_group(kind, exact, monkeypatch):
    if not exact:
        monkeypatch.setattr(module, "EXACT_BELOW", 10)
    groups = np.random.default_rng(0).permutation(np.repeat(np.arange(15), 6))
    pool = vectors_pool(np.random.default_rng(1).normal(size=(15, 8))[groups])
    context = make_context(SPEC, proxy=None, pool=pool)
    options = {"embedding_column": "vector", "similarity": kind, "neighbours": 20}
    picks = pick(SPEC, context, fraction=None, num_examples=15, **options)
    assert len({groups[row] for row in picks.positions}) == 15
    assert picks.notes["pairs"] == ("all" if exact else "20 nearest")


def test_all_neighbours_choose_what_all_pairs_choose(monkeypatch):
    context = make_context(SPEC, proxy=None, pool=toy_pool(50))
    table = table_of(pool_embeddings(context, context.pool), "cosine")
    dense = pick(SPEC, context)
    monkeypatch.setattr(module, "EXACT_BELOW", 10)
    sparse = pick(SPEC, context, neighbours=49)
    assert value(table, sparse.positions) == pytest.approx(value(table, dense.positions), rel=1e-6)


def test_quality_says_which_rows_are_stood_for():
    vectors = np.repeat(np.eye(3), [6, 5, 4], axis=0)
    pool = vectors_pool(vectors)
    options = {"fraction": None, "num_examples": 1, "embedding_column": "vector"}
    prior = np.where(np.arange(15) < 6, 0.0, np.where(np.arange(15) < 11, np.nan, 5.0))
    context = make_context(SPEC, proxy=None, pool=pool, prior=prior)
    assert pick(SPEC, context, **options).positions[0] < 6
    assert pick(SPEC, context, **options, quality_weight=1.0).positions[0] in range(11, 15)
    heavier = replace(context, prior=np.where(np.arange(15) < 6, np.nan, prior))
    assert pick(SPEC, heavier, **options, quality_weight=1.0).positions[0] in range(11, 15)
    with pytest.raises(DataError, match="quality_weight needs scores of an earlier stage"):
        pick(SPEC, replace(context, prior=None), **options, quality_weight=0.5)


def test_weights_are_ranks_of_the_prior():
    context = make_context(SPEC, proxy=None, prior=np.array([*np.linspace(-3, 9, 22), np.nan, 9.0]))
    table = table_of(pool_embeddings(context, context.pool), "cosine")
    ranks = np.array([*(np.arange(1, 22) / 23), 1.0, 0.0, 1.0])
    weights = 0.3 + 0.7 * ranks
    picks = pick(SPEC, context, quality_weight=0.7)
    assert value(table, picks.positions, weights) == pytest.approx(naive(table, 6, weights), rel=1e-6)


@pytest.mark.parametrize("change", [{"batch_tokens": 1}, {"batch_tokens": 10_000, "extra_padding": 7}, {"seed": 99}])
def test_batches_padding_and_seed_do_not_matter(change, monkeypatch):
    monkeypatch.setattr(module, "EXACT_BELOW", 10)
    plain = pick(SPEC, make_context(SPEC, proxy=None, pool=toy_pool(40)), neighbours=5)
    other = pick(SPEC, make_context(SPEC, proxy=None, pool=toy_pool(40), **change), neighbours=5)
    assert other.positions.tolist() == plain.positions.tolist()


@pytest.mark.parametrize("below", [10, 20_000])
def test_the_order_of_the_rows_does_not_matter(below, monkeypatch):
    monkeypatch.setattr(module, "EXACT_BELOW", below)
    order = np.random.default_rng(3).permutation(40)
    first, second = (
        pick(SPEC, make_context(SPEC, proxy=None, pool=pool), neighbours=5)
        for pool in (toy_pool(40), toy_pool(40, order))
    )
    assert order[second.positions].tolist() == first.positions.tolist()


def test_predicted_cost_is_what_is_charged():
    rows = [{"input_ids": [5 + i] * 20, "labels": [5 + i] * 20} for i in range(16)]
    pool, bills = pool_of(rows), []
    context = make_context(SPEC, proxy=None, pool=pool, spend=lambda flops, tokens: bills.append((flops, tokens)))
    pick(SPEC, context)
    facts = Facts(model=model_facts(context.model), pool=pool_facts_of(pool, None))
    predicted = cost(FacilityLocationConfig(), facts)
    assert sum(flops for flops, _ in bills) == pytest.approx(predicted.flops, rel=1e-9)
    assert sum(tokens for _, tokens in bills) == predicted.tokens
    assert cost(FacilityLocationConfig(embedding_column="v"), facts).flops == 2 * 16 * 16 * 32


def test_comparing_can_be_stopped():
    pool = vectors_pool(np.random.default_rng(0).normal(size=(20, 3)))
    with pytest.raises(ScoringStoppedError, match="while rows were compared"):
        pick(SPEC, make_context(SPEC, proxy=None, pool=pool, stop_requested=lambda: True), embedding_column="vector")
