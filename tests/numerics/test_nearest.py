"""Nearest neighbours: exact below a size, and good enough above it, also where a cell holds half of the pool."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_eff.numerics import nearest as module
from hf_eff.numerics.nearest import nearest_neighbours, neighbour_flops


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def clustered(count, width=24, clusters=40, seed=0):
    random = np.random.default_rng(seed)
    middles = random.normal(size=(clusters, width))
    return unit(middles[random.integers(clusters, size=count)] + 0.4 * random.normal(size=(count, width)))


def literal(vectors, k):
    cosines = vectors.astype(np.float64) @ vectors.T
    np.fill_diagonal(cosines, -2)
    return np.argsort(-cosines, axis=1)[:, :k], -np.sort(-cosines, axis=1)[:, :k]


def recall(found, expected):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, expected, strict=True)])


@pytest.mark.parametrize("tile", [2**22, 500])
def test_exact_search_is_the_definition(tile, monkeypatch):
    monkeypatch.setattr(module, "_TILE_NUMBERS", tile)
    vectors = clustered(200)
    indices, cosines = nearest_neighbours(vectors, 7, generator=seeded())
    expected, values = literal(vectors, 7)
    assert np.array_equal(indices, expected)
    np.testing.assert_allclose(cosines, values, atol=1e-6)
    assert (indices.dtype, cosines.dtype) == (np.int32, np.float32)


@pytest.mark.parametrize("seed", range(3))
def test_cells_find_nine_of_ten_neighbours(seed):
    vectors = clustered(4000, seed=seed)
    indices, cosines = nearest_neighbours(vectors, 10, generator=seeded(seed), exact_below=0)
    assert recall(indices, literal(vectors, 10)[0]) >= 0.9
    assert (indices != np.arange(4000)[:, None]).all()
    assert all(len(set(row)) == 10 for row in indices)
    true = np.einsum("nh,nkh->nk", vectors, vectors[indices])
    np.testing.assert_allclose(cosines, true, atol=1e-5)
    assert (np.diff(cosines, axis=1) <= 0).all()


def test_one_probe_finds_less():
    vectors = clustered(2000)
    expected = literal(vectors, 10)[0]
    few, many = (nearest_neighbours(vectors, 10, generator=seeded(), exact_below=0, probes=p)[0] for p in (1, 44))
    assert recall(few, expected) < recall(many, expected)
    assert recall(many, expected) > 0.999


def test_equal_rows_do_not_make_one_huge_cell(monkeypatch):
    work = []
    visits = module._visits
    monkeypatch.setattr(module, "_visits", lambda *a: work.append((a[2], visits(*a))) or work[-1][1])
    cells = module._cells
    parts = []
    monkeypatch.setattr(module, "_cells", lambda *a: parts.append(cells(*a)) or parts[-1])
    vectors = np.concatenate([clustered(1000), np.repeat(clustered(1, seed=9), 1500, axis=0)])
    indices, cosines = nearest_neighbours(vectors, 5, generator=seeded(), exact_below=0)
    assert max(len(part) for part in parts[0][1]) <= 2 * 50
    pairs = sum(len(asking) * len(held) for asking, held in zip(work[0][1], parts[0][1], strict=True))
    assert pairs <= 2500 * work[0][0] * 2 * 50
    np.testing.assert_allclose(cosines[1000:], 1.0, atol=1e-5)
    assert (indices[1000:] >= 1000).all()


def test_same_seed_same_result():
    vectors = clustered(1500)
    first, second = (nearest_neighbours(vectors, 5, generator=seeded(1), exact_below=0) for _ in range(2))
    assert np.array_equal(first[0], second[0])
    assert np.array_equal(first[1], second[1])


def test_more_neighbours_than_rows():
    vectors = clustered(4)
    indices, _ = nearest_neighbours(vectors, 10, generator=seeded())
    assert indices.shape == (4, 3)
    assert nearest_neighbours(vectors[:1], 3, generator=seeded())[0].shape == (1, 0)
    assert nearest_neighbours(vectors[:0], 3, generator=seeded())[0].shape == (0, 0)


def test_cells_that_hold_too_few_rows_leave_gaps():
    indices, cosines = nearest_neighbours(clustered(100), 60, generator=seeded(), exact_below=0, probes=1)
    assert ((indices == -1) == (cosines == -1.0)).all()
    assert (indices == -1).any()


@pytest.mark.parametrize("exact_below", [0, 10_000])
def test_work_can_be_stopped(exact_below):
    class Enough(Exception):
        pass

    def stop():
        raise Enough

    with pytest.raises(Enough):
        nearest_neighbours(clustered(300), 3, generator=seeded(), exact_below=exact_below, between=stop)


@pytest.mark.parametrize("exact_below", [0, 10_000])
def test_flops_are_those_that_run(exact_below):
    from torch.utils.flop_counter import FlopCounterMode

    vectors = unit(np.random.default_rng(0).normal(size=(3000, 16)))
    with FlopCounterMode(display=False) as counter:
        nearest_neighbours(vectors, 5, generator=seeded(), exact_below=exact_below)
    stated = neighbour_flops(3000, 16, exact_below=exact_below)
    # Cells are not quite of equal size.
    assert stated == pytest.approx(counter.get_total_flops(), rel=0.35 if exact_below == 0 else 1e-9)


def test_work_grows_less_than_quadratically():
    # N^1.5, and a part that is linear: what the cells are learnt from.
    assert 7.5 < neighbour_flops(400_000, 64) / neighbour_flops(100_000, 64) < 8
