from __future__ import annotations

import pytest
import torch

from hf_eff.errors import OptionError
from hf_eff.numerics.adam_direction import AdamScaling


def scaled(scaling, gradients, first, second, step):
    """Steps of a batch whose one tensor this is."""
    return scaling.at([first], [second], step)(0, gradients.clone())


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
    found = scaled(AdamScaling("paper"), gradient[None], state["exp_avg"], state["exp_avg_sq"], steps)[0]
    assert torch.allclose(found, step, rtol=1e-6, atol=1e-9)


def test_without_any_step_the_paper_variant_is_nearly_the_sign():
    zero = torch.zeros(5, dtype=torch.float64)
    gradient = torch.tensor([[1e-3, -2.0, 0.5, 1e-4, 0.0]], dtype=torch.float64)
    found = scaled(AdamScaling("paper"), gradient, zero, zero, 0)
    assert torch.allclose(found, gradient / (gradient.abs() + 1e-8), rtol=1e-9)


def test_official_variant_is_the_literal_formula():
    weight, optimizer, gradient = trained(7, scale=1e-3)
    m, v = optimizer.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg_sq"]
    literal = (0.9 * m + 0.1 * gradient) / torch.sqrt(0.999 * v + 0.001 * gradient**2 + 1e-8)
    found = scaled(AdamScaling("official"), gradient[None], m, v, 7)[0]
    assert torch.allclose(found, literal, rtol=1e-12)


def test_official_variant_is_plain_momentum_where_gradients_are_tiny():
    weight, optimizer, gradient = trained(7, scale=1e-6)
    m, v = optimizer.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg_sq"]
    momentum = 0.9 * m + 0.1 * gradient
    cosine = torch.nn.functional.cosine_similarity
    official = scaled(AdamScaling("official"), gradient[None], m, v, 7)[0]
    paper = scaled(AdamScaling("paper"), gradient[None], m, v, 7)[0]
    assert cosine(official, momentum, dim=0) > 1 - 1e-9
    assert cosine(paper, momentum, dim=0) < 0.99


def test_without_momentum_rows_share_no_direction():
    weight, optimizer, gradient = trained(7)
    m, v = optimizer.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg_sq"]
    scaling = AdamScaling("paper", include_momentum=False)
    assert torch.count_nonzero(scaled(scaling, torch.zeros(1, 40, dtype=torch.float64), m, v, 7)) == 0
    up, down = (scaled(scaling, sign * gradient[None], m, v, 7) for sign in (1, -1))
    assert torch.allclose(up, -down, rtol=1e-12)
    with_it = [scaled(AdamScaling("paper"), sign * gradient[None], m, v, 7) for sign in (1, -1)]
    assert not torch.allclose(with_it[0], -with_it[1], rtol=1e-2)


@pytest.mark.parametrize("momentum", [True, False])
def test_damped_variant_is_the_literal_formula(momentum):
    generator = torch.Generator().manual_seed(3)
    m = [torch.randn(size, generator=generator, dtype=torch.float64) for size in (5, 30)]
    v = [torch.rand(size, generator=generator, dtype=torch.float64) for size in (5, 30)]
    found = AdamScaling("damped", momentum).at(m, v, 12)
    unbiased = [each / (1 - 0.999**12) for each in v]
    mean = torch.cat(unbiased).mean()
    for index in (0, 1):
        gradient = torch.randn(3, len(m[index]), generator=generator, dtype=torch.float64)
        first = ((0.9 * m[index] if momentum else 0) + 0.1 * gradient) / (1 - 0.9**13)
        literal = first / (((12 * unbiased[index] + 1000 * mean) / 1012).sqrt() + 1e-8)
        assert torch.allclose(found(index, gradient.clone()), literal, rtol=1e-9)


def test_damped_variant_is_linear_and_lies_between_sgd_and_adam():
    weight, optimizer, gradient = trained(40)
    m, v = optimizer.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg_sq"]
    scaling = AdamScaling("damped", include_momentum=False)
    one = scaled(scaling, gradient[None], m, v, 40)
    assert torch.allclose(scaled(scaling, 1e6 * gradient[None], m, v, 40), 1e6 * one, rtol=1e-9)
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(scaled(scaling, gradient[None], m, 0 * v, 0), gradient[None]) > 1 - 1e-12
    long = scaled(scaling, gradient[None], m, v, 10_000_000)
    assert cosine(long, gradient[None] / v.sqrt()) > 1 - 1e-4


def test_none_is_the_gradient_and_other_words_are_refused():
    gradient = torch.randn(2, 3)
    assert AdamScaling("none").at([gradient[0]], [gradient[0]], 4)(0, gradient) is gradient
    with pytest.raises(OptionError, match="adam_variant must be one of"):
        AdamScaling("adamw")
