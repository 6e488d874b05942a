import math

import numpy as np
import pytest
import torch

from hf_eff.engines.directions import CHUNK, FAMILIES, Gaussian, Rademacher

BOTH = pytest.mark.parametrize("family", [Gaussian, Rademacher])
MANY = 3 * CHUNK // 2 + 17  # a whole chunk and an odd part of one


def draw(family, shape, name="w", step=0, scale=1.0, index=0):
    return family.add_(torch.zeros(shape), name, step, scale, draw=index)


@BOTH
def test_entries_have_mean_zero_and_variance_one(family):
    z = draw(family(seed=0), MANY).double()
    assert abs(z.mean()) < 5 / math.sqrt(MANY)
    assert abs(z.square().mean() - 1) < 5 * math.sqrt(2 / MANY)


def test_rademacher_entries_are_signs():
    z = draw(Rademacher(seed=0), MANY)
    assert torch.equal(z.abs(), torch.ones(MANY))


def test_rademacher_signs_are_unrelated_within_a_chunk():
    z = draw(Rademacher(seed=0), CHUNK).double()
    for lag in (1, 2, 31, 32, 64, CHUNK // 64, CHUNK // 32, CHUNK // 32 + 1, CHUNK // 2):
        assert abs((z * z.roll(lag)).mean()) < 5 / math.sqrt(CHUNK), lag


def test_gaussian_entries_follow_the_normal_distribution():
    z = draw(Gaussian(seed=0), MANY).double().sort().values
    exact = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    ranks = torch.arange(1, MANY + 1, dtype=torch.float64) / MANY
    assert (exact - ranks).abs().max() < 1.95 / math.sqrt(MANY)  # Kolmogorov-Smirnov at 0.1%
    for threshold, tail in ((3.0, 2.699796e-3), (4.0, 6.334248e-5)):
        found = (z.abs() > threshold).double().mean()
        assert abs(found - tail) < 5 * math.sqrt(tail / MANY)


def test_gaussian_neighbours_are_independent_also_in_size():
    z = draw(Gaussian(seed=0), CHUNK).double()
    for lag in (1, 2, 3, 4, 2**17):  # four entries are made of one random word
        first, second = z[:-lag], z[lag:]
        for x, y in ((first, second), (first.square() - 1, second.square() - 1), (first.abs(), second)):
            covariance = ((x - x.mean()) * (y - y.mean())).mean() / (x.std() * y.std())
            assert abs(covariance) < 5 / math.sqrt(CHUNK - lag)


@BOTH
@pytest.mark.parametrize(
    "other",
    [{"name": "v"}, {"step": 1}, {"index": 1}, {"seed": 1}, {"seed": 2**32}],
    ids=["name", "step", "draw", "seed", "high bits of the seed"],
)
def test_other_keys_give_unrelated_directions(family, other):
    other = dict(other)
    z = draw(family(seed=0), CHUNK)
    y = draw(family(seed=other.pop("seed", 0)), CHUNK, **other)
    assert abs((z * y).mean()) < 5 / math.sqrt(CHUNK)


@BOTH
def test_direction_depends_on_the_name_and_not_on_the_order(family):
    forwards, backwards = family(seed=3), family(seed=3)
    names = ["a", "b", "c"]
    first = {name: draw(forwards, (5, 7), name) for name in names}
    second = {name: draw(backwards, (5, 7), name) for name in reversed(names)}
    assert all(torch.equal(first[name], second[name]) for name in names)


@BOTH
@pytest.mark.parametrize("shape", [(1,), (2,), (63,), (64, 3), (130,)])
def test_probe_and_update_share_one_direction(family, shape):
    made = family(seed=0)
    z = draw(made, shape)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    probed = made.add_(torch.empty(shape), "w", 0, 0.25, base=weight)
    assert torch.equal(probed, torch.add(weight, z, alpha=0.25))
    moved = made.add_(weight.clone(), "w", 0, -0.5)
    assert torch.equal(moved, torch.add(weight, z, alpha=-0.5))


@BOTH
def test_each_chunk_has_its_own_stream(family):
    made = family(seed=0, chunk=128)
    long, short = draw(made, 300), draw(made, 256)
    assert torch.equal(long[:256], short)
    assert not torch.equal(long[:44], long[128:172])
    assert not torch.equal(draw(family(seed=0, chunk=64), 300), long)
    assert made.describe(torch.device("cpu"))["chunk"] == 128


@pytest.mark.parametrize("chunk", [0, 32, 100])
def test_chunk_must_be_a_multiple_of_64(chunk):
    with pytest.raises(ValueError, match="multiple of 64"):
        Gaussian(seed=0, chunk=chunk)


@BOTH
def test_memory_layout_does_not_matter(family):
    made = family(seed=0, chunk=64)
    plain = torch.arange(60.0).view(6, 10)
    turned = plain.t().contiguous().t()
    assert not turned.is_contiguous()
    assert torch.equal(made.add_(turned, "w", 0, 0.5), made.add_(plain.clone(), "w", 0, 0.5))
    sliced = torch.arange(120.0).view(6, 20)[:, ::2]
    base = sliced.clone()
    made.add_(sliced, "w", 0, 0.5)
    assert torch.equal(sliced, made.add_(base, "w", 0, 0.5))


@BOTH
def test_narrow_weights_are_perturbed_in_fp32_and_rounded_once(family):
    made = family(seed=0)
    base = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    exact = torch.add(base.float(), draw(made, 1000), alpha=1e-3)
    assert torch.equal(made.add_(torch.empty_like(base), "w", 0, 1e-3, base=base), exact.to(torch.bfloat16))


@BOTH
def test_wide_weights_are_perturbed_in_fp64(family):
    made = family(seed=0)
    base = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = base + 1e-3 * draw(made, 1000).double()
    assert torch.allclose(made.add_(torch.empty_like(base), "w", 0, 1e-3, base=base), exact, rtol=0, atol=1e-15)


@BOTH
def test_number_of_threads_does_not_matter(family):
    threads = torch.get_num_threads()
    drawn = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            drawn.append(draw(family(seed=0), MANY))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


@BOTH
def test_global_random_states_are_left_alone(family):
    before, numeric = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    draw(family(seed=0), 1000)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numeric).all()  # noqa: NPY002


def test_families_are_listed_by_name():
    assert {name: family(0).describe(torch.device("cpu"))["name"] for name, family in FAMILIES.items()} == {
        "gaussian": "gaussian",
        "rademacher": "rademacher",
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@BOTH
def test_accelerator_draws_the_same_direction_again(family):
    device = torch.device("cuda")
    first = family(seed=0).add_(torch.zeros(MANY, device=device), "w", 0, 1.0)
    again = family(seed=0).add_(torch.zeros(MANY, device=device), "w", 0, 1.0)
    assert torch.equal(first, again)
    assert abs(first.mean()) < 5 / math.sqrt(MANY)
    if family is Rademacher:
        assert torch.equal(first.cpu(), draw(family(seed=0), MANY))
