from __future__ import annotations

import math

import pytest
import torch

from hf_eff.errors import OptionError
from hf_eff.numerics import projection
from hf_eff.numerics.projection import COLUMN_BLOCK, RademacherProjector

SIZES = (700, 3, 1300)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that every tensor spans several."""
    monkeypatch.setattr(projection, "ROW_BLOCK", 256)
    monkeypatch.setattr(projection, "_CPU_ENTRIES", 100 * COLUMN_BLOCK)


def dense(projector):
    """R in one piece, put together from its blocks."""
    tensors = []
    for index, size in enumerate(projector.sizes):
        rows = []
        for first in range(0, size, projection.ROW_BLOCK):
            range_ = slice(first, min(first + projection.ROW_BLOCK, size))
            blocks = [
                projector.block(index, range_, slice(start, min(start + COLUMN_BLOCK, projector.dims)))
                for start in range(0, projector.dims, COLUMN_BLOCK)
            ]
            rows.append(torch.cat(blocks, dim=1))
        tensors.append(torch.cat(rows))
    return torch.cat(tensors)


def gradients(rows, seed=0, *, whole):
    """Random gradients; whole numbers make every sum exact in float64, whatever its order."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(rows, sum(SIZES), generator=generator, dtype=torch.float64)
    return (8 * draw).round() if whole else draw


def pieces(values):
    return list(enumerate(values.split(SIZES, dim=1)))


@pytest.mark.parametrize("dims", [1, 64, 100, 512, 513, 1100])
def test_equals_the_dense_matrix_of_the_same_blocks_bit_for_bit(small_blocks, dims):
    projector = RademacherProjector(SIZES, dims, seed=3)
    matrix = dense(projector)
    assert matrix.shape == (sum(SIZES), dims)
    assert set(matrix.unique().tolist()) <= {-1.0, 1.0}
    values = gradients(5, whole=True)
    assert torch.equal(projector.project(pieces(values), 5), (values @ matrix.double()) / math.sqrt(dims))


def test_float32_accumulates_to_rounding(small_blocks):
    projector = RademacherProjector(SIZES, 600, seed=3)
    values = gradients(4, whole=False)
    exact = projector.project(pieces(values), 4)
    single = projector.project(pieces(values.float()), 4)
    half = projector.project(pieces(values.to(torch.bfloat16)), 4)
    assert exact.dtype == torch.float64
    assert single.dtype == half.dtype == torch.float32
    assert torch.allclose(single.double(), exact, rtol=1e-4, atol=1e-4)


def test_cosine_error_follows_its_law():
    """The error of a cosine c has standard deviation (1 - c^2) / sqrt(d)."""
    size, pairs = 4000, 120
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(pairs, size, generator=generator)
    for cosine in (0.0, 0.5, 0.9):
        noise = torch.randn(pairs, size, generator=generator)
        second = cosine * first + math.sqrt(1 - cosine**2) * noise
        true = torch.nn.functional.cosine_similarity(first, second)
        for dims in (256, 1024):
            projector = RademacherProjector((size,), dims, seed=1)
            both = projector.project([(0, torch.cat([first, second]))], 2 * pairs)
            error = torch.nn.functional.cosine_similarity(*both.split(pairs)) - true
            expected = (1 - cosine**2) / math.sqrt(dims)
            # The standard error of an estimated deviation from n pairs is 1 / sqrt(2 n) of it.
            assert abs(error.std().item() / expected - 1) < 4 / math.sqrt(2 * pairs)
            assert abs(error.mean().item()) < 5 * expected / math.sqrt(pairs) + 1 / dims


def test_lengths_survive_in_the_mean():
    projector = RademacherProjector((3000,), 2048, seed=5)
    values = torch.randn(50, 3000, generator=torch.Generator().manual_seed(2))
    ratio = projector.project([(0, values)], 50).norm(dim=1) / values.norm(dim=1)
    assert abs(ratio.mean().item() - 1) < 5 / math.sqrt(2 * 2048 * 50) + 1e-3


def test_columns_and_blocks_of_the_matrix_are_uncorrelated(small_blocks):
    matrix = dense(RademacherProjector((2048,), 1024, seed=0)).double()
    gram = matrix.T @ matrix / 2048
    off = gram - torch.diag(torch.diag(gram))
    assert off.abs().max() < 6 / math.sqrt(2048)
    assert abs(off.pow(2).mean().item() * 2048 - 1) < 0.02


def test_order_batch_and_global_state_do_not_matter(small_blocks):
    projector = RademacherProjector(SIZES, 200, seed=9)
    values = gradients(6, whole=True)
    before = torch.random.get_rng_state()
    together = projector.project(pieces(values), 6)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(projector.project(reversed(pieces(values)), 6), together)
    apart = torch.cat([projector.project(pieces(row[None]), 1) for row in values])
    assert torch.equal(apart, together)


def test_a_tensor_left_out_counts_as_zero(small_blocks):
    projector = RademacherProjector(SIZES, 200)
    values = gradients(2, whole=True)
    values[:, SIZES[0] : SIZES[0] + SIZES[1]] = 0
    some = [piece for piece in pieces(values) if piece[0] != 1]
    assert torch.equal(projector.project(some, 2), projector.project(pieces(values), 2))
    assert torch.equal(projector.project([], 2), torch.zeros(2, 200))


def test_matrix_depends_on_seed_tensor_and_block():
    def corner(seed, index, row, column):
        projector = RademacherProjector((200_000, 200_000), 1024, seed)
        return projector.block(index, slice(row, row + 64), slice(column, column + 512))

    blocks = [corner(0, 0, 0, 0), corner(1, 0, 0, 0), corner(0, 1, 0, 0), corner(0, 0, 65_536, 0), corner(0, 0, 0, 512)]
    for i, one in enumerate(blocks):
        for other in blocks[:i]:
            assert abs((one * other).mean().item()) < 5 / math.sqrt(one.numel())
    assert torch.equal(corner(0, 0, 0, 0), blocks[0])


def test_nothing_is_projected_when_dims_cover_every_entry():
    projector = RademacherProjector(SIZES, sum(SIZES))
    values = gradients(3, whole=False)
    assert projector.is_identity
    assert projector.width == sum(SIZES)
    assert torch.equal(projector.project(reversed(pieces(values)), 3), values)
    assert not RademacherProjector(SIZES, sum(SIZES) - 1).is_identity


def test_fingerprint_names_the_matrix():
    base = RademacherProjector(SIZES, 64, seed=0)
    assert base.fingerprint() == RademacherProjector(SIZES, 64, seed=0).fingerprint()
    others = [RademacherProjector(SIZES, 65), RademacherProjector(SIZES, 64, seed=1), RademacherProjector((700, 3), 64)]
    assert len({base.fingerprint(), *(other.fingerprint() for other in others)}) == 4


def test_wrong_shapes_and_sizes_are_refused():
    with pytest.raises(OptionError, match="dims >= 1"):
        RademacherProjector(SIZES, 0)
    with pytest.raises(OptionError, match=r"must be \[2, 700\]"):
        RademacherProjector(SIZES, 64).project([(0, torch.zeros(2, 699))], 2)
