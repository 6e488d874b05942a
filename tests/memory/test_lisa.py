"""LISA against plain loops: full AdamW, an AdamW whose state is dropped by hand, and counts over many draws."""

import random

import numpy as np
import pytest
import torch

from hf_eff.contracts.cost import Facts, PoolFacts, RunFacts
from hf_eff.contracts.memory import BatchShape, OptimizerContext
from hf_eff.engines.facts import model_facts
from hf_eff.errors import OptionError, OutsideIntendedUseWarning, PlanError
from hf_eff.hardware.memory_meter import optimizer_tensors, storage_bytes
from hf_eff.memory.lisa import LISA, SPEC, LISAConfig, cost
from hf_eff.testing.rehearsal import Rehearsal, differing, toy_batches
from hf_eff.testing.tiny import tiny_model


def model_of(layers=4, **changes):
    return tiny_model(layers=layers, width=16, **changes)


def batch(step):
    ids = torch.randint(3, 200, (2, 6), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids}


class Run:
    """A model under lisa, without a trainer."""

    def __init__(self, model=None, *, seed=0, total_steps=0, **options):
        self.model = model_of() if model is None else model
        self.method = LISA(LISAConfig(**options))
        names = frozenset(name for name, _ in self.model.named_parameters())
        self.optimizer = self.method.create_optimizer(
            OptimizerContext(
                model=self.model,
                candidates=names,
                decay_names=names,
                optimizer_class=torch.optim.AdamW,
                optimizer_kwargs={"lr": 1e-2, "weight_decay": 0.1},
                weight_decay=0.1,
                stock=lambda: torch.optim.AdamW(self.model.parameters(), lr=1e-2, weight_decay=0.1),
                seed=seed,
                total_steps=total_steps,
            )
        )
        self.method.train_begin(self.model, 0)

    def steps(self, *steps, after=lambda step: None):
        for step in steps:
            self.method.step_begin(step)
            self.model(**batch(step)).loss.backward()
            self.optimizer.step()
            after(step)
            self.model.zero_grad()
        return self

    def active(self, step):
        return set(self.method.switch.active_names(self.method.schedule.active_at(step)))

    def weights(self):
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}


# -- fidelity


@pytest.mark.parametrize("policy", ["reset", "keep"])
@pytest.mark.parametrize("tied", [False, True])
def test_with_all_layers_active_it_is_adamw_bit_for_bit(policy, tied):
    run = Run(model_of(tie_word_embeddings=tied), active_layers=4, switch_every=3, state_policy=policy).steps(
        *range(10)
    )
    model = model_of(tie_word_embeddings=tied)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(10):
        model(**batch(step)).loss.backward()
        optimizer.step()
        model.zero_grad()
    assert not differing(run.weights(), dict(model.named_parameters()))


