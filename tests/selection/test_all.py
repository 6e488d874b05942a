"""all: the pool as it is, without rows that teach nothing."""

from __future__ import annotations

import numpy as np

from hf_eff.registry import get_method
from hf_eff.testing.selection_scene import make_context, pick, toy_pool, unlabelled

SPEC = get_method("selection", "all")


def test_every_valid_row_is_kept_in_order():
    pool = toy_pool(12)
    pool.loss_lengths[[2, 7]] = 0
    picks = pick(SPEC, make_context(SPEC, pool=pool))
    assert picks.positions.tolist() == [0, 1, 3, 4, 5, 6, 8, 9, 10, 11]
    assert (picks.scores, picks.weights, picks.reasons) == (None, None, "whole pool")


def test_nothing_is_kept_where_nothing_can_be_learnt():
    assert not len(pick(SPEC, make_context(SPEC, pool=unlabelled(toy_pool(4)))).positions)


def test_it_costs_nothing_and_draws_nothing():
    context = make_context(SPEC)
    state = context.generator.get_state()
    pick(SPEC, context)
    assert np.array_equal(state, context.generator.get_state())
    assert SPEC.cost(SPEC.config(), None).flops == 0
