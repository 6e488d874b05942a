"""What a switch does to flags, gradients and optimizer state, and whom it refuses."""

import pytest
import torch
from torch import nn

from hf_eff.engines.block_partition import partition_model
from hf_eff.engines.block_switch import (
    BlockSwitch,
    pause_input_gradients,
    require_non_reentrant,
    require_restartable,
)
from hf_eff.engines.master_weights import MasterWeightOptimizer
from hf_eff.engines.state_store import StateStore
from hf_eff.errors import PlanError
from hf_eff.hardware.memory_meter import optimizer_tensors, storage_bytes
from hf_eff.numerics.trainable_blocks import ONE_LAYER_A_BLOCK
from hf_eff.testing.tiny import tiny_model


def names_of(model):
    return [name for name, _ in model.named_parameters()]


def switch_of(model, policy="reset", layout=ONE_LAYER_A_BLOCK):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return BlockSwitch(model, optimizer, partition_model(model, names_of(model), layout), policy), optimizer


def backward_step(model, optimizer):
    model(input_ids=torch.arange(12).view(2, 6), labels=torch.arange(12).view(2, 6)).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("active", [(1,), (0, 2)])
def test_switch_moves_flags_gradients_and_state(active):
    model = tiny_model(layers=3)
    switch, optimizer = switch_of(model)
    for blocks in ((0,), active, (1, 2)):
        switch.activate(blocks)
        backward_step(model, optimizer)
        names = set(switch.active_names(blocks))
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (name in names)
            assert (parameter.grad is not None) == (name in names)
            assert (parameter in optimizer.state) == (name in names)
    switch.release()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert switch.active is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", ["reset", "disk"])
def test_inactive_blocks_hold_no_byte_of_gradient_state_or_master(policy, dtype):
    model = tiny_model(layers=3).to(dtype)
    optimizer = MasterWeightOptimizer([{"params": list(model.parameters())}], torch.optim.AdamW, {"lr": 1e-3})
    switch = BlockSwitch(model, optimizer, partition_model(model, names_of(model)), policy)
    for index in (2, 0, 1):
        switch.activate((index,))
        assert storage_bytes(each.grad for each in model.parameters() if each.grad is not None) == 0
        assert storage_bytes(optimizer_tensors(optimizer)) == 0
        backward_step(model, optimizer)
        own = [model.get_parameter(name) for name in switch.partition.blocks[index]]
        size, counters = sum(each.numel() for each in own), 4 * len(own)
        master = 4 if dtype == torch.bfloat16 else 0
        assert storage_bytes(optimizer_tensors(optimizer)) == (8 + master) * size + counters
        gradients = storage_bytes(each.grad for each in model.parameters() if each.grad is not None)
        assert gradients == size * model.dtype.itemsize
    switch.release()


@pytest.mark.parametrize("policy", ["reset", "keep", "offload", "disk"])
def test_a_block_that_stays_active_keeps_its_state_whatever_the_policy(policy):
    model = tiny_model(layers=3)
    switch, optimizer = switch_of(model, policy)
    for blocks in ((0, 1), (1, 2), (1, 2), (0, 1)):
        switch.activate(blocks)
        backward_step(model, optimizer)

    def counts(index):
        return {int(optimizer.state[model.get_parameter(name)]["step"]) for name in switch.partition.blocks[index]}

    assert counts(1) == {4}
    assert counts(0) == ({1} if policy == "reset" else {2})
    switch.release()
    if policy == "reset":
        switch.activate((1,))  # a new run starts afresh
        assert len(optimizer.state) == 0


class Elsewhere(BlockSwitch):
    """A switch as on an accelerator, where offloaded state leaves the optimizer."""

    def __init__(self, *args):
        super().__init__(*args)
        self.store = StateStore()


@pytest.mark.parametrize("kind", ["host", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_comes_back_bit_for_bit_from_host_memory_and_from_files(kind, dtype):
    model = tiny_model(layers=3).to(dtype)
    optimizer = MasterWeightOptimizer([{"params": list(model.parameters())}], torch.optim.AdamW, {"lr": 1e-3})
    partition = partition_model(model, names_of(model))
    switch = (Elsewhere if kind == "host" else BlockSwitch)(model, optimizer, partition, "disk")
    seen = {}
    for index in (0, 1, 2, 0, 1):
        switch.activate((index,))
        for name in switch.partition.blocks[index]:
            found = optimizer.state[model.get_parameter(name)] if name in seen else {}
            assert found.keys() == seen.get(name, {}).keys()
            for key, value in seen.get(name, {}).items():
                assert found[key].dtype == value.dtype
                assert torch.equal(found[key], value)
        backward_step(model, optimizer)
        for name in switch.partition.blocks[index]:
            state = optimizer.state[model.get_parameter(name)]
            seen[name] = {key: value.clone() for key, value in state.items()}
    assert len(switch.store.names()) == 2 * 9
    switch.release()


@pytest.mark.parametrize("origin", ["host", "optimizer"])
def test_a_checkpoint_of_another_device_settles_where_the_policy_wants_it(origin):
    first_model, second_model = tiny_model(layers=2), tiny_model(layers=2)
    partition = partition_model(first_model, names_of(first_model))
    kinds = (Elsewhere, BlockSwitch) if origin == "host" else (BlockSwitch, Elsewhere)
    first, second = (
        kind(model, torch.optim.AdamW(model.parameters(), lr=1e-3), partition, "offload")
        for kind, model in zip(kinds, (first_model, second_model), strict=True)
    )
    for index in (0, 1):
        first.activate((index,))
        backward_step(first_model, first.optimizer)
    second.activate((1,))
    second.load_state_dict(first.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.settle()
    assert len(second.optimizer.state) == (18 if origin == "host" else 9)
    first.activate((0,))
    second.activate((0,))
    for name in partition.blocks[0]:
        one = first.optimizer.state[first_model.get_parameter(name)]
        other = second.optimizer.state[second_model.get_parameter(name)]
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_parameters_replaced_by_sharding_are_found_again():
    model = tiny_model(layers=2)
    switch, _ = switch_of(model)
    old = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(old.detach().clone())
    switch.activate((1,))
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
