from __future__ import annotations

import pytest
import torch

from hf_eff.errors import OptionError
from hf_eff.numerics.adam_direction import AdamScaling


def trained(steps, scale=1.0, seed=0):
    """A weight and its Adam after ``steps`` random steps, in float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.nn.Parameter(torch.randn(40, generator=generator, dtype=torch.float64))
    optimizer = torch.optim.Adam([weight], lr=1e-2)
    for _ in range(steps):
        weight.grad = scale * torch.randn(40, generator=generator, dtype=torch.float64)
        optimizer.step()
    return weight, optimizer, scale * torch.randn(40, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("steps", [1, 3, 40])
def test_paper_variant_is_the_step_of_a_real_adam(steps, scale):
    weight, optimizer, gradient = trained(steps, scale)
    state = {key: value.clone() for key, value in optimizer.state[weight].items()}
    before = weight.detach().clone()
    weight.grad = gradient.clone()
    optimizer.step()
    step = (before - weight.detach()) / 1e-2
    found = AdamScaling("paper").direction(gradient[None].clone(), state["exp_avg"], state["exp_avg_sq"], steps)[0]
    assert torch.allclose(found, step, rtol=1e-6, atol=1e-9)


def test_without_any_step_the_paper_variant_is_nearly_the_sign():
    zero = torch.zeros(5, dtype=torch.float64)
    gradient = torch.tensor([[1e-3, -2.0, 0.5, 1e-4, 0.0]], dtype=torch.float64)
    found = AdamScaling("paper").direction(gradient.clone(), zero, zero, 0)
    assert torch.allclose(found, gradient / (gradient.abs() + 1e-8), rtol=1e-9)


def test_official_variant_is_the_literal_formula():
    weight, optimizer, gradient = trained(7, scale=1e-3)
    m, v = optimizer.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg_sq"]
    literal = (0.9 * m + 0.1 * gradient) / torch.sqrt(0.999 * v + 0.001 * gradient**2 + 1e-8)
    found = AdamScaling("official").direction(gradient[None].clone(), m, v, 7)[0]
    assert torch.allclose(found, literal, rtol=1e-12)


def test_official_variant_is_plain_momentum_where_gradients_are_tiny():
    weight, optimizer, gradient = trained(7, scale=1e-6)
    m, v = optimizer.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg_sq"]
    momentum = 0.9 * m + 0.1 * gradient
    cosine = torch.nn.functional.cosine_similarity
    official = AdamScaling("official").direction(gradient[None].clone(), m, v, 7)[0]
    paper = AdamScaling("paper").direction(gradient[None].clone(), m, v, 7)[0]
    assert cosine(official, momentum, dim=0) > 1 - 1e-9
    assert cosine(paper, momentum, dim=0) < 0.99


def test_without_momentum_rows_share_no_direction():
    weight, optimizer, gradient = trained(7)
    m, v = optimizer.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg_sq"]
    scaling = AdamScaling("paper", include_momentum=False)
    assert torch.count_nonzero(scaling.direction(torch.zeros(1, 40, dtype=torch.float64), m, v, 7)) == 0
    up, down = (scaling.direction(sign * gradient[None], m, v, 7) for sign in (1, -1))
    assert torch.allclose(up, -down, rtol=1e-12)
    with_it = [AdamScaling("paper").direction(sign * gradient[None], m, v, 7) for sign in (1, -1)]
    assert not torch.allclose(with_it[0], -with_it[1], rtol=1e-2)


def test_none_is_the_gradient_and_other_words_are_refused():
    gradient = torch.randn(2, 3)
    assert AdamScaling("none").direction(gradient, gradient[0], gradient[0], 4) is gradient
    with pytest.raises(OptionError, match="adam_variant must be one of"):
        AdamScaling("adamw")
