"""APOLLO against a plain loop of its algorithm with the same random projections."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_eff.contracts.memory import BatchShape
from hf_eff.memory.apollo import SPEC, ApolloConfig, cost
from hf_eff.numerics.gradient_subspace import project, random_basis
from hf_eff.testing.update_scene import (
    DECAY,
    UpdateScene,
    apart,
    batch,
    decayed,
    facts_of,
    is_matrix,
    stock_step,
    toy,
)

NAME = "model.layers.0.mlp.up_proj.weight"  # [64, 32]


def scene(model, **options):
    return UpdateScene(SPEC, model, **{"rank": 4, "update_gap": 3, **options})


# -- fidelity


class Recorded:
    """The projections that the method drew, so that a plain loop can use the same."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def basis(self, name, matrix, draw):
        side = self.optimizer.side(matrix)
        source = self.optimizer.generator(matrix.device, name, draw, 2)
        return random_basis(matrix, self.optimizer.subspace.rank, side, source)


def reference(model, steps, recorded, *, gap, scale, scaling, limit, lr=1e-2, betas=(0.9, 0.999), eps=1e-8):
    """APOLLO as the paper's algorithm writes it, with AdamW's decay first."""
    matrices = {n: p for n, p in model.named_parameters() if is_matrix(n)}
    others = [(n, p) for n, p in model.named_parameters() if n not in matrices]
    names = decayed(model)
    groups = [{"params": [p], "weight_decay": DECAY if n in names else 0.0} for n, p in others]
    adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps)
    kept, norms, limited = {}, {}, 0
    for t in range(steps):
        stock_step(model, batch(t), 1)
        adamw.step()
        for name, weight in matrices.items():
            gradient = weight.grad
            left = gradient.shape[0] < gradient.shape[1]
            basis = recorded.basis(name, gradient, t // gap)
            small = basis.T @ gradient if left else gradient @ basis
            m, v = kept.get(name, (0.0, 0.0))
            m, v = betas[0] * m + (1 - betas[0]) * small, betas[1] * v + (1 - betas[1]) * small**2
            kept[name] = (m, v)
            ratio = (m / (1 - betas[0] ** (t + 1))) / ((v / (1 - betas[1] ** (t + 1))).sqrt() + eps)
            along = 0 if left else 1
            if scaling == "channel":
                scaled = gradient * (ratio.norm(dim=along) / small.norm(dim=along)).unsqueeze(along)
            else:
                scaled = gradient * ratio.norm() / small.norm()
            before = norms.get(name)
            if limit and before is not None and scaled.norm() > limit * before:
                scaled, limited = scaled * limit * before / scaled.norm(), limited + 1
            norms[name] = scaled.norm()
            weight.data = weight.data * (1 - lr * DECAY) - lr * scale * scaled
        model.zero_grad()
    return {name: each.detach() for name, each in model.named_parameters()}, limited


@pytest.mark.parametrize(
    "options",
    [
        {"scaling": "channel", "scale": 1.0, "norm_limit": 1.01},
        {"scaling": "channel", "scale": 2.0, "norm_limit": None},
        {"scaling": "tensor", "scale": 4.0, "norm_limit": 1.01, "rank": 1},
    ],
)
def test_equals_a_literal_loop_over_new_projections(options):
    run = scene(toy(), **options)
    recorded = Recorded(run.optimizer)
    run.steps(*range(8))
    changes = {"scaling": options["scaling"], "scale": options["scale"], "limit": options["norm_limit"]}
    expected, limited = reference(toy(), 8, recorded, gap=3, **changes)
    assert apart(run.weights(), expected) < 1e-5
    assert (limited > 0) == (options["norm_limit"] is not None)
    kept, _ = reference(toy(), 8, recorded, gap=8, **changes)
    assert apart(run.weights(), kept) > 1e-4


def test_projections_change_with_the_interval_the_name_and_the_seed():
    run = scene(toy())
    matrix = dict(run.model.named_parameters())[NAME]
    drawn = [Recorded(run.optimizer).basis(NAME, matrix, draw) for draw in (0, 0, 1)]
    drawn.append(Recorded(run.optimizer).basis(NAME.replace("0", "1"), matrix, 0))
    drawn.append(Recorded(scene(toy(), seed=1).optimizer).basis(NAME, matrix, 0))
    assert torch.equal(drawn[0], drawn[1])
    assert all(not torch.equal(drawn[0], other) for other in drawn[2:])
    assert drawn[0].shape == (32, 4)


def test_projections_keep_lengths_on_average():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(30, 50, generator=generator)
    ratios = []
    for seed in range(200):
        basis = random_basis(matrix, 8, "left", torch.Generator().manual_seed(seed))
        ratios.append(float(project(matrix, basis, "left").square().sum() / matrix.square().sum()))
    assert sum(ratios) / 200 == pytest.approx(1.0, rel=0.03)


def test_a_channel_without_gradient_stays_finite():
    run = scene(toy(), weight_decay=0.0)
    before = run.weights()[NAME]
    stock_step(run.model, batch(0), 1)
    weight = dict(run.model.named_parameters())[NAME]
    weight.grad[5] = 0.0
    run.optimizer.step()
    moved = (weight.detach() != before).any(1)
    assert torch.isfinite(weight).all()
    assert not moved[5]
    assert moved.sum() == 63


# -- cost


def test_state_is_what_the_formula_says():
    run = scene(toy()).step(0)
    for name, parameter in run.model.named_parameters():
        held = sum(value.nbytes for value in run.state(name).values() if torch.is_tensor(value))
        if is_matrix(name):
            assert held == 4 * (2 * max(parameter.shape) * 4 + 1), name
        else:
            assert held == 8 * parameter.numel() + 4, name


def test_projections_are_counted():
    run = scene(toy()).step(0)
    stock_step(run.model, batch(1), 1)
    with FlopCounterMode(display=False) as counter:
        run.optimizer.step()
    assert run.optimizer.flops(1) == counter.get_total_flops()
    facts = facts_of(run.model)
    shape = [BatchShape(2, 16)]
    assert cost(ApolloConfig(rank=4), facts).step_flops == run.method.step_flops(facts.model, shape, 1)
