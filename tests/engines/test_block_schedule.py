"""Schedule, partition, switch and master weights, each against a plain reference."""

import random

import pytest
import torch
from torch import nn

from hf_eff.engines.block_partition import partition_layers
from hf_eff.engines.block_schedule import BlockSchedule, recommended_interval
from hf_eff.engines.block_switch import (
    BlockSwitch,
    pause_input_gradients,
    require_non_reentrant,
    require_restartable,
)
from hf_eff.engines.master_weights import MasterWeightOptimizer, needs_master
from hf_eff.errors import PlanError
from hf_eff.testing.tiny import tiny_model


def names_of(model):
    return [name for name, _ in model.named_parameters()]


# -- schedule


def test_ascending_descending_and_fixed_orders():
    def blocks(**options):
        return [BlockSchedule(3, 2, **options).block_at(step) for step in range(10)]

    assert blocks(mode="ascending") == [0, 0, 1, 1, 2, 2, 0, 0, 1, 1]
    assert blocks(mode="descending") == [2, 2, 1, 1, 0, 0, 2, 2, 1, 1]
    assert blocks(mode="fixed") == [2] * 10
    assert blocks(mode="ascending", start=2) == [2, 2, 0, 0, 1, 1, 2, 2, 0, 0]
    assert blocks(mode="descending", start=0) == [0, 0, 2, 2, 1, 1, 0, 0, 2, 2]
    assert blocks(mode="fixed", start=1) == [1] * 10


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("mode", ["ascending", "descending", "random"])
def test_every_block_gets_exactly_k_steps_a_cycle_the_first_included(mode, every):
    schedule = BlockSchedule(5, every, mode, seed=3)
    for cycle in range(6):
        visits = [schedule.block_at(cycle * 5 * every + step) for step in range(5 * every)]
        runs = [visits[i * every : (i + 1) * every] for i in range(5)]
        assert all(len(set(run)) == 1 for run in runs)
        assert sorted(run[0] for run in runs) == list(range(5))


def test_random_orders_are_reshuffled_keyed_by_seed_and_uniform():
    orders = [tuple(BlockSchedule(3, 1, "random", seed=0).block_at(3 * c + s) for s in range(3)) for c in range(600)]
    assert orders == [
        tuple(BlockSchedule(3, 1, "random", seed=0).block_at(3 * c + s) for s in range(3)) for c in range(600)
    ]
    other = [tuple(BlockSchedule(3, 1, "random", seed=1).block_at(3 * c + s) for s in range(3)) for c in range(600)]
    assert orders != other
    # 600 draws over 6 permutations: mean 100, standard deviation 9.1; four of them are 36.
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6
    assert max(abs(count - 100) for count in counts) < 37


def test_schedule_draws_nothing_from_global_generators():
    states = random.getstate(), torch.get_rng_state()
    BlockSchedule(7, 2, "random", seed=5).block_at(123)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


