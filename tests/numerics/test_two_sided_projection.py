from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cosine_similarity

from hf_eff.errors import OptionError
from hf_eff.numerics.keyed_random import make_key, random_words
from hf_eff.numerics.projection import RademacherProjector
from hf_eff.numerics.two_sided_projection import TwoSidedProjector

SHAPES = ((8, 60), (40, 8), (30, 50), (2, 3))
SIZES = [outputs * inputs for outputs, inputs in SHAPES]


def matrices(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, size, generator=generator, dtype=torch.float64) for size in SIZES]


def literal(projector, values):
    """P_o G P_i^T of every weight, laid out under its signs and shift, and added up."""
    total = torch.zeros(len(values[0]), projector.dims, dtype=torch.float64)
    for index, ((outputs, inputs), flat) in enumerate(zip(projector.shapes, values, strict=True)):
        sides = []
        for side, size in enumerate((outputs, inputs)):
            kept = projector.kept(index)[side]
            one = RademacherProjector((size,), kept, make_key(projector.seed, index, side))
            eye = torch.eye(size, dtype=torch.float64)
            sides.append(one.project([(0, eye)], size).T if kept < size else eye)
        core = sides[0] @ flat.view(-1, outputs, inputs) @ sides[1].T
        core = core.flatten(1)
        words = random_words(torch.tensor([make_key(projector.seed, index, 2)]), core.shape[1] + 1)[0].tolist()
        for entry in range(core.shape[1]):
            sign = -1 if words[entry + 1] < 0 else 1
            total[:, (entry + words[0] % projector.dims) % projector.dims] += sign * core[:, entry]
    return total


@pytest.mark.parametrize("dims", [1, 5, 64, 500])
def test_equals_the_definition(dims):
    projector, values = TwoSidedProjector(SHAPES, dims, seed=4), matrices(3)
    found = projector.project(enumerate(values), 3)
    assert found.shape == (3, dims)
    assert torch.allclose(found, literal(projector, values), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dims", [64, 10**6])
def test_slopes_and_inputs_need_not_be_written_out(dims):
    generator = torch.Generator().manual_seed(1)
    projector, parts, whole = TwoSidedProjector(SHAPES, dims), [], []
    for index, (outputs, inputs) in enumerate(SHAPES):
        slopes = torch.randn(3, 7, outputs, generator=generator, dtype=torch.float64)
        seen = torch.randn(3, 7, inputs, generator=generator, dtype=torch.float64)
        parts.append((index, slopes, seen))
        whole.append((index, torch.einsum("bto,bti->boi", slopes, seen).flatten(1)))
    assert torch.allclose(projector.project_factors(parts, 3), projector.project(whole, 3), rtol=1e-10, atol=1e-10)


def test_kept_sides_fit_into_the_width():
    for dims in (1, 7, 64, 1000, 4096):
        projector = TwoSidedProjector(SHAPES, dims)
        for index, shape in enumerate(SHAPES):
            kept = projector.kept(index)
            assert 1 <= kept[0] * kept[1] <= dims
            assert kept[0] <= shape[0]
            assert kept[1] <= shape[1]
    assert TwoSidedProjector(((8, 576),), 1024).kept(0) == (8, 128)
    assert TwoSidedProjector(((576, 8),), 1024).kept(0) == (128, 8)
    assert TwoSidedProjector(((576, 576),), 1024).kept(0) == (32, 32)


def low_rank(shapes, pairs, cosine, generator):
    """Gradients of rank one in every weight: the hard case of a two-sided sketch."""
    first, second = [], []
    for outputs, inputs in shapes:
        sides = [torch.randn(pairs, size, generator=generator) for size in (outputs, inputs)]
        noise = [torch.randn(pairs, size, generator=generator) for size in (outputs, inputs)]
        root = math.sqrt(cosine)
        others = [root * side + math.sqrt(1 - cosine) * more for side, more in zip(sides, noise, strict=True)]
        for store, (left, right) in ((first, sides), (second, others)):
            store.append((left[:, :, None] * right[:, None, :]).flatten(1))
    return first, second


@pytest.mark.parametrize("cosine", [0.0, 0.5])
def test_cosine_error_of_many_weights_is_within_the_bound(cosine):
    shapes, pairs = ((8, 96), (96, 8), (40, 48)) * 20, 100
    generator = torch.Generator().manual_seed(0)
    first, second = low_rank(shapes, pairs, cosine, generator)
    true = cosine_similarity(torch.cat(first, dim=1), torch.cat(second, dim=1))
    for dims in (256, 1024):
        projector = TwoSidedProjector(shapes, dims, seed=1)
        error = cosine_similarity(
            projector.project(enumerate(first), pairs), projector.project(enumerate(second), pairs)
        )
        error = error - true
        assert error.abs().max() <= 4 / math.sqrt(dims)
        assert error.pow(2).mean().sqrt() <= 1.5 * (1 - cosine**2) / math.sqrt(dims)


def test_one_weight_of_rank_one_is_the_documented_worst_case():
    generator = torch.Generator().manual_seed(2)
    first, second = low_rank(((400, 400),), 200, 0.5, generator)
    true = cosine_similarity(first[0], second[0])
    errors = {}
    for name, projector in (
        ("two", TwoSidedProjector(((400, 400),), 1024)),
        ("one", RademacherProjector((160_000,), 1024)),
    ):
        found = cosine_similarity(*(projector.project([(0, each[0])], 200) for each in (first, second)))
        errors[name] = (found - true).pow(2).mean().sqrt().item()
    assert errors["two"] > 1.5 * errors["one"]
    assert errors["two"] < math.sqrt(2) / 1024**0.25


def test_types_identity_flops_and_missing_weights():
    values = matrices(2)
    whole = TwoSidedProjector(SHAPES, 10**6)
    assert (whole.is_identity, whole.width, whole.flops) == (True, sum(SIZES), 0)
    assert torch.equal(whole.project(enumerate(values), 2), torch.cat(values, dim=1))
    assert TwoSidedProjector(((8, 576),), 1024).flops == 2 * 8 * 576 * 128
    assert TwoSidedProjector(((50, 60),), 16).flops == 2 * 50 * 60 * 4 + 2 * 50 * 4 * 4
    projector = TwoSidedProjector(SHAPES, 32)
    assert torch.equal(projector.project([], 2), torch.zeros(2, 32))
    assert projector.project([(0, values[0].to(torch.bfloat16))], 2).dtype == torch.float32


def test_fingerprint_and_refusals():
    base = TwoSidedProjector(SHAPES, 64)
    assert base.fingerprint() == TwoSidedProjector(SHAPES, 64).fingerprint()
    others = [TwoSidedProjector(SHAPES, 65), TwoSidedProjector(SHAPES, 64, 1), TwoSidedProjector(SHAPES[:3], 64)]
    assert len({each.fingerprint() for each in (base, *others)}) == 4
    with pytest.raises(OptionError, match="dims >= 1 and matrices"):
        TwoSidedProjector(SHAPES, 0)
    with pytest.raises(OptionError, match=r"must be \[2, 480\]"):
        base.project([(0, torch.zeros(2, 479))], 2)
