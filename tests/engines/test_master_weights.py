"""fp32 copies of 16-bit weights, kept or rounded away, against explicit loops."""

import pytest
import torch
from torch import nn

from hf_eff.contracts.memory import OptimizerContext
from hf_eff.engines.master_weights import MasterWeightOptimizer, make_optimizer, needs_master
from hf_eff.engines.stochastic_rounding import round_stochastically_
from hf_eff.errors import PlanError
from hf_eff.numerics.keyed_random import make_key


def bf16_pair(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(8, 6, generator=generator).to(torch.bfloat16)) for _ in range(3)]


def gradients(step, count=3):
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(8, 6, generator=generator).to(torch.bfloat16) for _ in range(count)]


@pytest.mark.parametrize("options", [{"lr": 1e-4}, {"lr": 1e-2, "fused": True}])
def test_master_weights_equal_an_explicit_fp32_loop(options):
    ours = bf16_pair()
    groups = [{"params": ours[:2], "weight_decay": 0.1}, {"params": ours[2:], "weight_decay": 0.0}]
    optimizer = MasterWeightOptimizer(groups, torch.optim.AdamW, options)
    masters = [nn.Parameter(parameter.detach().float()) for parameter in bf16_pair()]
    reference = torch.optim.AdamW(
        [{"params": masters[:2], "weight_decay": 0.1}, {"params": masters[2:], "weight_decay": 0.0}], **options
    )
    for step in range(12):
        for parameter, master, gradient in zip(ours, masters, gradients(step), strict=True):
            parameter.grad, master.grad = gradient, gradient.float()
        for group in [*optimizer.param_groups, *reference.param_groups]:
            group["lr"] = options["lr"] * (1 - step / 12)
        optimizer.step()
        reference.step()
        for parameter, master in zip(ours, masters, strict=True):
            assert torch.equal(parameter, master.to(torch.bfloat16))
            assert torch.equal(optimizer.state[parameter]["master"], master)
            assert torch.equal(optimizer.state[parameter]["exp_avg"], reference.state[master]["exp_avg"])
            assert parameter.dtype == torch.bfloat16


def test_master_weights_keep_updates_that_16_bits_lose():
    parameter = nn.Parameter(torch.full((4,), 0.02, dtype=torch.bfloat16))
    start = parameter.detach().clone()
    optimizer = MasterWeightOptimizer([{"params": [parameter]}], torch.optim.SGD, {"lr": 1e-5})
    plain = nn.Parameter(start.clone())
    for _ in range(20):
        parameter.grad, plain.grad = torch.ones_like(start), torch.ones_like(start)
        optimizer.step()
        torch.optim.SGD([plain], lr=1e-5).step()
    assert torch.equal(plain, start)
    assert torch.allclose(parameter.float(), start.float() - 20e-5, atol=7e-5, rtol=0)
    assert not torch.equal(parameter, start)


def test_only_parameters_with_gradients_have_a_copy_and_fp32_ones_have_none():
    active, idle = bf16_pair()[:2]
    wide = nn.Parameter(torch.ones(3))
    optimizer = MasterWeightOptimizer([{"params": [active, idle, wide]}], torch.optim.AdamW, {"lr": 1e-3})
    active.grad, wide.grad = torch.ones_like(active), torch.ones_like(wide)
    optimizer.step()
    assert set(optimizer.state) == {active, wide}
    assert "master" in optimizer.state[active]
    assert "master" not in optimizer.state[wide]
    reference = nn.Parameter(torch.ones(3))
    reference.grad = torch.ones(3)
    torch.optim.AdamW([reference], lr=1e-3).step()
    assert torch.equal(wide, reference)
    assert active.grad.dtype == torch.bfloat16


def test_master_weights_resume_bit_for_bit_through_a_saved_file(tmp_path):
    def run(parameters, optimizer, steps):
        for step in steps:
            for parameter, gradient in zip(parameters, gradients(step), strict=True):
                parameter.grad = gradient
            optimizer.step()

    make = lambda parameters: MasterWeightOptimizer([{"params": parameters}], torch.optim.AdamW, {"lr": 1e-4})  # noqa: E731
    whole = bf16_pair()
    run(whole, make(whole), range(8))
    first = bf16_pair()
    optimizer = make(first)
    run(first, optimizer, range(5))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    second = [nn.Parameter(parameter.detach().clone()) for parameter in first]
    resumed = make(second)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    run(second, resumed, range(5, 8))
    for one, other in zip(whole, second, strict=True):
        assert torch.equal(one, other)
        assert resumed.state[other]["master"].dtype == torch.float32


