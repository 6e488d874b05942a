"""Farthest-first: within twice the optimum, the definition step by step, ties by order."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_eff.numerics import k_center as module
from hf_eff.numerics.k_center import farthest_first


def order_of(vectors, count=None):
    return [row for row, _ in itertools.islice(farthest_first(vectors), count)]


def radius(vectors, chosen):
    return np.sqrt(((vectors[:, None] - vectors[None, list(chosen)]) ** 2).sum(axis=2)).min(axis=1).max()


def literal(vectors):
    """The definition in float64."""
    rows = vectors.astype(np.float64)
    chosen = [int(np.argmin(((rows - rows.mean(axis=0)) ** 2).sum(axis=1)))]
    while len(chosen) < len(rows):
        nearest = ((rows[:, None] - rows[None, chosen]) ** 2).sum(axis=2).min(axis=1)
        nearest[chosen] = -1
        chosen.append(int(np.argmax(nearest)))
    return chosen


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(3, 14), k=st.integers(1, 4))
def test_radius_is_at_most_twice_the_optimum(seed, count, k):
    k = min(k, count)
    vectors = np.random.default_rng(seed).normal(size=(count, 2)).astype(np.float32)
    best = min(radius(vectors, chosen) for chosen in itertools.combinations(range(count), k))
    assert radius(vectors, order_of(vectors, k)) <= 2 * best + 1e-5


@pytest.mark.parametrize("seed", range(5))
def test_order_is_the_definition(seed):
    vectors = np.random.default_rng(seed).normal(size=(60, 5)).astype(np.float32)
    assert order_of(vectors) == literal(vectors)


def test_distances_are_those_to_the_rows_before_and_never_grow():
    vectors = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    found = list(farthest_first(vectors))
    rows = [row for row, _ in found]
    for place in (1, 7, 49):
        expected = np.linalg.norm(vectors[rows[place]] - vectors[rows[:place]], axis=1).min()
        assert found[place][1] == pytest.approx(expected, abs=1e-3)
    distances = [distance for _, distance in found[1:]]
    assert all(a >= b - 1e-3 for a, b in itertools.pairwise(distances))


def test_copies_come_after_everything_else_and_in_order():
    random = np.random.default_rng(1)
    groups = np.repeat(np.arange(10), 5)
    vectors = random.normal(size=(10, 8)).astype(np.float32)[groups]
    order = order_of(vectors)
    assert len({groups[row] for row in order[:10]}) == 10
    assert order[:10] == [5 * groups[row] for row in order[:10]]
    assert order[10:] == sorted(order[10:])
    assert order_of(np.ones((6, 3), dtype=np.float32)) == list(range(6))


def test_ties_within_rounding_go_to_the_lower_row():
    corners = np.eye(7, dtype=np.float32)
    noisy = corners + np.random.default_rng(0).normal(size=(7, 7)).astype(np.float32) * 1e-8
    assert order_of(noisy) == order_of(corners) == list(range(7))


def test_tiles_do_not_matter(monkeypatch):
    vectors = np.random.default_rng(2).normal(size=(100, 6)).astype(np.float32)
    whole = order_of(vectors)
    monkeypatch.setattr(module, "_TILE", 7)
    assert order_of(vectors) == whole


def test_no_rows_no_order():
    assert order_of(np.zeros((0, 3), dtype=np.float32)) == []
