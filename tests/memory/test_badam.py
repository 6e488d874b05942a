"""BAdam against plain loops: an AdamW made anew for every block visit, a masked AdamW, an fp32 master copy."""

import itertools
import json
import os
import random
import socket

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.trainer_pt_utils import get_parameter_names

from hf_eff.contracts.cost import Facts, PoolFacts, RunFacts
from hf_eff.contracts.memory import BatchShape, OptimizerContext
from hf_eff.engines.facts import model_facts
from hf_eff.errors import CheckpointError, OptionError, OutsideIntendedUseWarning, PlanError
from hf_eff.hardware.memory_meter import MemoryMeter, optimizer_tensors, storage_bytes
from hf_eff.memory.badam import SPEC, BAdam, BAdamConfig, cost
from hf_eff.testing.tiny import tiny_model

NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


# -- a training loop without a trainer


def context_of(model, *, optimizer_class=torch.optim.AdamW, weight_decay=0.1, seed=0, total_steps=0, **options):
    candidates = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    decayed = frozenset(get_parameter_names(model, [nn.LayerNorm], NO_DECAY)) & candidates
    options = {"lr": 1e-2, **options}

    def stock():
        return optimizer_class(groups_of(model, candidates, decayed, weight_decay), **options)

    return OptimizerContext(
        model=model,
        candidates=candidates,
        decay_names=decayed,
        optimizer_class=optimizer_class,
        optimizer_kwargs=options,
        weight_decay=weight_decay,
        stock=stock,
        seed=seed,
        total_steps=total_steps,
    )


