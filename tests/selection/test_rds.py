"""rds: cosines of weighted means, and turns taken as a literal loop takes them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_eff.contracts.cost import Facts
from hf_eff.engines.embeddings import pool_embeddings
from hf_eff.engines.facts import model_facts
from hf_eff.errors import DataError, ScoringStoppedError
from hf_eff.registry import get_method
from hf_eff.selection import rds as module
from hf_eff.selection.rds import RdsConfig, cost, take_turns
from hf_eff.testing.selection_scene import make_context, pick, pool_facts_of, pool_of, toy_pool, toy_target, unlabelled

SPEC = get_method("selection", "rds")


def grouped_target():
    target = toy_target()
    return replace(target, groups=["b" if i % 3 else "a" for i in range(len(target))])


def literal_turns(table, count, lose_turns):
    """[askers, rows] similarities; every asker pops its best row, the definition word for word."""
    queues = [sorted(range(table.shape[1]), key=lambda row: (-line[row], row)) for line in table]
    picked = []
    while True:
        for queue in queues:
            while queue:
                row = queue.pop(0)
                if row not in picked:
                    picked.append(row)
                    break
                if lose_turns:
                    break
            if len(picked) == count:
                return picked


@pytest.mark.parametrize("lose_turns", [False, True])
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), askers=st.integers(1, 6), rows=st.integers(1, 12), levels=st.integers(1, 30))
def test_turns_are_the_literal_loop(lose_turns, seed, askers, rows, levels):
    random = np.random.default_rng(seed)
    table = random.integers(levels, size=(askers, rows)).astype(float)
    for count in {1, rows // 2 + 1, rows}:
        lists = [np.argsort(-line, kind="stable")[:count] for line in table]
        picked, _ = take_turns(lists, count, lose_turns=lose_turns)
        assert picked.tolist() == literal_turns(table, count, lose_turns)


def similarities(context):
    pool, goals = (
        pool_embeddings(context, rows, pooling="weighted").astype(np.float64)
        for rows in (context.pool, context.reference)
    )
    return goals @ pool.T


@pytest.mark.parametrize("variant", ["fixed", "official"])
@pytest.mark.parametrize("turns", ["row", "group"])
def test_the_choice_is_the_definition(variant, turns):
    context = make_context(SPEC, proxy=None, pool=toy_pool(60), reference=grouped_target())
    table = similarities(context)
    picks = pick(SPEC, context, variant=variant, turns=turns, fraction=0.3)
    np.testing.assert_allclose(picks.scores, table.max(axis=0), atol=1e-5)
    names = np.array(context.reference.groups)
    asking = np.argsort(context.reference.row_hash)
    lines = table[asking] if turns == "row" else np.stack([table[names == name].max(axis=0) for name in ("a", "b")])
    assert picks.positions.tolist() == literal_turns(lines, 18, variant == "official")
    assert (picks.notes["variant"], picks.notes["turns"]) == (variant, turns)


def test_groups_take_turns_where_there_are_several():
    assert pick(SPEC, make_context(SPEC, proxy=None, reference=grouped_target())).notes["turns"] == "group"
    assert pick(SPEC, make_context(SPEC, proxy=None)).notes["turns"] == "row"
    assert (
        pick(SPEC, make_context(SPEC, proxy=None, reference=replace(toy_target(), groups=None))).notes["turns"] == "row"
    )


def test_every_asker_gets_its_share():
    context = make_context(SPEC, proxy=None, pool=toy_pool(60), reference=grouped_target())
    reasons = pick(SPEC, context, fraction=None, num_examples=20).reasons
    assert sum("picked for a" in reason for reason in reasons) == 10
    assert sum("picked for b" in reason for reason in reasons) == 10


def precision(picks, pool):
    return np.mean([pool.sources[row] == "sum" for row in picks.positions])


def test_planted_task_is_found_and_shuffled_vectors_do_not_find_it(monkeypatch):
    pool, target = toy_pool(400), toy_target(10)
    context = make_context(SPEC, proxy=None, pool=pool, reference=target, batch_tokens=4096)
    assert precision(pick(SPEC, context, fraction=0.1), pool) >= 0.9
    found = module.pool_embeddings
    shuffle = np.random.default_rng(0).permutation(400)

    def misplaced(context, rows, **options):
        vectors = found(context, rows, **options)
        return vectors[shuffle] if len(rows) == 400 else vectors

    monkeypatch.setattr(module, "pool_embeddings", misplaced)
    assert precision(pick(SPEC, context, fraction=0.1), pool) < 0.7


def test_a_token_limit_takes_a_beginning_of_the_same_order():
    pool = toy_pool(40)
    whole = pick(SPEC, make_context(SPEC, proxy=None, pool=pool), fraction=1.0).positions
    picks = pick(SPEC, make_context(SPEC, proxy=None, pool=pool), fraction=None, num_tokens=200)
    used = np.cumsum(pool.lengths[whole])
    assert picks.positions.tolist() == whole[: np.searchsorted(used, 200, side="right")].tolist()


@pytest.mark.parametrize("change", [{"batch_tokens": 1}, {"batch_tokens": 10_000, "extra_padding": 7}])
def test_batches_and_padding_do_not_matter(change):
    plain, other = (pick(SPEC, make_context(SPEC, proxy=None, **options)) for options in ({}, change))
    np.testing.assert_allclose(other.scores, plain.scores, atol=1e-5)
    assert other.positions.tolist() == plain.positions.tolist()


def test_the_order_of_pool_and_target_does_not_matter():
    order, target = np.random.default_rng(3).permutation(24), toy_target()
    first = pick(SPEC, make_context(SPEC, proxy=None))
    turned = target.take(range(len(target) - 1, -1, -1))
    second = pick(SPEC, make_context(SPEC, proxy=None, pool=toy_pool(order=order), reference=turned))
    assert order[second.positions].tolist() == first.positions.tolist()


def test_tiles_do_not_matter(monkeypatch):
    first = pick(SPEC, make_context(SPEC, proxy=None, reference=grouped_target()))
    monkeypatch.setattr(module, "_TILE", 2)
    second = pick(SPEC, make_context(SPEC, proxy=None, reference=grouped_target()))
    np.testing.assert_allclose(first.scores, second.scores, atol=1e-6)
    assert first.positions.tolist() == second.positions.tolist()


def test_predicted_cost_is_what_is_charged():
    rows = [{"input_ids": [5 + i] * 20, "labels": [5 + i] * 20} for i in range(16)]
    pool, bills = pool_of(rows), []
    target = pool_of([{"input_ids": [50 + i] * 10, "labels": [50 + i] * 10} for i in range(4)])
    context = make_context(
        SPEC, proxy=None, pool=pool, reference=target, spend=lambda flops, tokens: bills.append((flops, tokens))
    )
    pick(SPEC, context)
    predicted = cost(RdsConfig(), Facts(model=model_facts(context.model), pool=pool_facts_of(pool, target)))
    assert sum(flops for flops, _ in bills) == pytest.approx(predicted.flops, rel=1e-9)
    assert sum(tokens for _, tokens in bills) == predicted.tokens == 360


def test_comparing_can_be_stopped(monkeypatch):
    stopped = []
    context = make_context(SPEC, proxy=None, stop_requested=lambda: bool(stopped))
    found = module.pool_embeddings

    def last_word(context, rows, **options):
        vectors = found(context, rows, **options)
        if rows is context.pool:
            stopped.append(True)
        return vectors

    monkeypatch.setattr(module, "pool_embeddings", last_word)
    with pytest.raises(ScoringStoppedError, match="before all target rows were compared"):
        pick(SPEC, context)


def test_a_missing_target_is_named():
    for reference in (None, unlabelled(toy_target())):
        with pytest.raises(DataError, match="selection='rds' needs target rows"):
            pick(SPEC, make_context(SPEC, proxy=None, reference=reference))
