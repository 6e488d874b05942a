"""Compiled sums against the torch code that they stand in for."""

import logging
import shutil

import pytest
import torch

from hf_eff.engines import directions, keyed_sums
from hf_eff.engines.directions import CHUNK, Gaussian, Rademacher, Shard
from hf_eff.engines.sparse_directions import SparseGaussian
from hf_eff.hardware import compiled
from hf_eff.hardware.compiled import load_c

needs_compiler = pytest.mark.skipif(keyed_sums.keyed_sums() is None, reason="no C compiler that shares torch's OpenMP")
FAMILIES = {
    "rademacher": Rademacher,
    "gaussian": Gaussian,
    "sparse": lambda *words: SparseGaussian(words[0], {"w": 0.5}, *words[1:]),
}


def weights_of(shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def summed(family, base, monkeypatch, *, by_torch=False, inplace=False, **options):
    with monkeypatch.context() as patch:
        if by_torch:
            patch.setattr(directions, "keyed_sums", lambda: None)
        out = base.clone() if inplace else torch.full_like(base, 7.0)
        return family.add_(out, "w", 5, 0.3, base=None if inplace else base, **options)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5,), (31, 3), (4096,), (777, 1300), (CHUNK + 65,)])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_compiled_sums_equal_those_of_torch_bit_for_bit(family, shape, dtype, monkeypatch):
    base = weights_of(shape, dtype)
    expected = summed(family(3), base, monkeypatch, by_torch=True, draw=2)
    assert torch.equal(summed(family(3), base, monkeypatch, draw=2), expected)
    assert torch.equal(summed(family(3), base, monkeypatch, inplace=True, draw=2), expected)
    assert not torch.equal(expected, base)


@needs_compiler
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("chunk", [64, 640, 2**17])
def test_a_part_of_a_parameter_equals_that_of_the_whole(family, chunk, monkeypatch):
    whole = weights_of((300, 411))
    expected = summed(family(3, chunk), whole, monkeypatch, by_torch=True)
    for first, last in ((0, 300), (0, 1), (17, 18), (123, 299), (299, 300)):
        made = family(3, chunk)
        made.shards = {"w": Shard((300, 411), first)}
        assert torch.equal(summed(made, whole[first:last].contiguous(), monkeypatch), expected[first:last])


@needs_compiler
def test_the_compiled_code_is_what_runs(monkeypatch):
    monkeypatch.setattr(Rademacher, "_entries", None)
    monkeypatch.setattr(Gaussian, "_entries", None)
    for family in FAMILIES.values():
        summed(family(3), weights_of(100), monkeypatch)


@needs_compiler
def test_masks_compare_as_torch_does_and_let_nan_through(monkeypatch):
    base = torch.tensor([0.5, -0.5, 0.50001, torch.nan, torch.inf, -0.0])
    expected = summed(FAMILIES["sparse"](3), base, monkeypatch, by_torch=True)
    found = summed(FAMILIES["sparse"](3), base, monkeypatch)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert (found[:2] != base[:2]).all()
    assert found[2] == base[2]


@needs_compiler
def test_a_graph_learns_that_its_weights_have_moved():
    weights = torch.ones(8, requires_grad=True)
    loss = (weights * weights).sum()
    with torch.no_grad():
        Rademacher(0).add_(weights, "w", 0, 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "tensors",
    [
        (torch.zeros(4, dtype=torch.float64),),
        (torch.zeros(4, dtype=torch.float16),),
        (torch.zeros(4), torch.zeros(4, dtype=torch.bfloat16)),
        (torch.zeros(8)[::2],),
        (torch.zeros(4, device="meta"),),
        (torch.nn.Parameter(torch.zeros(4)),),
    ],
    ids=["fp64", "fp16", "two types", "strided", "meta", "subclass"],
)
@needs_compiler
def test_other_tensors_are_left_to_torch(tensors):
    assert not keyed_sums.keyed_sums().takes(*tensors)


@pytest.mark.parametrize("command", ["hf-eff-no-such-compiler", "false"])
def test_without_a_compiler_torch_does_the_work(command, monkeypatch, caplog):
    monkeypatch.setenv("CC", command)
    with caplog.at_level(logging.INFO, logger=compiled.__name__):
        assert load_c(keyed_sums.SOURCE) is None
    assert "keyed_sums.c is not compiled, torch does its work more slowly" in caplog.text


def test_without_a_compiler_on_the_path(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    assert load_c(keyed_sums.SOURCE) is None


@needs_compiler
def test_sums_that_round_otherwise_are_not_used(monkeypatch):
    def twice(self, out, base, weights, key, low, scale, table, limit):
        named = torch.zeros(len(out), dtype=torch.long)
        out.copy_(base + (scale * table[named]))

    monkeypatch.setattr(keyed_sums.KeyedSums, "add_quantiles_", twice)
    assert keyed_sums.keyed_sums.__wrapped__() is None
