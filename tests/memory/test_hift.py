"""HiFT against plain loops: one AdamW with masked gradients, full AdamW, and a schedule that rests inside a sweep."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import get_linear_schedule_with_warmup

from hf_eff.contracts.cost import Facts, HardwareFacts, PoolFacts, RunFacts
from hf_eff.contracts.memory import OptimizerContext
from hf_eff.engines.facts import model_facts
from hf_eff.engines.schedule_progress import hold
from hf_eff.engines.state_store import StateStore
from hf_eff.errors import CheckpointError, OptionError, OutsideIntendedUseWarning
from hf_eff.hardware.memory_meter import optimizer_tensors, storage_bytes
from hf_eff.memory.hift import SPEC, HiFT, HiFTConfig, cost
from hf_eff.testing.rehearsal import Rehearsal, differing, split, toy_batches
from hf_eff.testing.tiny import tiny_model


def model_of(layers=3, **changes):
    return tiny_model(layers=layers, width=16, **changes)


def batch(step):
    ids = torch.randint(3, 200, (2, 6), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids}


class Run:
    """A model under hift, without a trainer."""

    def __init__(self, model=None, *, total_steps=0, lr=1e-2, **options):
        self.model = model_of() if model is None else model
        self.method = HiFT(HiFTConfig(**options))
        names = frozenset(name for name, _ in self.model.named_parameters())
        self.optimizer = self.method.create_optimizer(
            OptimizerContext(
                model=self.model,
                candidates=names,
                decay_names=names,
                optimizer_class=torch.optim.AdamW,
                optimizer_kwargs={"lr": lr, "weight_decay": 0.1},
                weight_decay=0.1,
                stock=lambda: torch.optim.AdamW(self.model.parameters(), lr=lr, weight_decay=0.1),
                seed=0,
                total_steps=total_steps,
            )
        )
        self.method.train_begin(self.model, 0)

    def step(self, step, accumulation=1):
        self.method.step_begin(step)
        for part in range(accumulation):
            (self.model(**batch(10 * step + part)).loss / accumulation).backward()
        self.optimizer.step()
        self.model.zero_grad()
        return self

    def steps(self, *steps, **options):
        for step in steps:
            self.step(step, **options)
        return self

    @property
    def blocks(self):
        return self.method.switch.partition.blocks

    def weights(self):
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}


def naive(model, blocks, steps, masters=False):
    """AdamW over everything that keeps all its state and sees one group's gradients a step."""
    named = dict(model.named_parameters())
    wide = {name: torch.nn.Parameter(each.detach().float()) if masters else each for name, each in named.items()}
    optimizer = torch.optim.AdamW(wide.values(), lr=1e-2, weight_decay=0.1)
    for step in range(steps):
        model(**batch(10 * step)).loss.backward()
        for name, parameter in named.items():
            gradient = parameter.grad if name in blocks[step % len(blocks)] else None
            wide[name].grad = gradient if gradient is None else gradient.to(wide[name].dtype)
        optimizer.step()
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(wide[name])
        model.zero_grad()
    return {name: parameter.detach().clone() for name, parameter in named.items()}


# -- fidelity


@pytest.mark.parametrize("tied", [False, True])
def test_one_group_of_everything_equals_adamw_bit_for_bit(tied):
    run = Run(model_of(tie_word_embeddings=tied), layers_per_group=5).steps(*range(8))
    assert len(run.blocks) == 1
    model = model_of(tie_word_embeddings=tied)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(8):
        model(**batch(10 * step)).loss.backward()
        optimizer.step()
        model.zero_grad()
    assert not differing(run.weights(), dict(model.named_parameters()))


@pytest.mark.parametrize("policy", ["keep", "offload", "disk"])
@pytest.mark.parametrize("order", ["bottom2up", "top2down", "random"])
def test_equals_one_adamw_that_keeps_the_full_state(policy, order):
    run = Run(order=order, state_policy=policy)
    turn = [run.method.schedule.active_at(step)[0] for step in range(5)]
    assert turn == {"bottom2up": [0, 1, 2, 3, 4], "top2down": [4, 3, 2, 1, 0]}.get(order, turn)
    run.steps(*range(17))
    assert not differing(run.weights(), naive(model_of(), [run.blocks[index] for index in turn], 17))


