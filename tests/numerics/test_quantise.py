from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_eff.errors import OptionError
from hf_eff.numerics.quantise import BITS, Quantiser


def ranks(values):
    return np.argsort(np.argsort(values))


def spearman(first, second):
    return np.corrcoef(ranks(first), ranks(second))[0, 1]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(BITS), st.integers(1, 6), st.integers(1, 41), st.integers(0, 2**31))
def test_unpack_undoes_pack_for_any_width(bits, rows, width, seed):
    quantiser = Quantiser(bits)
    rng = np.random.default_rng(seed)
    codes = rng.integers(-quantiser.largest, quantiser.largest + 1, size=(rows, width))
    codes = np.where(codes == 0, 1, codes) if bits == 1 else codes
    packed = quantiser.pack(torch.from_numpy(codes.astype(np.int8)))
    assert packed.dtype == np.uint8
    assert packed.shape == (rows, math.ceil(width * bits / 8))
    assert np.array_equal(quantiser.unpack(packed, width).numpy(), codes)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_absmax_codes_are_within_half_a_step(bits, scale):
    quantiser = Quantiser(bits, "absmax")
    values = scale * torch.randn(20, 33, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    codes = quantiser.codes(values)
    largest = 2 ** (bits - 1) - 1
    assert (codes - values * quantiser.scales(values)).abs().max() <= 0.5
    assert torch.allclose(quantiser.scales(values)[:, 0], largest / values.abs().amax(dim=1))
    assert (codes.abs().amax(dim=1) == largest).all()


def test_ternary_and_sign_codes_by_hand():
    values = torch.tensor([[3.0, -2.0, 0.5, 0.0, -0.7]])  # mean magnitude 1.24, threshold 0.868
    assert Quantiser(2).codes(values).tolist() == [[1, -1, 0, 0, 0]]
    assert Quantiser(2, "absmax").codes(values).tolist() == [[1, -1, 0, 0, 0]]
    assert Quantiser(1).codes(values).tolist() == [[1, -1, 1, 1, -1]]
    assert torch.equal(Quantiser(1).codes(values), Quantiser(1, "absmax").codes(values))
    assert not Quantiser(4).codes(torch.zeros(2, 5)).any()


def test_signs_follow_the_arcsine_law():
    """E[cos of signs] = (2 / pi) arcsin(c), within 3 / sqrt(d)."""
    dims, pairs = 2048, 50
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(pairs, dims, generator=generator)
    for cosine in (-0.6, 0.0, 0.3, 0.9):
        second = cosine * first + math.sqrt(1 - cosine**2) * torch.randn(pairs, dims, generator=generator)
        signs = [Quantiser(1).codes(each).float() for each in (first, second)]
        found = (signs[0] * signs[1]).mean(dim=1)
        expected = 2 / math.pi * math.asin(cosine)
        assert (found - expected).abs().max() < 4.5 / math.sqrt(dims)
        assert abs(found.mean().item() - expected) < 3 / math.sqrt(dims)


def test_ranks_survive_and_signs_beat_absmax_at_two_bits():
    """Rows near a target by different amounts, as projected gradients are; what two bits of absmax keep is little."""
    rows, dims = 2000, 4096
    generator = torch.Generator().manual_seed(0)
    target = torch.nn.functional.normalize(torch.randn(dims, generator=generator), dim=0)
    noise = torch.nn.functional.normalize(torch.randn(rows, dims, generator=generator), dim=1)
    pull = 0.01 * torch.randn(rows, 1, generator=generator)
    values = torch.nn.functional.normalize(pull * target + noise, dim=1)
    exact = (values @ target).numpy()

    def kept(bits, rule="auto"):
        codes = torch.nn.functional.normalize(Quantiser(bits, rule).codes(values).float(), dim=1)
        return spearman((codes @ target).numpy(), exact)

    assert kept(8) > 0.999
    assert kept(4) >= 0.98
    assert kept(2) > kept(1) > kept(2, "absmax")
    assert kept(1) - kept(2, "absmax") > 0.1
    zeros = (Quantiser(2, "absmax").codes(values) == 0).float().mean().item()
    assert zeros > 0.9 > 0.55 > (Quantiser(2).codes(values) == 0).float().mean().item()


def test_unknown_bits_and_rules_are_refused():
    for arguments in ((3, "auto"), (1, "mine")):
        with pytest.raises(OptionError, match=r"bits in \[8, 4, 2, 1\]"):
            Quantiser(*arguments)
