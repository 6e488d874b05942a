"""What is kept is far apart, and what is not kept has a better neighbour that was."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_eff.numerics import novelty
from hf_eff.numerics.novelty import greedy_novel


def unit(count, width, seed):
    vectors = np.random.default_rng(seed).normal(size=(count, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def literal(order, vectors, tau, limit):
    """One row after the other, against every kept row."""
    kept = []
    for row in order:
        if len(kept) < limit and all(float(vectors[row] @ vectors[other]) <= tau for other in kept):
            kept.append(int(row))
    return kept


@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(1, 4), st.sampled_from([-0.5, 0.0, 0.6, 0.9, 1.0]))
def test_no_kept_pair_is_close_and_every_other_row_has_a_better_close_neighbour(seed, count, width, tau):
    vectors, order = unit(count, width, seed), np.random.default_rng(seed).permutation(count)
    kept, nearest, neighbour = greedy_novel(order, vectors, tau, count)
    cosines = np.minimum(vectors[kept] @ vectors[kept].T, 1.0)
    np.fill_diagonal(cosines, -1.0)
    assert (cosines <= tau + 1e-6).all()
    rank = {int(row): place for place, row in enumerate(order)}
    for row in set(order.tolist()) - set(kept.tolist()):
        assert nearest[row] > tau
        assert neighbour[row] in kept
        assert rank[int(neighbour[row])] < rank[row]
        assert vectors[row] @ vectors[neighbour[row]] == pytest.approx(nearest[row], abs=1e-5)


@pytest.mark.parametrize("limit", [1, 5, 40, 1000])
@pytest.mark.parametrize("tau", [0.3, 0.8])
def test_tiles_and_blocks_change_nothing(tau, limit, monkeypatch):
    vectors, order = unit(700, 5, 1), np.random.default_rng(2).permutation(700)
    expected = literal(order, vectors.astype(np.float64), tau, limit)
    for tile, block in ((256, 65536), (7, 3), (1, 1)):
        monkeypatch.setattr(novelty, "_TILE", tile)
        monkeypatch.setattr(novelty, "_BLOCK", block)
        assert greedy_novel(order, vectors, tau, limit).kept.tolist() == expected


def test_equal_rows_pass_only_where_everything_does():
    vectors = np.repeat(unit(1, 7, 0), 5, axis=0)
    assert greedy_novel(np.arange(5), vectors, 1.0, 5).kept.tolist() == [0, 1, 2, 3, 4]
    assert greedy_novel(np.arange(5), vectors, 0.99, 5).kept.tolist() == [0]


def test_rows_that_were_not_reached_are_marked():
    found = greedy_novel(np.array([3, 0, 1, 2]), np.eye(4, dtype=np.float32), 0.9, 2)
    assert found.kept.tolist() == [3, 0]
    assert np.isnan(found.nearest).tolist() == [False, True, True, False]
    assert found.nearest[3] == -1.0
    assert found.neighbour.tolist() == [3, -1, -1, -1]


def test_nothing_to_look_at_keeps_nothing():
    assert len(greedy_novel(np.zeros(0, dtype=np.int64), np.eye(3, dtype=np.float32), 0.9, 3).kept) == 0