@pytest.mark.parametrize("policy", ["reset", "keep"])
def test_equals_an_adamw_with_masked_gradients_whose_state_is_dropped_by_hand(policy):
    run = Run(active_layers=2, switch_every=3, state_policy=policy).steps(*range(20))

    model, drawn = model_of(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(20):
        if step % 3 == 0:
            drawn = random.Random(f"block sample 0 {step // 3}").sample(range(4), 2)
        model(**batch(step)).loss.backward()
        for name, parameter in model.named_parameters():
            if ".layers." in name and int(name.split(".")[2]) not in drawn:
                parameter.grad = None
                if policy == "reset":
                    optimizer.state.pop(parameter, None)
        optimizer.step()
        model.zero_grad()
    assert not differing(run.weights(), dict(model.named_parameters()))


def test_only_the_drawn_layers_and_what_lies_outside_move():
    run = Run(active_layers=1, switch_every=2)
    for step in range(12):
        before = run.weights()
        run.steps(step)
        moved = set(differing(before, run.weights()))
        assert moved == run.active(step)
        assert len({name.split(".")[2] for name in moved if ".layers." in name}) == 1


def test_state_exists_for_the_active_set_only():
    """The callbacks in use never drop it: after a few draws nearly every layer holds Adam state."""
    run = Run(model_of(layers=8), active_layers=2, switch_every=2)

    def check(step):
        names = run.active(step)
        held = {name for name, each in run.model.named_parameters() if each in run.optimizer.state}
        assert held == names
        sizes = [run.model.get_parameter(name).numel() for name in names]
        assert storage_bytes(optimizer_tensors(run.optimizer)) == sum(8 * size + 4 for size in sizes)
        with_gradient = {name for name, each in run.model.named_parameters() if each.grad is not None}
        assert with_gradient == names

    run.steps(*range(20), after=check)


def test_draws_come_every_k_steps_from_the_first_and_from_no_global_generator():
    """The callbacks in use draw at step 0 and again at step 1, from NumPy's global state."""
    states = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()  # noqa: NPY002
    run, seen = Run(model_of(layers=12), active_layers=3, switch_every=4), []
    run.steps(*range(16), after=lambda step: seen.append(run.method.switch.active))
    assert [seen[i] != seen[i - 1] for i in range(1, 16)] == [i % 4 == 0 for i in range(1, 16)]
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tobytes() == states[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    other = Run(model_of(layers=12), active_layers=3, switch_every=4, seed=1)
    assert [other.method.schedule.active_at(4 * i) for i in range(4)] != seen[::4]


def test_a_layer_drawn_twice_in_a_row_keeps_its_state_and_the_rest_never_loses_it():
    run = Run(model_of(layers=3), active_layers=2, switch_every=2, seed=2).steps(*range(6))
    draws = [set(run.method.schedule.active_at(2 * visit)) for visit in range(3)]
    assert draws[0] != draws[1] != draws[2]
    for layer in draws[2]:
        visits = 1 + (layer in draws[1]) + (layer in draws[1] and layer in draws[0])
        parameter = run.model.model.layers[layer].mlp.up_proj.weight
        assert int(run.optimizer.state[parameter]["step"]) == 2 * visits
    assert int(run.optimizer.state[run.model.model.embed_tokens.weight]["step"]) == 6


@pytest.mark.parametrize("stop", [1, 4, 5, 6])
@pytest.mark.parametrize("policy", ["reset", "keep", "disk"])
def test_interrupted_and_resumed_equals_uninterrupted(stop, policy):
    options = {"active_layers": 1, "switch_every": 2, "state_policy": policy}
    batches = toy_batches(10)
    whole = Rehearsal(SPEC, options=options).run(batches)
    first = Rehearsal(SPEC, options=options).run(batches[:stop])
    second = Rehearsal(SPEC, options=options).restore(first.snapshot()).run(batches[stop:])
    assert not differing(whole.weights(), second.weights())


# -- what lies outside the layers


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("part", ["embedding", "norm", "head"])
def test_each_part_outside_the_layers_can_be_left_out(part, tied):
    run = Run(model_of(tie_word_embeddings=tied), active_layers=1, **{f"include_{part}": False})
    own = {
        "embedding": set() if tied else {"model.embed_tokens.weight"},
        "norm": {"model.norm.weight"},
        "head": set() if tied else {"lm_head.weight"},
    }
    outside = {name for name, _ in run.model.named_parameters() if ".layers." not in name}
    assert set(run.method.switch.partition.frozen) == own[part]
    assert set(run.method.switch.partition.always) == outside - own[part]


def test_without_the_embedding_the_backward_ends_at_the_lowest_drawn_layer():
    model = model_of(tie_word_embeddings=False, attn_implementation="eager")
    run = Run(model, active_layers=1, switch_every=1, include_embedding=False)
    facts, shape = model_facts(model), [BatchShape(rows=2, length=6)]
    flops = {run.method.schedule.active_at(step)[0]: run.method.step_flops(facts, shape, step) for step in range(30)}
    assert [flops[layer] for layer in range(4)] == sorted(flops.values(), reverse=True)
    assert flops[0] > 1.15 * flops[3]


# -- options, warnings, cost


def test_more_layers_than_there_are_is_refused_and_bounds_hold():
    with pytest.raises(PlanError, match="active_layers=5 is more than the 4 layers"):
        Run(active_layers=5)
    with pytest.raises(PlanError, match="active_layers=5 is more than the 4 layers"):
        cost(LISAConfig(active_layers=5), facts_of(model_of()))
    with pytest.raises(OptionError, match="active_layers must be in"):
        LISAConfig(active_layers=0)


def test_layers_that_are_never_drawn_are_named():
    with pytest.warns(
        OutsideIntendedUseWarning, match=r"visits 1 of 4 blocks in 9 steps; .* never train\..*more active"
    ):
        Run(active_layers=1, switch_every=20, total_steps=9)


def facts_of(model, **run):
    return Facts(
        model=model_facts(model),
        pool=PoolFacts(num_rows=100, mean_tokens=6, max_tokens=6),
        run=RunFacts(batch_size=2, length=6, **run),
    )


@pytest.mark.parametrize("included", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_cost_predicts_state_and_the_mean_step_over_all_draws(included, tied):
    model = model_of(layers=5, tie_word_embeddings=tied, attn_implementation="eager")
    options = {"active_layers": 2, "include_embedding": included, "include_head": included, "include_norm": included}
    run = Run(model, switch_every=1, **options)
    predicted = cost(LISAConfig(**options), facts_of(model))
    trained = sum(model.get_parameter(name).numel() for name in run.active(0))
    assert predicted.bytes["optimizer"] == pytest.approx(8 * trained, rel=0.02)
    assert predicted.bytes["gradients"] == 4 * trained
    facts, shape = model_facts(model), [BatchShape(rows=2, length=6)]
    draws = {run.method.schedule.active_at(step): step for step in range(400)}
    assert len(draws) == 10
    mean = sum(run.method.step_flops(facts, shape, step) for step in draws.values()) / 10
    # A plain part charges the lowest layer's first projections for an input gradient that nothing asks for.
    assert mean <= predicted.step_flops * (1 + 1e-4)
    assert predicted.step_flops == pytest.approx(mean, rel=0.04)
