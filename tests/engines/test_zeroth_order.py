import pytest
import torch
from torch import nn

from hf_eff.engines.directions import FAMILIES, Gaussian
from hf_eff.engines.ephemeral import EphemeralWeights, unique_parameters
from hf_eff.engines.eps_check import warn_if_apart
from hf_eff.engines.forward_only import forward_only
from hf_eff.engines.zeroth_order import Term, probe, update
from hf_eff.errors import EffWarning
from hf_eff.testing.tiny import tiny_model

BOTH = pytest.mark.parametrize("name", sorted(FAMILIES))


class Loss(nn.Module):
    """0.5 w A w + b w, with one parameter."""

    def __init__(self, size, seed=0, curved=True):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        root = torch.randn(size, size, generator=generator, dtype=torch.float64)
        self.a = root @ root.t() if curved else torch.zeros(size, size, dtype=torch.float64)
        self.b = torch.randn(size, generator=generator, dtype=torch.float64)
        self.w = nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64))

    def forward(self):
        return 0.5 * self.w @ self.a @ self.w + self.b @ self.w


def weights_of(model):
    return EphemeralWeights(model, unique_parameters(model, dict(model.named_parameters())))


def coefficient(model, family, step=0, eps=1e-3, weights=None, **key):
    with forward_only(model):
        above, below = probe(weights or weights_of(model), family, model, step=step, eps=eps, **key)
    return (above - below) / (2 * eps)


def direction(family, like, name="w", step=0, draw=0):
    return family.add_(torch.zeros_like(like), name, step, 1.0, draw=draw)


@BOTH
@pytest.mark.parametrize("eps", [1e-4, 1e-2, 1.0])
def test_quadratic_loss_gives_the_exact_directional_derivative(name, eps):
    model, family = Loss(12), FAMILIES[name](seed=0)
    z = direction(family, model.w)
    exact = z @ (model.a @ model.w + model.b)
    assert coefficient(model, family, eps=eps).item() == pytest.approx(exact.item(), rel=1e-9)


@pytest.mark.parametrize(("name", "second"), [("gaussian", 6.0), ("rademacher", 4.0)])
def test_linear_loss_gives_the_moments_of_the_estimator(name, second):
    """E[c z] is the gradient G; E|c z|^2 is (d + 2)|G|^2 for gaussian and d |G|^2 for Rademacher entries, d = 4."""
    model, family, count = Loss(4, curved=False), FAMILIES[name](seed=0), 2500
    weights = weights_of(model)
    estimates = torch.stack(
        [coefficient(model, family, t, weights=weights) * direction(family, model.w, step=t) for t in range(count)]
    ).detach()
    spread = estimates.std(0) / count**0.5
    assert ((estimates.mean(0) - model.b).abs() < 5 * spread).all()
    squares = estimates.square().sum(1) / model.b.square().sum()
    assert abs(squares.mean() - second) < 5 * squares.std() / count**0.5
    assert 5 * squares.std() / count**0.5 < 1.5  # the two families are 2 apart


