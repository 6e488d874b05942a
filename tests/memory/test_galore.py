"""GaLore against a plain loop, against the package galore-torch, and against its own formula for state."""

import warnings

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_eff.contracts.memory import BatchShape
from hf_eff.memory.full import Full, FullConfig
from hf_eff.memory.galore import SPEC, GaLoreConfig, cost
from hf_eff.numerics.gradient_subspace import project
from hf_eff.testing.update_scene import (
    DECAY,
    UpdateScene,
    apart,
    batch,
    decayed,
    different,
    facts_of,
    is_matrix,
    stock_step,
    toy,
)

NAME = "model.layers.0.mlp.up_proj.weight"  # [64, 32]


def scene(model, **options):
    return UpdateScene(SPEC, model, **{"rank": 4, "update_gap": 3, **options})


# -- fidelity


def reference(model, steps, *, rank, gap, scale, lr=1e-2, betas=(0.9, 0.999), eps=1e-8):
    """GaLore as the paper writes it, with AdamW's two bias corrections and decay first."""
    matrices = {n: p for n, p in model.named_parameters() if is_matrix(n)}
    others = [(n, p) for n, p in model.named_parameters() if n not in matrices]
    names = decayed(model)
    groups = [{"params": [p], "weight_decay": DECAY if n in names else 0.0} for n, p in others]
    adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps)
    kept = {}
    for t in range(steps):
        stock_step(model, batch(t), 1)
        adamw.step()
        for name, weight in matrices.items():
            gradient = weight.grad
            left = gradient.shape[0] < gradient.shape[1]
            if t % gap == 0:
                u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
                basis = u[:, :rank] if left else vh[:rank].T
                kept[name] = (basis, *kept.get(name, (None, 0.0, 0.0))[1:])
            basis, m, v = kept[name]
            small = basis.T @ gradient if left else gradient @ basis
            m, v = betas[0] * m + (1 - betas[0]) * small, betas[1] * v + (1 - betas[1]) * small**2
            kept[name] = (basis, m, v)
            ratio = (m / (1 - betas[0] ** (t + 1))) / ((v / (1 - betas[1] ** (t + 1))).sqrt() + eps)
            full = basis @ ratio if left else ratio @ basis.T
            weight.data = weight.data * (1 - lr * DECAY) - lr * scale * full
        model.zero_grad()
    return {name: each.detach() for name, each in model.named_parameters()}


@pytest.mark.parametrize("adam", [{}, {"betas": (0.8, 0.9), "eps": 1e-6}])
def test_equals_a_literal_loop_over_new_projections(adam):
    run = scene(toy(), svd="exact", adam=adam).steps(*range(8))
    expected = reference(toy(), 8, rank=4, gap=3, scale=0.25, **adam)
    assert apart(run.weights(), expected) < 2e-6
    kept = reference(toy(), 8, rank=4, gap=8, scale=0.25, **adam)
    assert apart(run.weights(), kept) > 1e-3


def test_equals_the_package_on_the_same_batches():
    package = pytest.importorskip("galore_torch")
    model = toy()
    matrices = [p for n, p in model.named_parameters() if is_matrix(n)]
    others = [p for n, p in model.named_parameters() if not is_matrix(n)]
    low_rank = {"rank": 4, "update_proj_gap": 3, "scale": 1.0, "proj_type": "std"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = package.GaLoreAdamW(
            [{"params": others}, {"params": matrices, **low_rank}], lr=1e-3, weight_decay=0.0, eps=1e-15
        )
    for step in range(7):
        stock_step(model, batch(step), 1)
        optimizer.step()
        model.zero_grad()
    # The package adds eps before the bias correction and torch after it; both vanish at 1e-15.
    run = scene(toy(), lr=1e-3, weight_decay=0.0, svd="exact", scale=1.0, adam={"eps": 1e-15}).steps(*range(7))
    assert apart(run.weights(), {name: each.detach() for name, each in model.named_parameters()}) < 1e-5
    assert apart(run.weights(), scene(toy()).weights()) > 1e-3


def test_at_full_rank_it_is_not_adam():
    run = scene(toy(), rank=64, scale=1.0, svd="exact").step(0)
    model = toy()
    names = decayed(model)
    groups = [{"params": [p], "weight_decay": DECAY if n in names else 0.0} for n, p in model.named_parameters()]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    stock_step(model, batch(0), 1)
    optimizer.step()
    difference = run.weights()[NAME] - dict(model.named_parameters())[NAME].detach()
    assert float(difference.abs().max()) > 1e-3


def test_moments_outlive_a_new_projection():
    run = scene(toy(), update_gap=1).steps(0)
    first, projector = run.state(NAME)["exp_avg"].clone(), run.state(NAME)["projector"].clone()
    run.step(1)
    stock_step(model := toy(), batch(0), 1)
    assert not torch.equal(projector, run.state(NAME)["projector"])
    small = project(dict(model.named_parameters())[NAME].grad, projector, "right")
    assert torch.allclose(first, 0.1 * small, atol=1e-7)
    assert float((run.state(NAME)["exp_avg"] - 0.9 * first).abs().max()) > 0
    assert run.state(NAME)["step"] == 2


def test_a_gradient_that_is_not_finite_gives_no_projection():
    run = scene(toy(), layerwise=False)
    before = run.weights()
    stock_step(run.model, batch(0), 1)
    dict(run.model.named_parameters())[NAME].grad[0, 0] = float("nan")
    run.optimizer.step()
    moved = different(before, run.model)
    assert NAME not in moved
    assert len(moved) == len(before) - 1
    run.model.zero_grad()
    assert NAME in different(before, run.step(1).model)


# -- cost


def test_state_is_what_the_formula_says():
    run = scene(toy()).step(0)
    for name, parameter in run.model.named_parameters():
        held = sum(value.nbytes for value in run.state(name).values() if torch.is_tensor(value))
        if is_matrix(name):
            m, n = sorted(parameter.shape)
            assert held == 4 * (2 * n * 4 + m * 4), name
        else:
            assert held == 8 * parameter.numel() + 4, name


def test_a_plan_from_shapes_alone_counts_the_same():
    model = toy()
    predicted = cost(GaLoreConfig(rank=4), facts_of(model)).bytes
    assert predicted["optimizer"] == pytest.approx(scene(model).measured()["optimizer"], rel=0.02)


def test_projections_are_counted():
    run = scene(toy()).step(0)
    stock_step(run.model, batch(1), 1)
    with FlopCounterMode(display=False) as counter:
        run.optimizer.step()
    assert run.optimizer.flops(1) == counter.get_total_flops()
    facts = facts_of(run.model)
    shape = [BatchShape(2, 16)]
    plain = 0.0 + Full(FullConfig()).step_flops(facts.model, shape, 1)
    assert run.method.step_flops(facts.model, shape, 1) == plain + run.optimizer.flops(1)
    assert run.optimizer.flops(3) > run.optimizer.flops(1)
    mean = sum(run.method.step_flops(facts.model, shape, step) for step in range(3)) / 3
    assert cost(GaLoreConfig(rank=4, update_gap=3), facts).step_flops == pytest.approx(mean, rel=1e-6)