def test_16_bit_weights_keep_their_master_copies_from_visit_to_visit():
    run = Run(model_of().to(torch.bfloat16), state_policy="disk")
    run.steps(*range(12))
    assert not differing(run.weights(), naive(model_of().to(torch.bfloat16), run.blocks, 12, masters=True))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_parameter_changes_exactly_once_a_sweep(size):
    run = Run(model_of(layers=4), layers_per_group=size)
    groups = len(run.blocks)
    assert groups == {1: 6, 2: 3, 3: 2}[size]  # embedding, four layers and head by ones, twos and threes
    changes = dict.fromkeys(run.weights(), 0)
    for sweep in range(2):
        for slot in range(groups):
            before = run.weights()
            run.step(groups * sweep + slot)
            for name in differing(before, run.weights()):
                changes[name] += 1
        assert set(changes.values()) == {sweep + 1}


def test_a_last_smaller_group_does_not_shift_the_sweeps():
    run = Run(model_of(layers=4, tie_word_embeddings=False), layers_per_group=4)
    assert [len(run.blocks), run.method.schedule_every()] == [2, 2]
    assert run.blocks[1][-1] == "lm_head.weight"
    assert [run.method.schedule.active_at(step)[0] for step in range(6)] == [0, 1] * 3


def test_step_counts_are_visits():
    run = Run(state_policy="offload").steps(*range(13))  # five groups: three of them three times, two twice
    counts = [
        {int(run.optimizer.state[run.model.get_parameter(name)]["step"]) for name in block} for block in run.blocks
    ]
    assert counts == [{3}, {3}, {3}, {2}, {2}]


def test_a_group_lasts_a_whole_accumulation_window():
    """The official code switches at every micro-batch, so that each group sees a part of the window only."""
    run, groups = Run(), []
    for step in range(5):
        before = run.weights()
        run.step(step, accumulation=3)
        groups.append(set(differing(before, run.weights())))
    assert groups == [set(block) for block in run.blocks]
    whole, parts = Rehearsal(SPEC), Rehearsal(SPEC)
    for window in toy_batches(4):
        whole.step([window])
        parts.step(split(window, 2))
    moved = [whole.weights()[name] - weight for name, weight in parts.weights().items()]
    assert max(float(each.abs().max()) for each in moved) < 1e-4


# -- the clock of the learning rate


