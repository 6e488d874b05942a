import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_eff.engines.directions import Gaussian, Rademacher, Shard
from hf_eff.engines.low_rank_directions import LowRank
from hf_eff.engines.sparse_directions import SparseGaussian, thresholds_of
from hf_eff.engines.subspace_directions import Subspace
from hf_eff.engines.zeroth_order import Term, update
from hf_eff.numerics.subspace_matrices import nearest_square, squared

M, N, R, WINDOW = 24, 20, 3, 5


def low_rank(seed=0, rank=R, window=WINDOW):
    return LowRank(seed, rank, window)


def subspace(seed=0, rank=R, window=WINDOW):
    return Subspace(seed, rank, window)


BOTH = pytest.mark.parametrize("family", [low_rank, subspace])


def sparse():
    return SparseGaussian(0, {"w": 0.7}, 64)


def gaussian():
    return Gaussian(0, 64)


def rademacher():
    return Rademacher(0, 64)


EVERY = pytest.mark.parametrize("family", [low_rank, subspace, sparse])


def draw(family, shape=(M, N), name="w", step=0, index=0, dtype=torch.float32):
    return family.add_(torch.zeros(shape, dtype=dtype), name, step, 1.0, draw=index)


def weights(shape=(M, N), dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_applied_direction_is_the_probed_one_at_every_step(family, dtype):
    """Also where factors are refreshed: the official code of LOZO applies another U there."""
    made, stored = family(), weights(dtype=dtype)
    for step in range(2 * WINDOW + 1):
        wide = stored.float() if dtype == torch.bfloat16 else stored
        probed = made.add_(torch.empty_like(wide), "w", step, 0.25, base=wide)
        moved = wide.clone()
        made.add_(moved, "w", step, 0.25, at=stored)
        assert torch.equal(moved, probed)
        narrow = made.add_(torch.empty_like(stored), "w", step, 0.25, base=stored)
        assert torch.equal(narrow, probed.to(dtype))


@BOTH
def test_an_update_moves_along_the_probed_direction_alone(family):
    made, stored = family(), weights(dtype=torch.float64)
    for step in (WINDOW - 1, WINDOW):
        z = draw(made, step=step, dtype=torch.float64)
        moved = stored.clone()
        update([("w", moved)], made, [Term(step, 0, 2.0)], step=step, lr=0.5)
        cosine = torch.cosine_similarity((stored - moved).flatten(), z.flatten(), dim=0)
        assert cosine > 1 - 1e-12


@BOTH
def test_a_window_of_updates_has_rank_r(family):
    made, moved = family(), weights(dtype=torch.float64)
    for window in (0, 1):
        start = moved.clone()
        for step in range(window * WINDOW, (window + 1) * WINDOW):
            terms = [Term(step, index, 1.0 + step) for index in (0, 1)]
            update([("w", moved)], made, terms, step=step, lr=1e-2)
        values = torch.linalg.svdvals(moved - start)
        assert (values[R:] < 1e-6 * values[0]).all()
        assert values[R - 1] > 1e-3 * values[0]
    whole = torch.linalg.svdvals(moved - weights(dtype=torch.float64))
    assert whole[2 * R - 1] > 1e-3 * whole[0]


def moments(made, count, gradient):
    """Mean of c z / scale and mean of its squared norm, over fresh windows, with their standard errors."""
    estimates = []
    for step in range(count):
        z = draw(made, gradient.shape, step=step).double()
        estimates.append((z * gradient).sum() * z * made.update_scale("w", gradient))
    stack = torch.stack(estimates)
    squares = stack.square().flatten(1).sum(1) / gradient.square().sum()
    return stack.mean(0), stack.std(0) / count**0.5, squares.mean(), squares.std() / count**0.5


@BOTH
def test_mean_of_the_estimate_is_the_gradient_and_its_square_that_of_the_theory(family):
    """E|g|^2 / |G|^2 is m n + 2 (m + n + r + 1) / r for U V^T / r, and m n (1 + 2 / r^2) in random subspaces."""
    m, n, r, count = 8, 6, 2, 1500
    gradient = torch.randn(m, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mean, error, square, spread = moments(family(rank=r, window=1), count, gradient)
    assert ((mean - gradient).abs() < 5 * error).all()
    expected = m * n + 2 * (m + n + r + 1) / r if family is low_rank else m * n * (1 + 2 / r**2)
    assert abs(square - expected) < 5 * spread
    assert spread < 0.15 * expected  # without 1 / r, the square would be r^2 as large


def test_matrices_have_the_factor_and_vectors_not():
    assert low_rank().update_scale("w", weights()) == 1 / R
    assert low_rank().update_scale("b", weights()[0]) == 1.0
    assert subspace().update_scale("w", weights()) == 1.0


def test_bases_are_orthonormal_and_stay_for_a_window():
    made, shape = subspace(), (M, N)
    for index in (0, 1):
        for basis, size in zip(made.bases("w", index, shape, torch.device("cpu")), shape, strict=True):
            assert basis.shape == (size, R)
            assert (basis.t() @ basis - torch.eye(R)).norm() < 1e-5
    first, again = (made.bases("w", 0, shape, torch.device("cpu"))[0] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, made.bases("w", 1, shape, torch.device("cpu"))[0])
    assert not torch.equal(first, made.bases("v", 0, shape, torch.device("cpu"))[0])


def test_updates_stay_in_the_subspaces_of_their_window():
    made, moved = subspace(), weights(dtype=torch.float64)
    start = moved.clone()
    for step in range(WINDOW):
        update([("w", moved)], made, [Term(step, 0, 1.0)], step=step, lr=0.1)
    left, right = (each.double() for each in made.bases("w", 0, (M, N), torch.device("cpu")))
    delta = moved - start
    assert (delta - left @ (left.t() @ delta)).norm() < 1e-6 * delta.norm()
    assert (delta - delta @ right @ right.t()).norm() < 1e-6 * delta.norm()
    assert delta.norm() > 1


def test_a_subspace_direction_has_the_norm_of_a_dense_one():
    norms = torch.stack([draw(subspace(), step=step).square().sum() for step in range(400)])
    assert abs(norms.mean() - M * N) < 5 * norms.std() / 20


def test_a_cache_without_room_gives_the_same_directions(monkeypatch):
    kept = draw(subspace(), step=7)
    monkeypatch.setattr("hf_eff.engines.subspace_directions.CACHE_BYTES", 0)
    made = subspace()
    assert torch.equal(draw(made, step=7), kept)
    assert made.held_bytes() == 0
    monkeypatch.undo()
    assert torch.equal(draw(made, step=7), kept)
    assert made.held_bytes() == 4 * R * (M + N)
    draw(made, step=WINDOW * 3)
    assert made.held_bytes() == 4 * R * (M + N)  # of one window only


@EVERY
def test_other_random_numbers_do_not_matter(family):
    torch.manual_seed(1)
    first = [draw(family(), step=step) for step in (0, WINDOW)]
    torch.manual_seed(2)
    torch.rand(1000)
    before = torch.get_rng_state()
    made = family()
    second = [draw(made, step=step) for step in (WINDOW, 0)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


@BOTH
def test_number_of_threads_does_not_matter(family):
    threads, drawn = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            drawn.append(draw(family(rank=8), (60, 12288)))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


@BOTH
@pytest.mark.parametrize("other", [{"seed": 1}, {"name": "v"}, {"step": 1}, {"step": WINDOW}, {"index": 1}])
def test_other_keys_give_other_directions(family, other):
    other = dict(other)
    y = draw(family(seed=other.pop("seed", 0), rank=8), **other)
    assert torch.cosine_similarity(y.flatten(), draw(family(rank=8)).flatten(), dim=0).abs() < 0.5


@BOTH
def test_vectors_and_small_matrices_are_dense(family):
    for shape in ((50,), (R, 1), (1, 7)):
        assert torch.equal(draw(family(), shape), draw(Gaussian(0), shape))
        assert family().update_scale("w", torch.zeros(shape)) == 1.0
    assert torch.linalg.matrix_rank(draw(family())) == R


@BOTH
def test_more_dimensions_are_a_matrix_of_the_first_one(family):
    assert torch.equal(draw(family(), (M, 4, 5)).view(M, 20), draw(family(), (M, 20)))


@BOTH
def test_memory_layout_does_not_matter(family):
    made, plain = family(), weights()
    turned = plain.t().contiguous().t()
    expected = made.add_(plain.clone(), "w", 0, 0.5)
    assert torch.equal(made.add_(turned, "w", 0, 0.5), expected)
    sliced = torch.cat([plain, plain], 1)[:, :N]
    assert torch.equal(made.add_(torch.empty(M, N), "w", 0, 0.5, base=sliced), expected)


def test_thin_matrices_are_reshaped_for_subspaces():
    assert squared((8, 576), 8) == (64, 72)
    assert squared((64, 576), 8) == (64, 576)
    z = draw(subspace(), (4, 90))  # 360 = 18 x 20
    assert torch.linalg.matrix_rank(z.view(18, 20)) == R
    assert torch.linalg.matrix_rank(z) > R


@given(st.integers(1, 4000))
def test_nearest_square_is_the_closest_pair(entries):
    short, long = nearest_square(entries)
    assert short * long == entries
    assert short <= long
    assert not any(entries % side == 0 for side in range(short + 1, math.isqrt(entries) + 1))


@pytest.mark.parametrize("family", [low_rank, subspace, sparse, gaussian, rademacher])
@pytest.mark.parametrize("shape", [(24, 20), (4, 90), (13, 5, 4), (17,), (5, 13)])
@settings(max_examples=8, deadline=None)
@given(cut=st.integers(0, 24))
def test_parts_of_a_parameter_take_their_part_of_its_direction(family, shape, cut):
    whole, split = weights(shape), min(cut, shape[0])
    expected = family().add_(torch.empty(shape), "w", 3, 0.5, base=whole)
    for part in (slice(0, split), slice(split, shape[0])):
        made, held = family(), whole[part].clone()
        made.shards["w"] = Shard(shape, part.start)
        torch.testing.assert_close(made.add_(held, "w", 3, 0.5), expected[part], rtol=1e-5, atol=1e-5)
        assert made.update_scale("w", held) == family().update_scale("w", whole)


def test_small_weights_move_and_large_ones_rest():
    stored = weights((40, 50))
    thresholds = thresholds_of({"w": stored, "norm": stored[0], "zero": torch.zeros(4, 4)}, 0.25)
    assert set(thresholds) == {"w"}
    assert (stored.abs() <= thresholds["w"]).float().mean() == 0.25
    made = SparseGaussian(0, thresholds)
    z = made.add_(torch.zeros(40, 50), "w", 0, 1.0, at=stored)
    small = stored.abs() <= thresholds["w"]
    assert torch.equal(z, torch.where(small, draw(Gaussian(0), (40, 50)), 0.0))
    assert thresholds_of({"w": stored}, 1.0) == {}


def test_every_term_of_an_update_takes_the_mask_of_the_weights_before_it():
    stored, made = weights((40, 50)), SparseGaussian(0, {"w": 0.3})
    moved = stored.clone()
    update([("w", moved)], made, [Term(0, 0, 3.0), Term(0, 1, -2.0)], step=0, lr=0.5, weight_decay=0.4)
    z = [made.add_(torch.zeros(40, 50), "w", 0, 1.0, at=stored, draw=index) for index in (0, 1)]
    torch.testing.assert_close(moved, stored * 0.8 - 0.5 * (3 * z[0] - 2 * z[1]))
    assert (stored.abs() > 0.3).any()