@BOTH
def test_probe_leaves_no_trace(name):
    model, ids, packed = tiny_model().train(), torch.ones(2, 6, dtype=torch.long), []
    before, state = [p.detach().clone() for p in model.parameters()], torch.get_rng_state()
    weights = weights_of(model)
    with (
        torch.autograd.graph.saved_tensors_hooks(packed.append, lambda x: x),
        forward_only(model),
    ):
        losses = probe(weights, FAMILIES[name](0), lambda: model(input_ids=ids, labels=ids).loss, step=0, eps=1e-3)
    assert not packed
    assert losses.dtype == torch.float64
    assert not losses.requires_grad
    assert losses[0] != losses[1]
    assert all(p.grad is None and torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_both_sides_and_all_draws_differ_as_they_should():
    model, family = Loss(6), Gaussian(0)
    first, second = (coefficient(model, family, draw=draw) for draw in (0, 1))
    z = direction(family, model.w, draw=1)
    assert second.item() == pytest.approx((z @ (model.a @ model.w + model.b)).item(), rel=1e-9)
    assert first != second
    assert coefficient(model, family, step=1) != first


class Noisy(Loss):
    """Draws random numbers in evaluation mode too, as diffusion losses do."""

    def forward(self):
        return super().forward() + 100 * torch.rand((), dtype=torch.float64) + (torch.randn(6).double() @ self.w)


def test_random_numbers_of_the_model_itself_cancel():
    model, family, found = Noisy(6), Gaussian(0), []
    z = direction(family, model.w)
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(coefficient(model, family, noise=0))
        assert torch.equal(torch.get_rng_state(), state)
    assert found[0] == found[1]
    plain = z @ (model.a @ model.w + model.b)
    assert abs(found[0] - plain) < 30  # not 100 / eps
    assert coefficient(model, family, noise=1) != found[0]


@pytest.mark.parametrize(("dtype", "low", "high"), [(torch.bfloat16, 2e-2, 8e-2), (torch.float32, 1e-8, 1e-5)])
def test_restoring_in_place_would_drift(dtype, low, high):
    """Why probes are ephemeral: 100 steps of +eps, -2 eps, +eps that learn nothing, on weights of the usual size."""
    start = (0.02 * torch.randn(20000, generator=torch.Generator().manual_seed(0))).to(dtype)
    weight, family = start.clone(), Gaussian(0)
    for step in range(100):
        for scale in (1e-3, -2e-3, 1e-3):
            family.add_(weight, "w", step, scale)
    assert low < (weight.double() - start.double()).norm() / start.double().norm() < high


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_update_equals_the_formula(name, dtype):
    family = FAMILIES[name](seed=0)
    w = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    terms = [Term(3, 0, 0.25), Term(3, 1, -1.5), Term(2, 0, 0.1)]
    moved = nn.Parameter(w.clone())
    update([("w", moved)], family, terms, step=3, lr=1e-2, weight_decay=0.1)
    expected = w * (1 - 1e-2 * 0.1)
    for term in terms:
        z = direction(family, w, step=term.step, draw=term.draw)
        expected = torch.add(expected, z, alpha=-1e-2 * term.coefficient)
    assert torch.equal(moved, expected)


def test_update_of_bf16_weights_keeps_the_mean():
    """Each step moves by a fiftieth of a unit in the last place: to the nearest, nothing would ever move."""
    family, size, steps = Gaussian(0), 4096, 500
    weight = nn.Parameter(torch.full((size,), 1.0, dtype=torch.bfloat16))
    wide = torch.full((size,), 1.0, dtype=torch.float64)
    lr = 2.0**-8 / 50
    for step in range(steps):
        update([("w", weight)], family, [Term(step, 0, 1.0)], step=step, lr=lr)
        wide -= lr * direction(family, wide, step=step)
    error = weight.detach().double() - wide
    moved = (wide - 1).std()
    assert moved > 1e-3
    assert abs(error.mean()) < 5 * error.std() / size**0.5
    slope = (error * (wide - 1)).mean() / moved**2
    assert abs(slope) < 0.1  # minus one if nothing moved


def test_update_of_bf16_weights_repeats_bit_for_bit():
    def run(steps):
        weight = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
        for step in steps:
            update([("w", weight)], Gaussian(0), [Term(step, 0, 1.0)], step=step, lr=1e-3)
        return weight

    assert torch.equal(run(range(3)), run(range(3)))
    assert not torch.equal(run(range(3)), run(range(1, 4)))


def test_eps_check_warns_when_the_estimates_are_apart():
    close = torch.tensor([1.0, 0.0], dtype=torch.float64)
    warn_if_apart(close * 2e-3, close * 1e-3 * 1.2, 1e-3)
    with pytest.warns(EffWarning, match=r"is 1 at eps=0\.001 and 2\.5 at eps=0\.0005"):
        warn_if_apart(close * 2e-3, close * 2.5e-3, 1e-3)
    with pytest.warns(EffWarning):
        warn_if_apart(close * 2e-3, close * -1e-3, 1e-3)
    warn_if_apart(close * 0, close * 0, 1e-3)