def groups_of(model, names, decayed, weight_decay):
    named = [(name, parameter) for name, parameter in model.named_parameters() if name in names]
    return [
        {"params": [p for name, p in named if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
    ]


def batch(step, rows=2, length=6, vocab=200):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(3, vocab, (rows, length), generator=generator)
    return {"input_ids": ids, "labels": ids}


def backward(model, step, accumulation=1):
    for part in range(accumulation):
        (model(**batch(100 * step + part)).loss / accumulation).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)


class Run:
    """One model under one method."""

    def __init__(self, model=None, *, context=None, accumulation=1, **options):
        self.model = tiny_model() if model is None else model
        self.method = BAdam(BAdamConfig(**options))
        self.optimizer = self.method.create_optimizer(context or context_of(self.model))
        self.accumulation = accumulation
        self.losses = []

    def begin(self, step=0):
        self.method.train_begin(self.model, step)
        return self

    def steps(self, *steps, after=None):
        for step in steps:
            self.method.step_begin(step)
            backward(self.model, step, self.accumulation)
            self.optimizer.step()
            if after is not None:
                after(step)
            self.model.zero_grad()
        return self

    def weights(self):
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def checkpoint_layers(model, options):
    """Activation checkpointing under its name in this version of transformers."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


# -- fidelity: equal to AdamW


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("switch_every", [3, 100])
def test_one_block_of_all_layers_equals_adamw_bit_for_bit(fused, switch_every):
    run = Run(tiny_model(), layers_per_block=4, switch_every=switch_every, accumulation=2)
    run.begin().steps(*range(12))

    model = tiny_model()
    names = {name for name, _ in model.named_parameters() if ".layers." in name}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    optimizer = torch.optim.AdamW(groups_of(model, names, context_of(model).decay_names, 0.1), lr=1e-2)
    for step in range(12):
        backward(model, step, accumulation=2)
        optimizer.step()
        model.zero_grad()
    assert_same(run.weights(), {name: p.detach() for name, p in model.named_parameters()})


def test_with_everything_active_it_is_full_adamw_bit_for_bit():
    run = Run(layers_per_block=4, always_active=("embed_tokens", "model.norm")).begin().steps(*range(12))
    model = tiny_model()
    context = context_of(model)
    optimizer = context.stock()
    for step in range(12):
        backward(model, step)
        optimizer.step()
        model.zero_grad()
    assert_same(run.weights(), {name: p.detach() for name, p in model.named_parameters()})


@pytest.mark.parametrize("mode", ["random", "ascending", "descending"])
def test_equals_a_new_adamw_for_every_block_visit(mode):
    run = Run(switch_every=3, mode=mode).begin().steps(*range(26))

    model, order = tiny_model(), []
    if mode == "random":
        for cycle in range(3):
            blocks = list(range(4))
            random.Random(f"block order 0 {cycle}").shuffle(blocks)
            order += blocks
    else:
        order = [0, 1, 2, 3] * 3 if mode == "ascending" else [3, 2, 1, 0] * 3
    decayed = context_of(model).decay_names
    active = optimizer = None
    for step in range(26):
        if order[step // 3] != active:
            active = order[step // 3]
            names = {name for name, _ in model.named_parameters() if f".layers.{active}." in name}
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in names)
            optimizer = torch.optim.AdamW(groups_of(model, names, decayed, 0.1), lr=1e-2)
        backward(model, step)
        optimizer.step()
        model.zero_grad()
    assert_same(run.weights(), {name: p.detach() for name, p in model.named_parameters()})


def test_keep_policy_equals_one_adamw_with_masked_gradients():
    run = Run(switch_every=2, mode="ascending", state_policy="keep").begin().steps(*range(17))

    model = tiny_model()
    optimizer = context_of(model).stock()
    for step in range(17):
        model(**batch(100 * step)).loss.backward()
        for name, parameter in model.named_parameters():
            if f".layers.{step // 2 % 4}." not in name:
                parameter.grad = None
        # Gradients are clipped by the norm of the active block.
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        model.zero_grad()
    assert_same(run.weights(), {name: p.detach() for name, p in model.named_parameters()})
    assert len(run.optimizer.state) == sum(len(block) for block in run.method.switch.partition.blocks)


@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "attn_mlp"},
        {"granularity": "matrix"},
        {"blocks": ("layers.0.mlp+layers.1", "norm", "layers.3.self_attn")},
    ],
)
def test_smaller_blocks_equal_a_new_adamw_for_every_visit(options):
    run = Run(tiny_model(width=16), switch_every=2, mode="ascending", **options)
    blocks = run.method.switch.partition.blocks
    run.begin().steps(*range(2 * len(blocks) + 3))

    model = tiny_model(width=16)
    decayed = context_of(model).decay_names
    for step in range(2 * len(blocks) + 3):
        if step % 2 == 0:
            names = set(blocks[step // 2 % len(blocks)])
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in names)
            optimizer = torch.optim.AdamW(groups_of(model, names, decayed, 0.1), lr=1e-2)
        backward(model, step)
        optimizer.step()
        model.zero_grad()
    assert_same(run.weights(), {name: p.detach() for name, p in model.named_parameters()})


def test_bf16_without_master_copies_rounds_stochastically_and_holds_eight_bytes():
    half = tiny_model(width=16).to(torch.bfloat16)
    run = Run(half, switch_every=2, master_weights=False).begin()
    before = run.weights()
    run.steps(0, 1, 2)
    active = run.method.switch.partition.blocks[run.method.switch.active[0]]
    size = sum(run.model.get_parameter(name).numel() for name in active)
    assert storage_bytes(optimizer_tensors(run.optimizer)) == 8 * size + 4 * len(active)
    assert moved(before, run.weights())
    facts = facts_of(tiny_model(width=16, layers=8).to(torch.bfloat16))
    kept, dropped = (cost(BAdamConfig(master_weights=keep), facts).bytes["optimizer"] for keep in (True, False))
    assert kept - dropped == 4 * size


@pytest.mark.parametrize("policy", ["reset", "disk"])
def test_bf16_without_master_copies_resumes_bit_for_bit(policy):
    options = {"switch_every": 2, "master_weights": False, "state_policy": policy}
    make = lambda: Run(tiny_model(width=16).to(torch.bfloat16), **options)  # noqa: E731
    whole, first, second = make().begin().steps(*range(10)), make().begin().steps(*range(5)), make()
    second.model.load_state_dict(first.model.state_dict())
    second.method.load_state_dict(first.method.state_dict(), 5)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert_same(second.begin(5).steps(*range(5, 10)).weights(), whole.weights())


def test_bf16_equals_an_explicit_master_copy_loop_over_switches():
    def half(model):
        return model.to(torch.bfloat16)

    run = Run(half(tiny_model()), switch_every=3, mode="descending").begin().steps(*range(14))

    model = half(tiny_model())
    decayed = context_of(model).decay_names
    masters, optimizer = {}, None
    for step in range(14):
        if step % 3 == 0:
            layer = 3 - step // 3 % 4
            named = [(name, p) for name, p in model.named_parameters() if f".layers.{layer}." in name]
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(f".layers.{layer}." in name)
            masters = {name: nn.Parameter(parameter.detach().float()) for name, parameter in named}
            decay = [master for name, master in masters.items() if name in decayed]
            rest = [master for name, master in masters.items() if name not in decayed]
            optimizer = torch.optim.AdamW(
                [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-2
            )
        backward(model, step)
        for name, parameter in named:
            masters[name].grad = parameter.grad.float()
        optimizer.step()
        with torch.no_grad():
            for name, parameter in named:
                parameter.copy_(masters[name].to(torch.bfloat16))
        model.zero_grad()
    assert_same(run.weights(), {name: p.detach() for name, p in model.named_parameters()})


# -- schedule in action


@pytest.mark.parametrize("every", [1, 3])
def test_exactly_k_steps_a_block_and_every_block_once_a_cycle(every):
    run, visits = Run(switch_every=every).begin(), []
    for step in range(8 * every):
        before = run.weights()
        run.steps(step)
        layers = {name.split(".")[2] for name in moved(before, run.weights()) if ".layers." in name}
        assert moved(before, run.weights()) == {name for name in before if f".layers.{next(iter(layers))}." in name}
        assert len(layers) == 1
        visits.append(int(next(iter(layers))))
    for cycle in (visits[: 4 * every], visits[4 * every :]):
        assert [cycle[i * every] for i in range(4) for _ in range(every)] == cycle
        assert sorted(set(cycle)) == [0, 1, 2, 3]


def test_state_and_gradients_exist_for_one_block_only():
    run = Run(switch_every=2).begin()
    sizes = {
        index: sum(run.model.get_parameter(name).numel() for name in block)
        for index, block in enumerate(run.method.switch.partition.blocks)
    }

    def check(step):
        index = run.method.schedule.active_at(step)[0]
        names = {name for name, parameter in run.model.named_parameters() if parameter.grad is not None}
        assert names == set(run.method.switch.partition.blocks[index])
        tensors = [state[key] for state in run.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == 8 * sizes[index]
        assert {int(state["step"]) for state in run.optimizer.state.values()} == {step % 2 + 1}

    run.steps(*range(9), after=check)


def test_16_bit_blocks_cost_twelve_bytes_a_parameter_of_state():
    run = Run(tiny_model().to(torch.bfloat16), switch_every=2).begin().steps(0, 1, 2)
    active = run.method.switch.partition.blocks[run.method.switch.active[0]]
    tensors = [value for state in run.optimizer.state.values() for key, value in state.items() if key != "step"]
    assert all(tensor.dtype == torch.float32 for tensor in tensors)
    assert sum(tensor.nbytes for tensor in tensors) == 12 * sum(run.model.get_parameter(n).numel() for n in active)


def visited_layers(model, step):
    """Layers whose output receives a gradient."""
    seen = set()

    def watch(index):
        def hook(module, inputs, output):
            output = output[0] if isinstance(output, tuple) else output
            if output.requires_grad:
                output.register_hook(lambda gradient: seen.add(index))

        return hook

    handles = [layer.register_forward_hook(watch(index)) for index, layer in enumerate(model.model.layers)]
    backward(model, step)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("enabled", [0, 1, 3])
def test_backward_visits_no_layer_below_the_active_one(enabled):
    model = tiny_model().train()
    run = Run(model, switch_every=1, mode="descending")
    for _ in range(enabled):  # the trainer, PEFT and TRL each enable it, and each leaves a hook
        checkpoint_layers(model, {"use_reentrant": False})
    run.begin()
    for step in range(4):
        run.method.step_begin(step)
        assert visited_layers(model, step) == set(range(3 - step, 4))
        run.optimizer.step()
        model.zero_grad()


def test_activations_grow_by_one_layer_for_every_layer_the_block_lies_deeper():
    model = tiny_model(layers=6, width=32).train()
    run, saved = Run(model, switch_every=1, mode="descending").begin(), []
    for step in range(6):
        run.method.step_begin(step)
        meter = MemoryMeter(model)
        with meter.forward_backward():
            model(**batch(step, rows=4, length=32)).loss.backward()
        saved.append(meter.peak_bytes()["activations"])
        model.zero_grad()
    run.method.train_end()
    rises = [deeper - higher for higher, deeper in itertools.pairwise(saved)]
    assert all(rise == rises[0] > 0 for rise in rises)


def test_checkpointing_changes_no_weight():
    plain = Run(tiny_model().train(), switch_every=2).begin().steps(*range(8))
    model = tiny_model().train()
    run = Run(model, switch_every=2)
    checkpoint_layers(model, {"use_reentrant": False})
    assert_same(plain.weights(), run.begin().steps(*range(8)).weights())


def test_reentrant_checkpointing_is_refused_when_training_begins():
    run = Run()
    checkpoint_layers(run.model, {"use_reentrant": True})
    with pytest.raises(PlanError, match="reentrant"):
        run.begin()


def test_train_end_puts_everything_back_and_a_second_run_starts_afresh():
    run = Run(switch_every=2)
    run.model.enable_input_require_grads()
    hooks = dict(run.model.get_input_embeddings()._forward_hooks)
    start = run.weights()
    first = run.begin().steps(*range(5)).weights()
    run.method.train_end()
    assert all(parameter.requires_grad for parameter in run.model.parameters())
    assert dict(run.model.get_input_embeddings()._forward_hooks) == hooks
    run.model.load_state_dict(start, strict=False)
    assert_same(run.begin().steps(*range(5)).weights(), first)


def test_frozen_parameters_of_the_user_stay_frozen():
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    run = Run(model, switch_every=1)
    start = run.weights()
    run.begin().steps(*range(4))
    assert moved(start, run.weights()) == {name for name in start if "q_proj" in name}
    run.method.train_end()
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        name for name in start if "q_proj" in name
    }


# -- optimizer


def test_weight_decay_reaches_matrices_and_spares_norms():
    run = Run(switch_every=1, mode="ascending").begin()
    assert sorted(group["weight_decay"] for group in run.optimizer.param_groups) == [0.0, 0.1]
    assert sum(len(group["params"]) for group in run.optimizer.param_groups) == len(list(run.model.parameters()))
    before = run.weights()
    run.method.step_begin(0)
    (run.model(**batch(0)).loss * 0.0).backward()
    run.optimizer.step()
    after = run.weights()
    for name in run.method.switch.partition.blocks[0]:
        expected = before[name] if "norm" in name else before[name] * (1 - 1e-2 * 0.1)
        assert torch.equal(after[name], expected)


def test_a_scheduler_over_an_accelerated_optimizer_sets_the_rate():
    from accelerate import Accelerator

    run = Run(switch_every=2)
    wrapped = Accelerator(cpu=True).prepare_optimizer(run.optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 1 - step / 8)
    run.begin()
    for step in range(6):
        run.method.step_begin(step)
        backward(run.model, step)
        wrapped.step()
        scheduler.step()
        wrapped.zero_grad()
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.25)
    assert len(wrapped.state) == len(run.method.switch.partition.blocks[0])


def test_loss_scaling_by_a_power_of_two_changes_no_weight():
    plain = Run(switch_every=2).begin().steps(*range(7))
    run = Run(switch_every=2).begin()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(7):
        run.method.step_begin(step)
        scaler.scale(run.model(**batch(100 * step)).loss).backward()
        scaler.unscale_(run.optimizer)
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 0.5)
        scaler.step(run.optimizer)
        scaler.update()
        run.model.zero_grad()
    assert_same(run.weights(), plain.weights())


@pytest.mark.parametrize("optimizer_class", ["AdamW8bit", "PagedAdamW8bit", "Lion8bit"])
def test_8_bit_optimizers_restart_per_block(optimizer_class):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny_model(layers=3)
    context = context_of(model, optimizer_class=getattr(bitsandbytes.optim, optimizer_class), lr=1e-3)
    run = Run(model, context=context, switch_every=2, mode="ascending").begin()
    for index in range(3):
        before = run.weights()
        run.steps(2 * index, 2 * index + 1)
        assert moved(before, run.weights()) == set(run.method.switch.partition.blocks[index])
        assert len(run.optimizer.state) == len(run.method.switch.partition.blocks[index])
    # 8-bit states: a matrix of at least 4096 entries keeps one byte per moment.
    weight = model.model.layers[2].mlp.up_proj.weight
    assert run.optimizer.state[weight]["state1"].dtype == torch.uint8


def test_optimizers_that_cannot_restart_are_refused():
    with pytest.raises(PlanError, match="LBFGS"):
        Run(context=context_of(tiny_model(), optimizer_class=torch.optim.LBFGS))


# -- blocks beside the layers


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_train_in_their_own_turn(tied):
    model = tiny_model(layers=2, tie_word_embeddings=tied)
    run = Run(model, switch_every=1, mode="ascending", include_embedding=True, include_head=True).begin()
    changes = []
    for step in range(4):
        before = run.weights()
        run.steps(step)
        changes.append(moved(before, run.weights()))
    assert changes[0] == {"model.embed_tokens.weight"}
    assert changes[3] == {"model.norm.weight"} | (set() if tied else {"lm_head.weight"})
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_always_active_parameters_keep_their_state_over_switches():
    run = Run(switch_every=2, always_active=("model.norm",)).begin().steps(*range(7))
    assert int(run.optimizer.state[run.model.model.norm.weight]["step"]) == 7


# -- resume


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [1, 4, 5, 6, 9, 12])
@pytest.mark.parametrize("policy", ["reset", "keep", "offload"])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, dtype, stop, policy):
    options = {"switch_every": 3, "state_policy": policy}
    whole = Run(tiny_model().to(dtype), **options).begin().steps(*range(14))
    first = Run(tiny_model().to(dtype), **options).begin().steps(*range(stop))
    torch.save(first.optimizer.state_dict(), tmp_path / "optimizer.pt")
    (tmp_path / "state.json").write_text(json.dumps(first.method.state_dict()))

    second = Run(tiny_model(seed=5).to(dtype), **options)
    second.model.load_state_dict(first.model.state_dict())
    second.method.load_state_dict(json.loads((tmp_path / "state.json").read_text()), stop)
    active = set(first.method.switch.partition.blocks[first.method.switch.active[0]])
    assert {name for name, p in second.model.named_parameters() if p.requires_grad} == active
    second.optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    second.begin(stop).steps(*range(stop, 14))
    assert_same(second.weights(), whole.weights())
    for (name, one), other in zip(whole.model.named_parameters(), second.model.parameters(), strict=True):
        expected, found = whole.optimizer.state.get(one, {}), second.optimizer.state.get(other, {})
        assert expected.keys() == found.keys(), name
        assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_a_checkpoint_of_other_blocks_or_another_schedule_is_refused():
    state = Run(switch_every=3, mode="ascending").begin().steps(0).method.state_dict()
    with pytest.raises(CheckpointError, match="other blocks"):
        Run(switch_every=3, mode="ascending", layers_per_block=2).method.load_state_dict(state, 1)
    with pytest.raises(CheckpointError, match=r"switch_every=3.*switch_every=4"):
        Run(switch_every=4, mode="ascending").method.load_state_dict(state, 1)
    with pytest.raises(CheckpointError, match="ascending"):
        Run(switch_every=3).method.load_state_dict(state, 1)


def test_an_automatic_interval_survives_a_longer_run():
    first = Run(context=context_of(tiny_model(), total_steps=240))
    assert first.method.schedule.switch_every == 60
    second = Run(context=context_of(tiny_model(), total_steps=360))
    assert second.method.schedule.switch_every == 90
    second.method.load_state_dict(first.method.state_dict(), 0)
    assert second.method.schedule.switch_every == 60


# -- hygiene and messages


def test_global_random_states_stay_as_found():
    states = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()  # noqa: NPY002
    Run(switch_every=1).begin().steps(*range(6)).method.train_end()
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tobytes() == states[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


def test_a_run_too_short_for_one_cycle_warns_with_the_numbers():
    with pytest.warns(OutsideIntendedUseWarning, match=r"visits 2 of 4 blocks in 7 steps.*switch_every to at most 1"):
        Run(context=context_of(tiny_model(), total_steps=7), switch_every=5)
    Run(context=context_of(tiny_model(), total_steps=20), switch_every=5)
    Run(context=context_of(tiny_model(), total_steps=7), switch_every=5, mode="fixed")


def test_wrong_options_are_refused_by_address():
    for options, words in [
        ({"switch_every": 0}, "switch_every must be in"),
        ({"switch_every": "often"}, "switch_every must be int, got 'often'"),
        ({"mode": "upwards"}, "mode must be one of"),
        ({"start_block": 1}, "start_block needs mode="),
        ({"layers_per_block": 0}, "layers_per_block must be in"),
        ({"layers_per_block": 2, "granularity": "matrix"}, "layers_per_block joins whole layers"),
        ({"blocks": ("layers.0",), "include_head": True}, "blocks names the blocks one by one"),
        ({"granularity": "ratio"}, "granularity must be one of"),
        ({"state_policy": "forget"}, "state_policy must be one of"),
    ]:
        with pytest.raises(OptionError, match=words):
            BAdamConfig(**options)
    assert BAdamConfig.from_dict({"switch_every": "20", "always_active": "norm,score"}) == BAdamConfig(
        switch_every=20, always_active=("norm", "score")
    )
    assert BAdamConfig.from_dict({"switch_every": "auto"}) == BAdamConfig()
    with pytest.raises(PlanError, match="start_block=4 does not exist; there are 4 blocks"):
        Run(mode="fixed", start_block=4)


def test_what_never_trains_is_logged_and_louder_for_a_task_head(caplog):
    with caplog.at_level("INFO", logger="hf_eff.engines.blockwise"):
        Run()
        assert [record.levelname for record in caplog.records] == ["INFO"]
        assert "model.embed_tokens.weight, model.norm.weight" in caplog.text
        Run(FAMILIES["bert"]())
        assert caplog.records[-1].levelname == "WARNING"
        assert "classifier.weight" in caplog.records[-1].getMessage()


def test_log_entries_name_the_active_block():
    run = Run(switch_every=1, mode="descending")
    assert run.method.log_entries() == {}
    run.begin().steps(0, 1)
    assert run.method.log_entries() == {"block": 2.0}
    assert run.method.grad_norm() is None


# -- model families


def small(config_class, **changes):
    options = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    return config_class(**{**options, **changes})


FAMILIES = {
    "llama": lambda: transformers.LlamaForCausalLM(small(transformers.LlamaConfig)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(small(transformers.Qwen2Config)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=256, n_embd=32, n_layer=3, n_head=4, n_positions=64)
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        small(transformers.OPTConfig, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0)
    ),
    "phi": lambda: transformers.PhiForCausalLM(small(transformers.PhiConfig, num_key_value_heads=4)),
    "gemma": lambda: transformers.GemmaForCausalLM(small(transformers.GemmaConfig, head_dim=8)),
    "bert": lambda: transformers.BertForSequenceClassification(small(transformers.BertConfig, num_labels=3)),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=256,
            d_model=32,
            d_ff=64,
            d_kv=8,
            num_layers=2,
            num_decoder_layers=3,
            num_heads=4,
            decoder_start_token_id=0,
        )
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        small(transformers.MixtralConfig, num_local_experts=8, num_experts_per_tok=1)
    ),
}
NUM_BLOCKS = {"t5": 5}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_partitioned_and_trains(family):
    model = FAMILIES[family]()
    run = Run(model, switch_every=1, mode="ascending").begin()
    blocks = run.method.switch.partition.blocks
    assert len(blocks) == NUM_BLOCKS.get(family, 3)
    assert {name for block in blocks for name in block} == {
        name
        for name, _ in model.named_parameters()
        if any(word in name for word in (".layers.", ".h.", ".layer.", ".block."))
    }
    for step in range(len(blocks)):
        before = run.weights()
        run.method.step_begin(step)
        inputs = batch(step)
        if family == "bert":
            inputs["labels"] = torch.tensor([0, 2])
        model(**inputs).loss.backward()
        run.optimizer.step()
        model.zero_grad()
        changed = moved(before, run.weights())
        assert changed
        assert changed <= set(blocks[step])
    run.method.train_end()


def test_experts_without_a_gradient_are_skipped():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return x + self.first(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Experts() for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model = Model()
    run = Run(model, context=context_of(model), switch_every=1, mode="ascending").begin()
    start = run.weights()
    for step in range(2):
        run.method.step_begin(step)
        model(torch.ones(1, 4)).sum().backward()
        run.optimizer.step()
        model.zero_grad()
    assert moved(start, run.weights()) == {name for name in start if "first" in name}
    assert len(run.optimizer.state) == 2


def test_adapters_of_a_layer_form_its_block():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    run = Run(model, switch_every=1, mode="ascending").begin()
    start = run.weights()
    for step in range(4):
        before = run.weights()
        run.steps(step)
        changed = moved(before, run.weights())
        assert changed
        assert all(f".layers.{step}." in name and "lora_" in name for name in changed)
    assert all("lora_" in name for name in moved(start, run.weights()))


def test_a_4_bit_base_with_adapters_trains_block_by_block():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, get_peft_model

    model = tiny_model(layers=2)
    for layer in model.model.layers:
        old = layer.mlp.up_proj
        new = bitsandbytes.nn.Linear4bit(old.in_features, old.out_features, bias=False, compute_dtype=torch.float32)
        new.weight = bitsandbytes.nn.Params4bit(old.weight.detach(), requires_grad=False)
        layer.mlp.up_proj = new.to("cpu")
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM"))
    run = Run(model, switch_every=1, mode="ascending").begin()
    for step in range(2):
        before = run.weights()
        run.steps(step)
        changed = moved(before, run.weights())
        assert changed
        assert all(f".layers.{step}." in name and "lora_" in name for name in changed)


# -- cost

COUNTERS = 4 * 9
"""Bytes of the step counters of a layer's nine tensors."""


def test_step_flops_equal_the_flop_counter_for_every_block():
    model = tiny_model(attn_implementation="eager")
    run = Run(model, switch_every=1, mode="ascending").begin()
    facts = model_facts(model)
    counts = []
    for step in range(4):
        run.method.step_begin(step)
        counter = FlopCounterMode(display=False)
        with counter:
            model(**batch(step)).loss.backward()
        counts.append(run.method.step_flops(facts, [BatchShape(rows=2, length=6)], step))
        assert counts[-1] == counter.get_total_flops()
        model.zero_grad()
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 1.2 * counts[3]


def facts_of(model, **run):
    return Facts(
        model=model_facts(model),
        pool=PoolFacts(num_rows=100, mean_tokens=6, max_tokens=6),
        run=RunFacts(batch_size=2, length=6, **run),
    )


def test_cost_predicts_the_mean_step_and_the_state_of_one_block():
    model = tiny_model(layers=8, attn_implementation="eager")
    facts = facts_of(model, accumulation=3)
    run = Run(model, switch_every=2).begin()
    shape = BatchShape(rows=2, length=6)
    steps = [run.method.step_flops(facts.model, [shape] * 3, step) for step in range(16)]
    predicted = cost(BAdamConfig(switch_every=2), facts)
    assert predicted.step_flops == sum(steps) / 16
    block = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    assert 8 * block <= predicted.bytes["optimizer"] <= 8 * block + COUNTERS
    assert predicted.bytes["gradients"] == 4 * block


def test_cost_of_a_short_run_counts_the_blocks_it_visits():
    model = tiny_model(attn_implementation="eager")
    run = Run(model, switch_every=3, mode="ascending").begin()
    facts = facts_of(model, max_steps=4)
    steps = [run.method.step_flops(facts.model, [BatchShape(rows=2, length=6)], step) for step in range(4)]
    predicted = cost(BAdamConfig(switch_every=3, mode="ascending"), facts).step_flops
    assert predicted == sum(steps) / 4
    assert predicted > cost(BAdamConfig(switch_every=3, mode="descending"), facts).step_flops


def test_cost_grows_with_the_block_and_16_bits_add_a_master_copy():
    model = tiny_model(layers=8)
    small_block, large = (cost(BAdamConfig(layers_per_block=size), facts_of(model)) for size in (1, 4))
    assert abs(large.bytes["optimizer"] - 4 * small_block.bytes["optimizer"]) <= 4 * COUNTERS
    with_table = cost(BAdamConfig(include_embedding=True), facts_of(model))
    table = model.model.embed_tokens.weight.numel()
    block = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    assert 0 <= with_table.bytes["optimizer"] - 8 * max(table, block) <= COUNTERS
    half = cost(BAdamConfig(), facts_of(tiny_model(layers=8).to(torch.bfloat16)))
    assert 0 <= half.bytes["optimizer"] - 12 * block <= COUNTERS
    assert half.bytes["gradients"] == 2 * block


def test_cost_with_adapters_counts_the_adapters():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules="all-linear"))
    adapters = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and ".layers.0." in name)
    assert 0 <= cost(BAdamConfig(), facts_of(model)).bytes["optimizer"] - 8 * adapters <= 2 * COUNTERS


def test_spec_is_consistent():
    assert SPEC.build(SPEC.config.from_dict(SPEC.tiny)).config.switch_every == 2
    assert SPEC.traits.ddp
    assert SPEC.traits.fsdp2


# -- two processes


def _ddp_worker(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = tiny_model()
    method = BAdam(BAdamConfig(switch_every=2))
    optimizer = method.create_optimizer(context_of(model))
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    method.train_begin(wrapped, 0)
    for step in range(8):
        method.step_begin(step)
        wrapped(**batch(2 * step + rank)).loss.backward()
        optimizer.step()
        wrapped.zero_grad()
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_two_ranks_stay_equal_over_switches_and_equal_one_process(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_ddp_worker, (port, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert_same(*ranks)

    run = Run(switch_every=2)
    for step in range(8):
        run.method.step_begin(step)
        for rank in range(2):
            (run.model(**batch(2 * step + rank)).loss / 2).backward()
        run.optimizer.step()
        run.model.zero_grad()
    for name, weight in run.weights().items():
        assert torch.allclose(weight, ranks[0][name], atol=1e-5)
    start = dict(tiny_model().named_parameters())
    assert any(not torch.equal(weight, start[name]) for name, weight in run.weights().items())