def test_master_weights_follow_a_scheduler_and_a_closure():
    parameter = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = MasterWeightOptimizer([{"params": [parameter]}], torch.optim.SGD, {"lr": 1.0})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure():
        optimizer.zero_grad()
        loss = (parameter * 1.0).sum()
        loss.backward()
        return loss

    values = []
    for _ in range(3):
        values.append(optimizer.step(closure).item())
        scheduler.step()
    assert values == [2.0, 0.0, -1.0]
    assert torch.equal(parameter, torch.full((2,), -0.75, dtype=torch.bfloat16))


def test_needs_master():
    assert needs_master([torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1)])
    assert needs_master([torch.zeros(1, dtype=torch.float16)])
    assert not needs_master([torch.zeros(1), torch.zeros(1, dtype=torch.float64)])


# -- without copies


def test_without_copies_weights_are_rounded_stochastically_around_the_fp32_update():
    ours, plain = bf16_pair(), bf16_pair()
    groups = [{"params": ours[:2], "weight_decay": 0.1}, {"params": ours[2:], "weight_decay": 0.0}]
    optimizer = MasterWeightOptimizer(groups, torch.optim.AdamW, {"lr": 1e-3}, rounding_seed=7)
    states = {}
    for step in range(6):
        for parameter, gradient in zip(ours, gradients(step), strict=True):
            parameter.grad = gradient
        optimizer.step()
        for position, (weight, gradient) in enumerate(zip(plain, gradients(step), strict=True)):
            wide = nn.Parameter(weight.detach().float())
            wide.grad = gradient.float()
            one = torch.optim.AdamW([wide], lr=1e-3, weight_decay=0.1 if position < 2 else 0.0)
            one.state[wide] = states.get(position, {})
            one.step()
            states[position] = one.state[wide]
            generator = torch.Generator().manual_seed(make_key(7, step, position))
            round_stochastically_(weight.data, wide.detach(), generator)
        for one, other in zip(ours, plain, strict=True):
            assert torch.equal(one, other)
    for parameter in ours:
        assert set(optimizer.state[parameter]) == {"step", "exp_avg", "exp_avg_sq"}
        assert optimizer.state[parameter]["exp_avg"].dtype == torch.float32


def test_without_copies_updates_below_half_a_unit_survive_on_average():
    parameter = nn.Parameter(torch.full((20_000,), 0.02, dtype=torch.bfloat16))
    start = float(parameter[0])
    optimizer = MasterWeightOptimizer([{"params": [parameter]}], torch.optim.SGD, {"lr": 1e-5}, rounding_seed=0)
    for _ in range(20):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert abs(float(parameter.detach().float().mean()) - (start - 20e-5)) < 2e-5


def test_without_copies_a_run_resumes_bit_for_bit():
    def run(parameters, optimizer, steps):
        for step in steps:
            for parameter, gradient in zip(parameters, gradients(step), strict=True):
                parameter.grad = gradient
            optimizer.step()

    make = lambda parameters: MasterWeightOptimizer([{"params": parameters}], torch.optim.AdamW, {"lr": 1e-3}, 3)  # noqa: E731
    whole, first = bf16_pair(), bf16_pair()
    run(whole, make(whole), range(8))
    optimizer = make(first)
    run(first, optimizer, range(5))
    second = [nn.Parameter(parameter.detach().clone()) for parameter in first]
    resumed = make(second)
    resumed.load_state_dict(optimizer.state_dict())
    run(second, resumed, range(5, 8))
    assert all(torch.equal(one, other) for one, other in zip(whole, second, strict=True))


def test_global_randomness_stays_as_found_while_rounding():
    parameters, state = bf16_pair(), torch.get_rng_state()
    optimizer = MasterWeightOptimizer([{"params": parameters}], torch.optim.SGD, {"lr": 1e-3}, rounding_seed=0)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), state)


def test_fp16_without_copies_is_refused():
    model = nn.Linear(2, 2).half()
    names = frozenset({"weight", "bias"})
    context = OptimizerContext(model, names, names, torch.optim.SGD, {"lr": 1.0}, 0.0, stock=lambda: None, seed=0)
    with pytest.raises(PlanError, match="made for bf16 and not for fp16"):
        make_optimizer(context, master_weights=False)
