import math

import pytest
import torch

from hf_eff.engines.stochastic_rounding import round_stochastically_

COUNT = 20000


def rounded(value, seed=0, count=COUNT):
    wide = torch.full((count,), value)
    return round_stochastically_(torch.empty(count, dtype=torch.bfloat16), wide, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("value", [1.001, -1.001, 0.0213, -3.33e-5, 1e-39, 250.7])
def test_each_result_is_a_neighbour_and_the_mean_is_kept(value):
    wide = torch.tensor(value)
    toward_zero = (wide.view(torch.int32) & -(2**16)).view(torch.float32)
    away = (toward_zero.view(torch.int32) + 2**16).view(torch.float32)
    got = rounded(value).double()
    assert set(got.tolist()) <= {toward_zero.item(), away.item()}
    share = (wide.double() - toward_zero) / (away.double() - toward_zero)
    spread = (away.double() - toward_zero).abs() * math.sqrt(share * (1 - share) / COUNT)
    assert abs(got.mean() - wide.double()) < 5 * spread


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -0.5, math.inf, -math.inf, 2.0**-133])
def test_what_bf16_can_hold_is_exact(value):
    got = rounded(value, count=1000)
    assert (got == value).all()
    assert (torch.signbit(got) == (math.copysign(1, value) < 0)).all()


def test_nan_stays_nan():
    assert rounded(math.nan, count=10).isnan().all()


def test_equal_seeds_give_equal_bits_in_any_layout():
    wide = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    plain = round_stochastically_(torch.empty(30, 40, dtype=torch.bfloat16), wide, torch.Generator().manual_seed(1))
    turned = torch.empty(40, 30, dtype=torch.bfloat16).t()
    assert torch.equal(round_stochastically_(turned, wide, torch.Generator().manual_seed(1)), plain)
    other = round_stochastically_(torch.empty_like(plain), wide, torch.Generator().manual_seed(2))
    assert not torch.equal(plain, other)
