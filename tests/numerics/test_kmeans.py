"""k-means finds planted clusters, never gets worse, and depends on rows and generator alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_eff.errors import OptionError
from hf_eff.numerics import kmeans as module
from hf_eff.numerics.kmeans import kmeans


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def blobs(clusters=5, each=30, width=4, spread=0.05, seed=0):
    random = np.random.default_rng(seed)
    middles = random.normal(size=(clusters, width)) * 3
    labels = np.repeat(np.arange(clusters), each)
    return (middles[labels] + spread * random.normal(size=(len(labels), width))).astype(np.float32), labels


def inertia(vectors, centres, labels):
    return float(((vectors.astype(np.float64) - centres[labels]) ** 2).sum())


def agrees(found, planted):
    """The same partition under other names."""
    return len({(a, b) for a, b in zip(found, planted, strict=True)}) == len(set(found)) == len(set(planted))


@pytest.mark.parametrize("seed", range(5))
def test_planted_clusters_are_found(seed):
    vectors, planted = blobs(seed=seed)
    centres, labels = kmeans(vectors, 5, seeded(seed))
    assert agrees(labels, planted)
    expected = np.stack([vectors[labels == cluster].mean(axis=0) for cluster in range(5)])
    np.testing.assert_allclose(centres, expected, atol=1e-5)


@pytest.mark.parametrize("init", ["plusplus", "random"])
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 40), clusters=st.integers(1, 8))
def test_every_row_has_its_nearest_centre_and_more_rounds_never_hurt(init, seed, count, clusters):
    vectors = np.random.default_rng(seed).normal(size=(count, 3))
    previous = float("inf")
    for rounds in (0, 1, 3, 50):
        centres, labels = kmeans(vectors, clusters, seeded(seed), rounds, init=init)
        assert centres.shape == (min(clusters, count), 3)
        distances = ((vectors[:, None] - centres[None]) ** 2).sum(axis=2)
        np.testing.assert_allclose(distances[np.arange(count), labels], distances.min(axis=1), atol=1e-12)
        assert inertia(vectors, centres, labels) <= previous + 1e-9
        previous = inertia(vectors, centres, labels)


def test_the_best_of_a_few_starts_is_the_optimum():
    vectors = np.random.default_rng(1).normal(size=(8, 2))
    best = min(
        sum(((part - part.mean(axis=0)) ** 2).sum() for part in (vectors[mask], vectors[~mask]) if len(part))
        for mask in (np.array(bits, dtype=bool) for bits in itertools.product([0, 1], repeat=8))
    )
    found = min(inertia(vectors, *kmeans(vectors, 2, seeded(seed))) for seed in range(10))
    assert found == pytest.approx(best, rel=1e-9)


def test_tiles_do_not_matter(monkeypatch):
    vectors, _ = blobs(each=100, spread=1.0)
    whole = kmeans(vectors, 7, seeded())
    monkeypatch.setattr(module, "_TILE_NUMBERS", 50)
    parts = kmeans(vectors, 7, seeded())
    assert np.array_equal(whole[1], parts[1])
    np.testing.assert_allclose(whole[0], parts[0], atol=1e-6)


def test_same_seed_same_result_and_the_global_state_stays():
    vectors, _ = blobs(spread=2.0)
    before = torch.random.get_rng_state()
    first, second = kmeans(vectors, 6, seeded(3)), kmeans(vectors, 6, seeded(3))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not np.array_equal(kmeans(vectors, 6, seeded(4), 0)[0], kmeans(vectors, 6, seeded(3), 0)[0])


def test_empty_clusters_are_filled_where_rows_differ():
    # All starts fall on one spot, which is also the mean: only moving an empty cluster helps.
    vectors = np.array([[0.0]] * 200 + [[9.0]] * 2 + [[-9.0]] * 2, dtype=np.float32)
    for seed in range(5):
        assert (kmeans(vectors, 3, seeded(seed), 0, init="random")[0] == 0).all()
        _, labels = kmeans(vectors, 3, seeded(seed), init="random")
        assert agrees(labels, [0] * 200 + [1] * 2 + [2] * 2)


@pytest.mark.parametrize("init", ["plusplus", "random"])
def test_equal_rows_and_more_clusters_than_rows(init):
    centres, labels = kmeans(np.ones((5, 3), dtype=np.float32), 3, seeded(), init=init)
    assert len(set(labels)) == 1
    np.testing.assert_allclose(centres[labels], 1.0)
    centres, labels = kmeans(np.eye(3, dtype=np.float32), 10, seeded(), init=init)
    assert len(centres) == 3
    assert len(set(labels)) == 3


def test_a_common_offset_costs_no_precision():
    vectors, planted = blobs(spread=0.05)
    _, labels = kmeans((vectors + 1000).astype(np.float32), 5, seeded())
    assert agrees(labels, planted)


def test_impossible_requests_are_named():
    with pytest.raises(OptionError, match="needs rows and at least 1 cluster"):
        kmeans(np.ones((3, 2)), 0, seeded())
    with pytest.raises(OptionError, match="needs rows and at least 1 cluster"):
        kmeans(np.ones((0, 2)), 2, seeded())
    with pytest.raises(OptionError, match="init must be one of"):
        kmeans(np.ones((3, 2)), 2, seeded(), init="best")
