"""length: a sort by loss tokens, ties broken by content."""

from __future__ import annotations

import numpy as np
import pytest

from hf_eff.registry import get_method
from hf_eff.testing.selection_scene import chosen_hashes, make_context, pick, toy_pool

SPEC = get_method("selection", "length")


@pytest.mark.parametrize(("order", "sign"), [("longest", -1), ("shortest", 1)])
def test_it_equals_a_plain_sort(order, sign):
    pool = toy_pool(24)
    pool.loss_lengths[[3, 9]] = 0
    picks = pick(SPEC, make_context(SPEC, pool=pool), order=order, fraction=None, num_examples=7)
    valid = [i for i in range(24) if pool.loss_lengths[i]]
    expected = sorted(valid, key=lambda i: (sign * pool.loss_lengths[i], pool.row_hash[i]))[:7]
    assert picks.positions.tolist() == expected
    assert picks.higher_is_better == (order == "longest")
    assert np.flatnonzero(np.isnan(picks.scores)).tolist() == [3, 9]
    assert picks.reasons[0] == f"{pool.loss_lengths[expected[0]]} loss tokens"


def test_ties_do_not_follow_the_order_of_the_rows():
    plain, order = toy_pool(24), np.random.default_rng(2).permutation(24)
    turned = toy_pool(24, order)
    assert len(set(plain.loss_lengths.tolist())) < 10  # there are ties to break
    for size in range(1, 24):
        first = pick(SPEC, make_context(SPEC, pool=plain), fraction=None, num_examples=size)
        second = pick(SPEC, make_context(SPEC, pool=turned), fraction=None, num_examples=size)
        assert chosen_hashes(first, plain) == chosen_hashes(second, turned)


def test_a_token_budget_takes_the_longest_first():
    pool = toy_pool(24)
    picks = pick(SPEC, make_context(SPEC, pool=pool), fraction=None, num_tokens=100)
    whole = pick(SPEC, make_context(SPEC, pool=pool), fraction=1.0)
    assert picks.positions.tolist() == whole.positions[: len(picks.positions)].tolist()
    assert pool.lengths[picks.positions].sum() <= 100