def test_the_rate_rests_inside_a_sweep_and_still_runs_to_the_end():
    """The official code builds the schedule for all steps and moves it once a sweep: it ends near where it began."""
    run, total = Run(), 40
    scheduler = get_linear_schedule_with_warmup(run.optimizer, 0, total)
    hold(scheduler, run.method.schedule_every())
    rates = []
    for step in range(total):
        rates.append(run.optimizer.param_groups[0]["lr"])
        run.step(step)
        scheduler.step()
    assert rates == [pytest.approx(1e-2 * (1 - 5 * (step // 5) / total)) for step in range(total)]
    assert rates[-1] == pytest.approx(1e-2 * 5 / 40)
    assert Run(lr_clock="step").method.schedule_every() == 1


# -- where the state rests


def test_files_hold_the_state_of_groups_that_wait_and_go_at_the_end():
    run = Run(state_policy="disk").steps(*range(6))
    folder = run.method.switch.store.folder
    assert folder.stat().st_mode & 0o077 == 0
    waiting = {name for block in run.blocks[1:] for name in block}
    assert set(run.method.switch.store.names()) == waiting
    sizes = {name: run.model.get_parameter(name).numel() for name in waiting}
    on_disk = sum(path.stat().st_size for path in folder.iterdir())
    assert 8 * sum(sizes.values()) <= on_disk <= 8 * sum(sizes.values()) + 512 * len(sizes)
    active = [run.model.get_parameter(name) for name in run.blocks[0]]
    held = storage_bytes(optimizer_tensors(run.optimizer))
    assert held == sum(8 * each.numel() + 4 for each in active)
    run.method.train_end()
    assert not folder.exists()


def test_the_folder_goes_with_the_method():
    run = Run(state_policy="disk").steps(0, 1)
    folder = Path(run.method.switch.store.folder)
    assert folder.exists()
    run.method.switch = None
    assert not folder.exists()


@pytest.mark.parametrize("policy", ["reset", "keep", "offload", "disk", "host"])
@pytest.mark.parametrize("stop", [3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interrupted_in_mid_sweep_and_resumed_equals_uninterrupted(tmp_path, policy, stop, dtype):
    from hf_eff.engines.sidecar import load_state, save_state

    def start():
        run = Run(model_of().to(dtype), state_policy="offload" if policy == "host" else policy)
        if policy == "host":  # as on an accelerator
            run.method.switch.store = StateStore()
        return run

    whole, first, second = start().steps(*range(14)), start().steps(*range(stop)), start()
    save_state(tmp_path, first.method.state_dict())
    torch.save(first.optimizer.state_dict(), tmp_path / "optimizer.pt")
    second.model.load_state_dict(copy.deepcopy(first.model.state_dict()))
    first.method.train_end()
    second.method.load_state_dict(load_state(tmp_path), stop)
    second.optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    second.method.train_begin(second.model, stop)
    second.steps(*range(stop, 14))
    assert not differing(whole.weights(), second.weights())
    states = [run.method.switch.state_dict() for run in (whole, second)]
    assert states[0].keys() == states[1].keys()
    assert bool(states[0]) == (policy in ("disk", "host"))
    tensors = [{key: value for key, value in state.items() if key != "plain"} for state in states]
    assert not differing(*tensors)


def test_a_checkpoint_of_another_order_is_refused():
    state = Run().step(0).method.state_dict()
    with pytest.raises(CheckpointError, match="descending"):
        Run(order="top2down").method.load_state_dict(state, 1)


# -- options, warnings, cost


def test_embedding_and_head_can_be_left_out():
    run = Run(include_embedding=False, include_head=False)
    assert len(run.blocks) == 3
    assert set(run.method.switch.partition.frozen) == {"model.embed_tokens.weight", "model.norm.weight"}
    with pytest.raises(OptionError, match="layers_per_group must be in"):
        HiFTConfig(layers_per_group=0)
    with pytest.raises(OptionError, match="order must be one of"):
        HiFTConfig(order="up2down")


def test_a_run_shorter_than_a_sweep_warns_which_groups_never_train():
    with pytest.warns(OutsideIntendedUseWarning, match=r"memory='hift' visits 3 of 5 blocks in 3 steps; 3, 4 never"):
        Run(total_steps=3)


def facts_of(model, device="cpu", **run):
    return Facts(
        model=model_facts(model),
        pool=PoolFacts(num_rows=100, mean_tokens=6, max_tokens=6),
        hardware=HardwareFacts(device=device),
        run=RunFacts(batch_size=2, length=6, **run),
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cost_puts_the_state_where_it_rests(tied, dtype):
    model = model_of(tie_word_embeddings=tied).to(dtype)
    total = sum(each.numel() for each in model.parameters())
    group = max(
        sum(model.get_parameter(name).numel() for name in block)
        for block in Run(model_of(tie_word_embeddings=tied)).blocks
    )
    size = 8 if dtype == torch.float32 else 12

    def near(value, expected):
        return value == pytest.approx(size * expected, rel=0.02)

    here, there = cost(HiFTConfig(), facts_of(model)), cost(HiFTConfig(), facts_of(model, "cuda"))
    files = cost(HiFTConfig(state_policy="disk"), facts_of(model))
    assert near(here.bytes["optimizer"], total)
    assert here.host_bytes == here.disk_bytes == 0
    assert near(there.bytes["optimizer"], group)
    assert near(there.host_bytes, total)
    assert near(files.bytes["optimizer"], group)
    assert near(files.disk_bytes, total)


def test_cost_predicts_the_mean_step_of_a_sweep():
    run = Rehearsal(SPEC, make_model=lambda: tiny_model(layers=4, attn_implementation="eager")).begin()
    from hf_eff.contracts.memory import BatchShape

    steps = [run.method.step_flops(run.facts, [BatchShape(rows=2, length=6)], step) for step in range(6)]
    predicted = cost(HiFTConfig(), facts_of(run.model)).step_flops
    assert predicted == pytest.approx(sum(steps) / 6, rel=0.05)
    assert steps[1:5] == sorted(steps[1:5], reverse=True)
