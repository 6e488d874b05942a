"""Planted families are found, budgets are water-filled twice, and clusters stand for gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_eff.errors import OptionError
from hf_eff.numerics.trajectory_clusters import choose_by_trajectory, order_by_trajectory
from hf_eff.numerics.water_filling import water_fill


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def families(sizes, seed=0, checkpoints=8, noise=0.02):
    """Loss curves of some families that differ in level and speed, shuffled."""
    rng = np.random.default_rng(seed)
    steps = np.arange(checkpoints)
    centres = [0.5 * (number + 1) + 2.0 * np.exp(-steps / (1 + number)) for number in range(len(sizes))]
    labels = np.repeat(np.arange(len(sizes)), sizes)
    rng.shuffle(labels)
    values = np.stack([centres[label] for label in labels]) + noise * rng.standard_normal((len(labels), checkpoints))
    return values.astype(np.float32), labels


def adjusted_rand_index(a, b):
    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a, b), 1)
    pairs = lambda x: (x * (x - 1) / 2).sum()  # noqa: E731
    together, first, second = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected = first * second / pairs(np.array([len(a)]))
    return (together - expected) / ((first + second) / 2 - expected)


@pytest.mark.parametrize("seed", range(5))
def test_planted_families_are_found_and_share_by_water_filling(seed):
    sizes = [40, 15, 80, 25, 60]
    values, labels = families(sizes, seed)
    order = order_by_trajectory(values, None, generator(seed), clusters=5)
    assert adjusted_rand_index(labels, order.clusters) >= 0.95
    for budget in (5, 50, 90, 150, 220):
        found = np.bincount(labels[order.positions[:budget]], minlength=5)
        assert found.tolist() == water_fill(sizes, budget).tolist()


def literal_choice(clusters, sources, budget):
    """Rows a source and a cluster give: water-filling over sources, then over clusters, tiny ones last."""
    names, sizes = np.unique(sources, return_counts=True)
    shares = {}
    for name, share in zip(names, water_fill(sizes, budget), strict=True):
        own, counts = np.unique(clusters[sources == name], return_counts=True)
        for group in (counts > 2, counts <= 2):
            given_ = water_fill(counts[group], int(share))
            shares.update(zip(own[group].tolist(), given_.tolist(), strict=True))
            share -= given_.sum()
    return shares


@given(
    rows=st.integers(1, 80),
    num_sources=st.integers(1, 4),
    clusters=st.integers(1, 12),
    seed=st.integers(0, 1000),
    distinct=st.sampled_from([1, 3, 200]),
)
@settings(max_examples=60, deadline=None)
def test_every_budget_is_the_literal_allocation(rows, num_sources, clusters, seed, distinct):
    rng = np.random.default_rng(seed)
    values = rng.random((distinct, 3)).astype(np.float32)[rng.integers(distinct, size=rows)]
    sources = np.array([f"s{number}" for number in rng.integers(num_sources, size=rows)])
    order = order_by_trajectory(values, sources, generator(seed), clusters=clusters)
    assert sorted(order.positions.tolist()) == list(range(rows))
    for cluster in set(order.clusters.tolist()):
        assert len(set(sources[order.clusters == cluster])) == 1
    for budget in {0, 1, rows // 3, rows // 2, rows - 1, rows, rows + 5}:
        chosen = choose_by_trajectory(values, sources, budget, generator(seed), clusters=clusters)
        assert len(set(chosen.tolist())) == len(chosen) == min(budget, rows)
        expected = literal_choice(order.clusters, sources, min(budget, rows))
        found = {c: int((order.clusters[chosen] == c).sum()) for c in expected}
        assert found == expected


def test_the_order_of_checkpoints_does_not_matter():
    values, _ = families([30, 50, 20], noise=0.05)
    plain = order_by_trajectory(values, None, generator(), clusters=3)
    turned = order_by_trajectory(values[:, [5, 2, 7, 0, 1, 6, 3, 4]], None, generator(), clusters=3)
    assert np.array_equal(plain.clusters, turned.clusters)
    assert np.array_equal(plain.positions, turned.positions)


def test_tiny_clusters_come_last():
    values = np.concatenate([np.zeros((20, 2)), np.full((20, 2), 5.0), [[50.0, 50.0]], [[90.0, 90.0]] * 2])
    order = order_by_trajectory(values.astype(np.float32), None, generator(), clusters=4)
    assert set(order.positions[:40].tolist()) == set(range(40))
    assert set(order.positions[40:].tolist()) == {40, 41, 42}


def test_rows_of_a_cluster_are_random():
    values = np.zeros((60, 2), dtype=np.float32)
    picks = {tuple(sorted(choose_by_trajectory(values, None, 10, generator(seed)).tolist())) for seed in range(8)}
    assert len(picks) == 8


def test_level_or_shape_is_compared():
    steps = np.arange(6, dtype=np.float64)
    falling, rising = 5.0 - 0.1 * steps, 5.0 + 0.1 * steps
    shapes = [falling, falling - 3, rising, rising - 3]
    values = np.repeat(shapes, 10, axis=0) + 1e-3 * np.random.default_rng(0).standard_normal((40, 6))
    level, shape = np.repeat([0, 1, 0, 1], 10), np.repeat([0, 0, 1, 1], 10)
    for normalize, expected in (("none", level), ("center", shape), ("zscore", shape)):
        found = order_by_trajectory(values, None, generator(), clusters=2, normalize=normalize).clusters
        assert adjusted_rand_index(expected, found) == 1.0, normalize
    steeper = np.repeat([5 - 0.1 * steps, 5 - 2.0 * steps, 5 + 0.1 * steps, 5 + 2.0 * steps], 10, axis=0)
    scaled = order_by_trajectory(steeper, None, generator(), clusters=2, normalize="zscore").clusters
    assert adjusted_rand_index(shape, scaled) == 1.0


def test_flat_trajectories_have_a_shape():
    found = order_by_trajectory(np.ones((5, 3), dtype=np.float32), None, generator(), clusters=2, normalize="zscore")
    assert sorted(found.positions.tolist()) == list(range(5))


def linear_regression(seed):
    """Losses along the training of a linear model, and each row's gradient at its end."""
    rng = np.random.default_rng(seed)
    families_, rows, dims = 6, 240, 8
    centres, goals = rng.standard_normal((families_, dims)) * 2, rng.standard_normal(families_) * 3
    label = rng.integers(families_, size=rows)
    x = centres[label] + 0.1 * rng.standard_normal((rows, dims))
    y = goals[label] + 0.1 * rng.standard_normal(rows)
    weight, losses = np.zeros(dims), []
    for step in range(40):
        error = x @ weight - y
        if step % 5 == 0:
            losses.append(error**2)
        weight -= 0.005 * (2 * error[:, None] * x).mean(axis=0)
    return np.stack(losses, axis=1).astype(np.float32), 2 * (x @ weight - y)[:, None] * x


def test_a_cluster_weighted_subset_has_nearly_the_full_gradient():
    wins, seeds = 0, 40
    for seed in range(seeds):
        losses, gradients = linear_regression(seed)
        order = order_by_trajectory(losses, None, generator(seed), clusters=12)
        chosen = order.positions[:36]
        sizes, taken = np.bincount(order.clusters), np.bincount(order.clusters[chosen])
        weights = np.array([sizes[order.clusters[row]] / taken[order.clusters[row]] for row in chosen])
        estimate = (weights[:, None] * gradients[chosen]).sum(axis=0) / weights.sum()
        drawn = np.random.default_rng(seed).choice(len(losses), 36, replace=False)
        full = gradients.mean(axis=0)
        wins += np.linalg.norm(estimate - full) < np.linalg.norm(gradients[drawn].mean(axis=0) - full)
    assert wins >= 0.95 * seeds


def test_an_unknown_normalization_is_refused_and_no_rows_are_fine():
    with pytest.raises(OptionError, match="normalize must be one of"):
        order_by_trajectory(np.zeros((3, 2)), None, generator(), normalize="rank")
    assert len(choose_by_trajectory(np.zeros((0, 2)), None, 3, generator())) == 0