def test_recommended_interval_is_the_published_rule():
    # n = 51,200 examples, B = 16, D = 32: n / (B D) = 100; a tenth and ten times of it are clipped.
    assert [recommended_interval(n // 16, 32) for n in (51_200, 5_120, 512_000, 40_960)] == [100, 50, 100, 80]
    assert recommended_interval(0, 32) == 50


def test_schedule_round_trips_through_plain_values():
    schedule = BlockSchedule(4, 7, "descending", seed=9, start=2)
    assert BlockSchedule(**schedule.to_dict()) == schedule


# -- partition


def test_one_block_a_layer_and_all_else_frozen():
    model = tiny_model(layers=4)
    partition = partition_layers(model, names_of(model))
    assert partition.labels == tuple(f"model.layers.{i}" for i in range(4))
    for index, block in enumerate(partition.blocks):
        assert block == tuple(name for name in names_of(model) if name.startswith(f"model.layers.{index}."))
    assert partition.frozen == ("model.embed_tokens.weight", "model.norm.weight")
    assert partition.always == ()


@pytest.mark.parametrize("size", [1, 2, 3, 9])
@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_every_candidate_is_in_exactly_one_place(size, embedding, head, tied):
    model = tiny_model(layers=4, tie_word_embeddings=tied)
    partition = partition_layers(
        model, names_of(model), layers_per_block=size, include_embedding=embedding, include_head=head
    )
    placed = [name for block in partition.blocks for name in block] + list(partition.frozen)
    assert sorted(placed) == sorted(names_of(model))
    assert len(partition.blocks) == -(-4 // size) + embedding + head
    table = next((i for i, block in enumerate(partition.blocks) if "model.embed_tokens.weight" in block), None)
    # The tensor that embedding and head share belongs to the embedding, or to the head when only that is wanted.
    expected = 0 if embedding else len(partition.blocks) - 1 if head and tied else None
    assert table == expected


def test_layers_beyond_ten_do_not_fall_under_the_first():
    model = tiny_model(layers=12, width=8)
    partition = partition_layers(model, names_of(model))
    assert all(name.startswith("model.layers.1.") for name in partition.blocks[1])
    assert len(partition.blocks) == 12


def test_layers_without_candidates_form_no_block():
    model = tiny_model(layers=4)
    candidates = [name for name in names_of(model) if ".1." in name or ".3.mlp" in name]
    partition = partition_layers(model, candidates)
    assert partition.labels == ("model.layers.1", "model.layers.3")
    assert sorted(name for block in partition.blocks for name in block) == sorted(candidates)
    assert partition.frozen == ()


def test_always_active_parameters_leave_their_block():
    model = tiny_model(layers=2)
    partition = partition_layers(model, names_of(model), always_active=("model.norm", "layers.1.mlp."))
    assert set(partition.always) == {name for name in names_of(model) if "layers.1.mlp" in name} | {"model.norm.weight"}


def test_always_active_takes_whole_words_only_and_refuses_strangers():
    model = tiny_model(layers=2)
    assert partition_layers(model, names_of(model), always_active=("norm",)).always == ("model.norm.weight",)
    with pytest.raises(PlanError, match="always_active='embed'"):
        partition_layers(model, names_of(model), always_active=("embed",))


def test_a_model_without_layers_is_refused_by_name():
    with pytest.raises(PlanError, match="Linear has no stack of alike layers"):
        partition_layers(nn.Linear(3, 3), ["weight"])
    model = tiny_model(layers=2)
    with pytest.raises(PlanError, match="LlamaForCausalLM has no trainable parameter inside its layers"):
        partition_layers(model, ["model.norm.weight"])


def test_fingerprint_tells_partitions_apart():
    model = tiny_model(layers=4)
    make = lambda **options: partition_layers(model, names_of(model), **options).fingerprint  # noqa: E731
    assert make() == make()
    different = [make(), make(layers_per_block=2), make(include_head=True), make(always_active=("model.norm",))]
    assert len(set(different)) == 4


# -- switch


def switch_of(model, **options):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return BlockSwitch(model, optimizer, partition_layers(model, names_of(model)), **options), optimizer


def backward_step(model, optimizer):
    model(input_ids=torch.arange(12).view(2, 6), labels=torch.arange(12).view(2, 6)).loss.backward()
    optimizer.step()


def test_switch_moves_flags_gradients_and_state():
    model = tiny_model(layers=3)
    switch, optimizer = switch_of(model)
    for index in (1, 0, 2):
        switch.activate(index)
        backward_step(model, optimizer)
        active = set(switch.partition.blocks[index])
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (name in active)
            assert (parameter.grad is not None) == (name in active)
            assert (parameter in optimizer.state) == (name in active)
    switch.release()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert switch.index is None


def test_activating_the_active_block_keeps_its_state():
    model = tiny_model(layers=2)
    switch, optimizer = switch_of(model)
    switch.activate(1)
    backward_step(model, optimizer)
    switch.activate(1)
    assert len(optimizer.state) == len(switch.partition.blocks[1])
    switch.release()
    switch.activate(1)  # a new run starts afresh
    assert len(optimizer.state) == 0


def test_parameters_replaced_by_sharding_are_found_again():
    model = tiny_model(layers=2)
    switch, _ = switch_of(model)
    old = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(old.detach().clone())
    switch.activate(1)
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad


# -- optimizers that can restart


@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        (torch.optim.AdamW, {"lr": 1e-3, "fused": True}),
        (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1}),
        (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9}),
        (torch.optim.RMSprop, {"lr": 1e-3}),
    ],
)
def test_restartable_optimizers_pass(optimizer_class, options):
    require_restartable(optimizer_class, options)


class GroupCounter(torch.optim.SGD):
    """Counts steps per group, as schedule-free optimizers do, so that a new block is no fresh start."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            group["lr"] = 0.1 / group["k"]
        return super().step(closure)


class DecaysIdle(torch.optim.SGD):
    """Touches parameters that have no gradient."""

    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(0.9)
        return super().step(closure)


@pytest.mark.parametrize("optimizer_class", [torch.optim.LBFGS, GroupCounter, DecaysIdle])
def test_optimizers_that_cannot_restart_are_refused_by_name(optimizer_class):
    with pytest.raises(PlanError, match=optimizer_class.__name__):
        require_restartable(optimizer_class, {"lr": 1e-2})


def test_optimizers_with_groups_or_models_of_their_own_are_refused():
    with pytest.raises(PlanError, match="AdamW"):
        require_restartable(torch.optim.AdamW, {"lr": 1e-3, "params": []})
    with pytest.raises(PlanError, match="<lambda>"):
        require_restartable(lambda: None, {})


# -- activation checkpointing


def checkpoint_layers(model, options):
    """Activation checkpointing under its name in this version of transformers."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


def test_reentrant_checkpointing_is_refused_with_the_fix():
    model = tiny_model(layers=2)
    require_non_reentrant(model)
    checkpoint_layers(model, {"use_reentrant": False})
    require_non_reentrant(model)
    checkpoint_layers(model, {"use_reentrant": True})
    with pytest.raises(PlanError, match="'use_reentrant': False"):
        require_non_reentrant(model)


def test_input_gradients_are_paused_however_often_they_were_enabled():
    model = tiny_model(layers=2)
    model.requires_grad_(False)
    for _ in range(3):  # each enabling leaves a hook that disable_input_require_grads no longer knows
        model.enable_input_require_grads()
    kept = model.get_input_embeddings().register_forward_hook(lambda *_: None)
    before = dict(model.get_input_embeddings()._forward_hooks)
    resume = pause_input_gradients(model)
    assert not model(input_ids=torch.zeros(1, 3, dtype=torch.long)).logits.requires_grad
    assert list(model.get_input_embeddings()._forward_hooks) == [kept.id]
    resume()
    assert dict(model.get_input_embeddings()._forward_hooks) == before
    assert model(input_ids=torch.zeros(1, 3, dtype=torch.long)).logits.requires_grad


# -- master weights


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
