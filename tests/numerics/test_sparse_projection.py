from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_eff.errors import OptionError
from hf_eff.numerics import sparse_projection
from hf_eff.numerics.projection import RademacherProjector
from hf_eff.numerics.sparse_projection import SparseProjector

SIZES = (700, 3, 1300)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(sparse_projection, "_BLOCK", 256)


def dense(projector):
    """R in one piece, entry by entry."""
    block = sparse_projection._BLOCK
    matrix = torch.zeros(sum(projector.sizes), projector.dims, dtype=torch.float64)
    start = 0
    for index, size in enumerate(projector.sizes):
        for number, (low, high) in enumerate(projector.ranges):
            turns, width = projector.turns(index, number), high - low
            signs = torch.cat([projector.signs(index, number, each) for each in range(-(-size // block))])
            for entry in range(size):
                column = low + (turns[entry // width] + entry) % width
                matrix[start + entry, column] = signs[entry]
        start += size
    return matrix


def gradients(rows, seed=0):
    """Whole numbers make every sum exact in float64, whatever its order."""
    generator = torch.Generator().manual_seed(seed)
    return (8 * torch.randn(rows, sum(SIZES), generator=generator, dtype=torch.float64)).round()


def pieces(values):
    return list(enumerate(values.split(SIZES, dim=1)))


@pytest.mark.parametrize(("dims", "nonzeros"), [(1, 2), (64, 1), (100, 3), (513, 4)])
def test_equals_the_dense_matrix_bit_for_bit(small_blocks, dims, nonzeros):
    projector = SparseProjector(SIZES, dims, seed=3, nonzeros=nonzeros)
    matrix, used = dense(projector), min(dims, nonzeros)
    assert ((matrix != 0).sum(dim=1) == used).all()
    assert matrix.abs().max() == 1
    values = gradients(5)
    assert torch.equal(projector.project(pieces(values), 5), (values @ matrix) / math.sqrt(used))


def test_signs_are_fair_and_columns_evenly_used():
    matrix = dense(SparseProjector((4000,), 100, seed=1))
    assert abs(matrix.sum().item()) < 5 * math.sqrt(4000)
    assert torch.equal(matrix.abs().sum(dim=0), torch.full((100,), 40.0, dtype=torch.float64))
    places = matrix.abs().argmax(dim=1).view(40, 100)[:, 0]
    assert len(set(places.tolist())) > 25  # each run is turned by a number of its own
    assert len({tuple(run.tolist()) for run in matrix.sum(dim=1).view(40, 100)}) == 40


@pytest.mark.parametrize("nonzeros", [1, 2, 4])
def test_cosine_error_follows_the_law_of_the_dense_projection(nonzeros):
    """The error of a cosine c has standard deviation (1 - c^2) / sqrt(d)."""
    size, pairs = 20_000, 120
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(pairs, size, generator=generator)
    for cosine in (0.0, 0.5, 0.9):
        noise = torch.randn(pairs, size, generator=generator)
        second = cosine * first + math.sqrt(1 - cosine**2) * noise
        true = torch.nn.functional.cosine_similarity(first, second)
        for dims in (256, 1024):
            both = SparseProjector((size,), dims, 1, nonzeros).project([(0, torch.cat([first, second]))], 2 * pairs)
            error = torch.nn.functional.cosine_similarity(*both.split(pairs)) - true
            expected = (1 - cosine**2) / math.sqrt(dims)
            assert error.abs().max() <= 3.5 / math.sqrt(dims)
            assert error.pow(2).mean().sqrt() <= 3 / math.sqrt(dims)
            # The standard error of an estimated deviation from n pairs is 1 / sqrt(2 n) of it.
            assert abs(error.std().item() / expected - 1) < 4 / math.sqrt(2 * pairs)


def test_inner_products_have_the_mean_and_variance_of_the_dense_projection():
    generator = torch.Generator().manual_seed(5)
    first, second = torch.randn(2, 1, 300, generator=generator, dtype=torch.float64)
    true = (first @ second.T).item()
    spread = first.norm() ** 2 * second.norm() ** 2 + true**2 - 2 * (first**2 * second**2).sum()
    for make in (RademacherProjector, SparseProjector):
        found = []
        for seed in range(400):
            both = make((300,), 32, seed).project([(0, torch.cat([first, second]))], 2)
            found.append((both[0] @ both[1]).item())
        found = torch.tensor(found)
        expected = math.sqrt(spread / 32)
        assert abs(found.mean().item() - true) < 4 * expected / math.sqrt(400)
        assert abs(found.std().item() / expected - 1) < 4 / math.sqrt(800)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 50), st.integers(1, 6), st.integers(0, 99))
def test_projection_is_linear_and_a_single_entry_keeps_its_length(sizes, dims, nonzeros, seed):
    projector = SparseProjector(tuple(sizes), dims, seed, nonzeros)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(3, sum(sizes), generator=generator, dtype=torch.float64)
    values[2] = 2 * values[0] - values[1]
    found = projector.project(enumerate(values.split(sizes, dim=1)), 3)
    assert found.shape == (3, projector.width)
    assert torch.allclose(found[2], 2 * found[0] - found[1], atol=1e-10)
    unit = torch.zeros(1, sum(sizes))
    unit[0, -1] = 3.0
    assert projector.project(enumerate(unit.split(sizes, dim=1)), 1).norm().item() == pytest.approx(3.0, rel=1e-6)


def test_order_batch_missing_tensors_and_global_state(small_blocks):
    projector, values = SparseProjector(SIZES, 200, seed=9), gradients(6)
    before = torch.random.get_rng_state()
    together = projector.project(pieces(values), 6)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(projector.project(reversed(pieces(values)), 6), together)
    assert torch.equal(torch.cat([projector.project(pieces(row[None]), 1) for row in values]), together)
    values[:, SIZES[0] : SIZES[0] + SIZES[1]] = 0
    some = [piece for piece in pieces(values) if piece[0] != 1]
    assert torch.equal(projector.project(some, 6), projector.project(pieces(values), 6))
    assert torch.equal(projector.project([], 2), torch.zeros(2, 200))


def test_types_identity_and_flops():
    values = gradients(3)
    projector = SparseProjector(SIZES, 100)
    assert projector.project(pieces(values.to(torch.bfloat16)), 3).dtype == torch.float32
    assert projector.flops == 2 * sum(SIZES)
    whole = SparseProjector(SIZES, sum(SIZES))
    assert (whole.is_identity, whole.width, whole.flops) == (True, sum(SIZES), 0)
    assert torch.equal(whole.project(reversed(pieces(values)), 3), values)


def test_fingerprint_names_the_matrix():
    base = SparseProjector(SIZES, 64)
    assert base.fingerprint() == SparseProjector(SIZES, 64).fingerprint()
    others = [
        SparseProjector(SIZES, 65),
        SparseProjector(SIZES, 64, seed=1),
        SparseProjector(SIZES, 64, nonzeros=2),
        RademacherProjector(SIZES, 64),
    ]
    assert len({each.fingerprint() for each in (base, *others)}) == 5
    assert not torch.equal(dense(base), dense(others[1]))


def test_wrong_numbers_and_shapes_are_refused():
    for changes in ({"dims": 0}, {"nonzeros": 0}, {"sizes": ()}):
        with pytest.raises(OptionError, match="dims >= 1, nonzeros >= 1"):
            SparseProjector(**{"sizes": SIZES, "dims": 8, **changes})
    with pytest.raises(OptionError, match=r"must be \[2, 700\]"):
        SparseProjector(SIZES, 64).project([(0, torch.zeros(2, 699))], 2)
