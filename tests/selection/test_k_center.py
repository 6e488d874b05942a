"""k_center: the traversal of the pool's embeddings, one of each group of copies, content alone."""

from __future__ import annotations

import numpy as np
import pytest

from hf_eff.contracts.cost import Facts
from hf_eff.engines.facts import model_facts
from hf_eff.errors import BudgetExceededError, DataError, ScoringStoppedError
from hf_eff.registry import get_method
from hf_eff.selection.k_center import KCenterConfig, cost
from hf_eff.testing.selection_scene import chosen_hashes, make_context, pick, pool_facts_of, pool_of, toy_pool

SPEC = get_method("selection", "k_center")


def literal_embeddings(model, pool):
    import torch

    vectors = []
    for row in pool.rows:
        with torch.no_grad():
            states = model(input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states[-1][0]
        vectors.append(torch.nn.functional.normalize(states.double().mean(dim=0), dim=0).numpy())
    return np.stack(vectors)


def literal(vectors, k):
    chosen = [int(np.argmin(((vectors - vectors.mean(axis=0)) ** 2).sum(axis=1)))]
    while len(chosen) < k:
        nearest = ((vectors[:, None] - vectors[None, chosen]) ** 2).sum(axis=2).min(axis=1)
        nearest[chosen] = -1
        chosen.append(int(np.argmax(nearest)))
    return chosen


def test_the_choice_is_the_definition():
    context = make_context(SPEC, proxy=None, pool=toy_pool(40))
    picks = pick(SPEC, context, fraction=0.5)
    assert picks.positions.tolist() == literal(literal_embeddings(context.model, context.pool), 20)
    assert picks.scores is None
    assert picks.reasons[0] == "nearest the middle of the pool"


def vectors_pool(vectors):
    rows = [{"input_ids": [5 + i % 200, 5 + i // 200, 7, 9], "labels": [-100, 3, 7, 9]} for i in range(len(vectors))]
    pool = pool_of(rows)
    pool.examples = [{"vector": list(map(float, vector))} for vector in vectors]
    return pool


def test_one_of_each_planted_group():
    groups = np.random.default_rng(0).permutation(np.repeat(np.arange(15), 6))
    pool = vectors_pool(np.random.default_rng(1).normal(size=(15, 8))[groups])
    picks = pick(
        SPEC, make_context(SPEC, proxy=None, pool=pool), fraction=None, num_examples=15, embedding_column="vector"
    )
    assert len({groups[row] for row in picks.positions}) == 15


def test_copies_of_a_row_are_chosen_last():
    rows = toy_pool(8).rows
    pool = pool_of([rows[i % 8] for i in range(24)])
    context = make_context(SPEC, proxy=None, pool=pool)
    picks = pick(SPEC, context, fraction=None, num_examples=8)
    assert chosen_hashes(picks, pool) == set(pool.row_hash)


def test_a_column_costs_no_forward():
    pool = vectors_pool(np.random.default_rng(2).normal(size=(30, 4)))
    bills = []
    context = make_context(SPEC, proxy=None, pool=pool, spend=lambda flops, tokens: bills.append((flops, tokens)))
    pick(SPEC, context, embedding_column="vector", fraction=0.5)
    assert bills == [(2 * 30 * 4, 0.0)] * 15


@pytest.mark.parametrize("change", [{"batch_tokens": 1}, {"batch_tokens": 10_000, "extra_padding": 7}])
def test_batches_and_padding_do_not_matter(change):
    plain = pick(SPEC, make_context(SPEC, proxy=None, pool=toy_pool(40)))
    assert (
        pick(SPEC, make_context(SPEC, proxy=None, pool=toy_pool(40), **change)).positions.tolist()
        == plain.positions.tolist()
    )


def test_the_order_of_the_rows_does_not_matter():
    order = np.random.default_rng(3).permutation(40)
    first, second = (
        pick(SPEC, make_context(SPEC, proxy=None, pool=pool)) for pool in (toy_pool(40), toy_pool(40, order))
    )
    assert order[second.positions].tolist() == first.positions.tolist()


def test_a_token_limit_ends_the_walk():
    pool = toy_pool(40)
    whole = pick(SPEC, make_context(SPEC, proxy=None, pool=pool), fraction=1.0).positions
    bills = []
    context = make_context(SPEC, proxy=None, pool=pool, spend=lambda flops, tokens: bills.append(tokens))
    picks = pick(SPEC, context, fraction=None, num_tokens=200)
    used = np.cumsum(pool.lengths[whole])
    assert picks.positions.tolist() == whole[: np.searchsorted(used, 200, side="right")].tolist()
    assert bills.count(0.0) == len(picks.positions) + 1


def test_predicted_cost_is_what_is_charged():
    rows = [{"input_ids": [5 + i] * 20, "labels": [5 + i] * 20} for i in range(16)]
    pool, bills = pool_of(rows), []
    context = make_context(SPEC, proxy=None, pool=pool, spend=lambda flops, tokens: bills.append((flops, tokens)))
    pick(SPEC, context)
    predicted = cost(
        KCenterConfig(fraction=0.25), Facts(model=model_facts(context.model), pool=pool_facts_of(pool, None))
    )
    assert sum(flops for flops, _ in bills) == pytest.approx(predicted.flops, rel=1e-9)
    assert sum(tokens for _, tokens in bills) == predicted.tokens


def test_a_walk_can_be_stopped_or_run_out_of_budget():
    pool, calls = toy_pool(24), []
    polls = iter([False] * 100)
    context = make_context(SPEC, proxy=None, pool=pool, stop_requested=lambda: calls.append(1) or next(polls))
    pick(SPEC, context)
    scoring = len(calls) - 1
    answers = iter([False] * scoring + [True])
    with pytest.raises(ScoringStoppedError, match="after 0 of 6 picks"):
        pick(SPEC, make_context(SPEC, proxy=None, pool=pool, stop_requested=lambda: next(answers)))

    def spend(flops, tokens):
        if tokens == 0:
            raise BudgetExceededError("enough")

    with pytest.raises(BudgetExceededError):
        pick(SPEC, make_context(SPEC, proxy=None, pool=pool, spend=spend))


def test_impossible_sizes_cost_nothing():
    def spend(flops, tokens):
        raise BudgetExceededError("computed")

    with pytest.raises(DataError, match="num_examples=99 is more than the 24 valid rows"):
        pick(SPEC, make_context(SPEC, proxy=None, spend=spend), fraction=None, num_examples=99)
