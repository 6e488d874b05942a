"""Greedy facility location: close to the optimum, lazy equals naive, sparse equals dense when all pairs are there."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_eff.errors import OptionError
from hf_eff.numerics.facility_location import (
    SIMILARITIES,
    DenseSimilarity,
    SparseSimilarity,
    covered_value,
    facility_location,
)
from hf_eff.numerics.nearest import nearest_neighbours


def unit(count, width, seed):
    vectors = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def literal_similarity(vectors, kind):
    if kind == "cosine":
        return np.maximum(vectors.astype(np.float64) @ vectors.T, 0)
    distances = ((vectors[:, None].astype(np.float64) - vectors[None]) ** 2).sum(axis=2)
    return distances.max() - distances


def literal_value(similarity, chosen, weights=None):
    covered = similarity[:, list(chosen)].max(axis=1) if len(chosen) else np.zeros(len(similarity))
    return float(covered @ (np.ones(len(similarity)) if weights is None else weights))


def naive(similarity, k, weights=None):
    """Value of the greedy that looks at every row every time."""
    chosen = []
    for _ in range(k):
        rest = [row for row in range(len(similarity)) if row not in chosen]
        chosen.append(max(rest, key=lambda row: literal_value(similarity, [*chosen, row], weights)))
    return literal_value(similarity, chosen, weights)


def first(similarity, k, weights=None):
    return list(itertools.islice(facility_location(similarity, weights), k))


def sparse(vectors, k, kind="cosine"):
    return SparseSimilarity.of(*nearest_neighbours(vectors, k, generator=torch.Generator()), kind)


@pytest.mark.parametrize("kind", SIMILARITIES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(4, 11), k=st.integers(1, 4), weighted=st.booleans())
def test_value_is_near_the_optimum_and_that_of_the_naive_greedy(kind, seed, count, k, weighted):
    vectors = unit(count, 3, seed)
    weights = np.random.default_rng(seed).uniform(size=count) if weighted else None
    table = literal_similarity(vectors, kind)
    chosen = [row for row, _ in first(DenseSimilarity.of(vectors, kind), k, weights)]
    value = literal_value(table, chosen, weights)
    best = max(literal_value(table, rows, weights) for rows in itertools.combinations(range(count), k))
    assert value >= (1 - 1 / math.e) * best - 1e-6
    assert value == pytest.approx(naive(table, k, weights), rel=1e-5)


@pytest.mark.parametrize("kind", SIMILARITIES)
@pytest.mark.parametrize("weighted", [False, True])
def test_lazy_is_naive_on_more_rows(kind, weighted):
    vectors = unit(80, 6, 1)
    weights = np.random.default_rng(0).uniform(size=80) if weighted else None
    for k in (1, 5, 20):
        chosen = [row for row, _ in first(DenseSimilarity.of(vectors, kind), k, weights)]
        table = literal_similarity(vectors, kind)
        assert literal_value(table, chosen, weights) == pytest.approx(naive(table, k, weights), rel=1e-6)


@pytest.mark.parametrize("kind", SIMILARITIES)
def test_all_neighbours_make_the_dense_value(kind):
    vectors, weights = unit(60, 5, 2), np.random.default_rng(0).uniform(size=60)
    dense, full = DenseSimilarity.of(vectors, kind), sparse(vectors, 59, kind)
    for k in (1, 4, 15, 60):
        values = [covered_value(s, [row for row, _ in first(s, k, weights)], weights) for s in (dense, full)]
        assert values[0] == pytest.approx(values[1], rel=1e-5)
        chosen = [row for row, _ in first(full, k, weights)]
        table = literal_similarity(vectors, kind)
        assert covered_value(full, chosen, weights) == pytest.approx(literal_value(table, chosen, weights), rel=1e-5)


def test_few_neighbours_follow_the_definition():
    vectors = unit(50, 4, 3)
    table = literal_similarity(vectors, "cosine")
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -2)
    kept = np.eye(50)
    for row in range(50):
        kept[row, np.argsort(-cosines[row])[:6]] = 1
    found = [row for row, _ in first(sparse(vectors, 6), 8)]
    assert literal_value(table * kept, found) == pytest.approx(naive(table * kept, 8), rel=1e-5)
    assert covered_value(sparse(vectors, 6), found) == pytest.approx(literal_value(table * kept, found), rel=1e-5)


@pytest.mark.parametrize("make", [DenseSimilarity.of, lambda v, kind="cosine": sparse(v, 10, kind)])
def test_gains_add_up_to_the_value_and_never_grow(make):
    similarity = make(unit(70, 5, 4))
    found = first(similarity, 70)
    gains = [gain for _, gain in found]
    assert sorted(row for row, _ in found) == list(range(70))
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(gains))
    for k in (1, 10, 70):
        assert sum(gains[:k]) == pytest.approx(covered_value(similarity, [row for row, _ in found[:k]]), rel=1e-9)


@pytest.mark.parametrize("kind", SIMILARITIES)
@pytest.mark.parametrize("make", [DenseSimilarity.of, lambda v, kind: sparse(v, 8, kind)])
def test_at_most_one_of_each_group_of_copies(kind, make):
    groups = np.repeat(np.arange(12), 5)
    vectors = unit(12, 6, 5)[groups]
    chosen = [row for row, _ in first(make(vectors, kind), 12)]
    assert len({groups[row] for row in chosen}) == 12


def test_weights_say_which_rows_matter():
    vectors = np.repeat(np.eye(3, dtype=np.float32), [6, 3, 1], axis=0)
    similarity = DenseSimilarity.of(vectors)
    assert [gain for _, gain in first(similarity, 3)] == pytest.approx([6, 3, 1])
    weights = np.array([0.0] * 6 + [1.0] * 3 + [10.0])
    chosen = [row for row, _ in first(similarity, 2, weights)]
    assert chosen == [9, 6]


@pytest.mark.parametrize("kind", SIMILARITIES)
def test_equal_rows_come_in_order(kind):
    vectors = np.ones((5, 1), dtype=np.float32)
    assert [row for row, _ in first(DenseSimilarity.of(vectors, kind), 5)] == list(range(5))
    assert sorted(row for row, _ in first(sparse(vectors, 2, kind), 5)) == list(range(5))


def test_missing_neighbours_are_left_out():
    indices = np.array([[1, -1], [0, 2], [1, -1]], dtype=np.int32)
    cosines = np.array([[0.5, -1], [0.5, 0.2], [0.2, -1]], dtype=np.float32)
    similarity = SparseSimilarity.of(indices, cosines)
    assert covered_value(similarity, [1]) == pytest.approx(1.7)
    assert covered_value(similarity, [0]) == pytest.approx(1.5)
    assert first(similarity, 1)[0] == (1, pytest.approx(1.7))


def test_an_unknown_similarity_is_named():
    with pytest.raises(OptionError, match="similarity must be one of"):
        DenseSimilarity.of(unit(4, 2, 0), "manhattan")


def test_no_rows_no_order():
    empty = np.zeros((0, 3), dtype=np.float32)
    assert first(DenseSimilarity.of(empty), 3) == []
    assert first(sparse(empty, 3), 3) == []
