"""Updates inside the backward against torch's own optimizers, bit for bit, and against lomo-optim's known defects."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_eff.contracts.cost import Facts, HardwareFacts, PoolFacts, RunFacts
from hf_eff.contracts.memory import BatchShape, OptimizerContext, StepContext
from hf_eff.engines.facts import model_facts
from hf_eff.errors import OptionError, PlanError
from hf_eff.hardware.memory_meter import MemoryMeter
from hf_eff.memory.fused import SPEC, Fused, FusedConfig, cost
from hf_eff.options import EffOptions
from hf_eff.plan import make_plan
from hf_eff.testing.tiny import tiny_model
from hf_eff.testing.trial import Trial

DECAY = 0.1


def toy(**changes):
    return tiny_model(layers=2, width=32, **{"attn_implementation": "eager", **changes})


def batch(step, rows=2, length=6):
    ids = torch.randint(3, 200, (rows, length), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids}


def decayed(model):
    return frozenset(name for name, parameter in model.named_parameters() if parameter.dim() > 1)


def groups_of(model, weight_decay=DECAY):
    named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    names = decayed(model)
    return [
        {"params": [p for name, p in named if name in names], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name not in names], "weight_decay": 0.0},
    ]


def loss_of(model, inputs, parts=1):
    return model(**inputs).loss / parts


def stock_step(model, inputs, parts):
    model.train()
    loss = loss_of(model, inputs, parts)
    loss.backward()
    return loss.detach()


class Run:
    """One model under the method, without a trainer."""

    def __init__(self, model, *, lr=1e-2, max_grad_norm=0.0, seed=0, weight_decay=DECAY, adam=None, **options):
        self.model = model
        self.method = Fused(FusedConfig(**options))
        self.optimizer = self.method.create_optimizer(
            OptimizerContext(
                model=model,
                candidates=frozenset(name for name, p in model.named_parameters() if p.requires_grad),
                decay_names=decayed(model),
                optimizer_class=torch.optim.AdamW,
                optimizer_kwargs={"lr": lr, **(adam or {})},
                weight_decay=weight_decay,
                stock=lambda: None,
                seed=seed,
                max_grad_norm=max_grad_norm,
            )
        )
        self.method.train_begin(model, 0)

    def step(self, index, *window, loss=loss_of):
        window = window or (batch(index),)
        self.method.step_begin(index)
        for micro, inputs in enumerate(window):
            self.method.training_step(
                StepContext(
                    model=self.model,
                    unwrapped=self.model,
                    inputs=inputs,
                    num_items=len(window),
                    micro_step=micro,
                    micro_steps=len(window),
                    global_step=index,
                    stock=stock_step,
                    loss=loss,
                    mean_over_ranks=lambda value: value,
                )
            )
        self.optimizer.step()
        self.model.zero_grad()
        return self

    def steps(self, *indices):
        for index in indices:
            self.step(index)
        return self

    def weights(self):
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}


def plain(model, optimizer, steps, *, clip=0.0, before=None):
    norms = []
    for step in steps:
        if before is not None:
            before(optimizer, step)
        model.train()
        loss_of(model, batch(step)).backward()
        if clip:
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip)))
        optimizer.step()
        model.zero_grad()
    return norms


def different(first, model):
    return [name for name, each in model.named_parameters() if not torch.equal(first[name], each.detach())]


# -- fidelity


def test_sgd_equals_torch_bit_for_bit_and_reads_the_rate_at_each_step():
    def schedule(optimizer, step):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)

    run = Run(toy())
    for step in range(8):
        schedule(run.optimizer, step)
        run.step(step)
    model = toy()
    plain(model, torch.optim.SGD(groups_of(model), lr=1e-2), range(8), before=schedule)
    assert different(run.weights(), model) == []


@pytest.mark.parametrize("adam", [{}, {"fused": True}, {"betas": (0.8, 0.9), "eps": 1e-6}])
def test_adamw_equals_torch_bit_for_bit(adam):
    run = Run(toy(), rule="adamw", adam=adam).steps(*range(8))
    model = toy()
    plain(model, torch.optim.AdamW(groups_of(model), lr=1e-2, **adam), range(8))
    assert different(run.weights(), model) == []


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"decay": "decoupled"}, lambda p, g, d: p.mul_(1 - 1e-2 * d).sub_(1e-2 * g)),
        ({"rule": "signsgd"}, lambda p, g, d: p.mul_(1 - 1e-2 * d).sub_(1e-2 * g.sign())),
        ({"clip": "value", "clip_value": 1e-3}, lambda p, g, d: p.sub_(1e-2 * (g.clamp(-1e-3, 1e-3) + d * p))),
    ],
)
def test_other_rules_equal_one_literal_line(options, rule):
    run = Run(toy(), **options)
    model = toy()
    for step in range(4):
        run.step(step)
        loss_of(model.train(), batch(step)).backward()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                rule(parameter, parameter.grad, DECAY if name in decayed(model) else 0.0)
        model.zero_grad()
    for name, parameter in model.named_parameters():
        assert torch.allclose(run.weights()[name], parameter, rtol=1e-5, atol=1e-8), name


@pytest.mark.parametrize("tied", [True, False])
def test_two_backwards_equal_clipping_and_sgd_bit_for_bit(tied):
    changes = {"tie_word_embeddings": tied, "attention_dropout": 0.3}
    torch.manual_seed(5)
    run = Run(toy(**changes), lr=0.1, clip="two_backwards", max_grad_norm=0.7)
    norms = [run.step(step).method.grad_norm() for step in range(5)]
    torch.manual_seed(5)
    model = toy(**changes)
    expected = plain(model, torch.optim.SGD(groups_of(model), lr=0.1), range(5), clip=0.7)
    assert norms == expected
    assert max(norms) > 0.7
    assert different(run.weights(), model) == []


def test_a_norm_below_the_limit_is_not_clipped():
    clipped = Run(toy(), clip="two_backwards", max_grad_norm=1e6).steps(*range(3))
    free = Run(toy()).steps(*range(3))
    assert different(clipped.weights(), free.model) == []


# -- gradients


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("clip", [None, "two_backwards"])
def test_one_gradient_is_alive_at_a_time_and_each_tensor_moves_once(tied, clip):
    model, alive, visits = toy(tie_word_embeddings=tied), [], []

    def look(parameter):
        alive.append(sum(each.grad is not None for each in model.parameters()))
        visits.append(id(parameter))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(look)
    run = Run(model, clip=clip, max_grad_norm=1.0 if clip else 0.0)
    run.step(0)
    passes = 2 if clip else 1
    assert max(alive) == 1
    assert sorted(visits) == sorted(passes * [id(each) for each in model.parameters()])
    assert all(each.grad is None for each in model.parameters())


def test_the_logged_norm_is_that_of_the_gradients():
    model = toy()
    loss_of(model.train(), batch(0)).backward()
    expected = math.sqrt(sum(float(each.grad.double().square().sum()) for each in model.parameters()))
    run = Run(toy())
    assert run.method.grad_norm() is None
    assert run.step(0).method.grad_norm() == pytest.approx(expected, rel=1e-5)
    assert run.method.grad_norm() > 0


def test_hooks_rest_outside_a_training_step_and_are_gone_at_the_end():
    run = Run(toy())
    before = run.weights()
    loss_of(run.model, batch(0)).backward()
    assert all(each.grad is not None for each in run.model.parameters())
    run.model.zero_grad()
    run.method.train_end()
    assert all(not each._post_accumulate_grad_hooks for each in run.model.parameters())
    assert different(before, run.model) == []


def test_frozen_weights_stay_and_keep_no_gradient():
    model = toy()
    model.model.embed_tokens.requires_grad_(False)
    run = Run(model)
    before = run.weights()
    run.steps(0, 1)
    assert "model.embed_tokens.weight" not in different(before, model)
    assert len(different(before, model)) == len(before) - 1


# -- what lomo-optim gets wrong


@pytest.mark.parametrize(("clip", "limit"), [(None, 0.0), ("two_backwards", 0.5)])
def test_parts_of_a_step_are_added_up_before_the_update(clip, limit):
    """LOMO updates at every micro-batch, which is another algorithm."""
    run = Run(toy(), lr=0.1, clip=clip, max_grad_norm=limit)
    model = toy()
    optimizer = torch.optim.SGD(groups_of(model), lr=0.1)
    for step in range(3):
        window = [batch(10 * step + part) for part in range(3)]
        run.step(step, *window)
        for inputs in window:
            loss_of(model.train(), inputs, 3).backward()
        if limit:
            norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
            assert run.method.grad_norm() == float(norm) > limit
        optimizer.step()
        model.zero_grad()
    assert different(run.weights(), model) == []


def facts_of(model, **run):
    return Facts(
        model=model_facts(model),
        pool=PoolFacts(num_rows=100, mean_tokens=16, max_tokens=16),
        hardware=HardwareFacts(),
        run=RunFacts(**{"batch_size": 2, "length": 16, "max_grad_norm": 0.0, **run}),
    )


def test_accumulation_is_refused_by_the_plan():
    with pytest.raises(PlanError, match="gradient accumulation"):
        make_plan(EffOptions(memory="fused"), facts_of(toy(), accumulation=2))


def test_a_clip_that_would_be_ignored_is_refused():
    facts = facts_of(toy(), max_grad_norm=1.0)
    with pytest.raises(PlanError, match="max_grad_norm=0, or clip='two_backwards'"):
        make_plan(EffOptions(memory="fused"), facts)
    with pytest.raises(PlanError, match="max_grad_norm=0, or clip='two_backwards'"):
        Run(toy(), max_grad_norm=1.0)
    for clip in ("two_backwards", "value"):
        make_plan(EffOptions(memory="fused", memory_kwargs={"clip": clip}), facts)


def test_ddp_is_refused_by_the_plan():
    facts = facts_of(toy())
    facts = facts.replace(hardware=HardwareFacts(backend="ddp", world_size=2))
    with pytest.raises(PlanError, match="DDP"):
        make_plan(EffOptions(memory="fused"), facts)


def test_no_hook_scans_the_model(monkeypatch):
    """LOMO looks at every parameter in every hook."""
    run, calls = Run(toy()), []
    seen = nn.Module.named_parameters

    def counted(module, *args, **kwargs):
        calls.append(module)
        return seen(module, *args, **kwargs)

    run.method.step_begin(0)
    monkeypatch.setattr(nn.Module, "named_parameters", counted)
    run.method.training_step(StepContext(run.model, run.model, batch(0), 1, 0, 1, 0, stock_step, loss_of, None))
    assert calls == []


# -- gradients that are not finite


def poisoned(model, inputs, parts):
    """A finite loss whose gradient at one norm is infinite."""
    loss = loss_of(model, inputs, parts)
    weight = model.model.norm.weight
    return loss + (weight - weight.detach()).abs().sqrt().sum()


def test_a_gradient_that_is_not_finite_moves_nothing_and_is_counted():
    run = Run(toy())
    before = run.weights()

    def stock(model, inputs, parts):
        loss = poisoned(model.train(), inputs, parts)
        loss.backward()
        return loss.detach()

    run.method.training_step(
        StepContext(run.model, run.model, batch(0), 1, 0, 1, 0, stock, poisoned, lambda value: value)
    )
    moved = different(before, run.model)
    assert "model.norm.weight" not in moved
    assert len(moved) == len(before) - 1
    assert run.method.log_entries() == {"skipped_updates": 1.0}
    assert run.method.state_dict() == {"skipped": 1}


def test_a_clipped_step_with_one_is_left_out_as_a_whole():
    run = Run(toy(), clip="two_backwards", max_grad_norm=1.0)
    before = run.weights()
    run.step(0, loss=poisoned)
    assert different(before, run.model) == []
    assert run.method.log_entries()["skipped_updates"] == len(before)
    assert different(before, run.step(1).model)


# -- bf16


def test_small_updates_of_bf16_weights_count_on_average():
    """Weights near 0.02 are 6e-5 to 1.2e-4 apart; the update is 1e-5."""

    def mean_move(**options):
        model = toy().to(torch.bfloat16)
        loss_of(model.train(), batch(0)).backward()
        signs = {name: each.grad.float().sign() for name, each in model.named_parameters()}
        model.zero_grad()
        run = Run(model, lr=1e-5, rule="signsgd", weight_decay=0.0, **options)
        before = run.weights()
        after = run.step(0).weights()
        moves = [(before[n].float() - after[n].float()) * signs[n] for n in before if "_proj" in n]
        return float(torch.cat([move.flatten() for move in moves]).mean())

    assert mean_move() == pytest.approx(1e-5, rel=0.1)
    assert mean_move(stochastic_rounding=False) < 0.5e-5


def test_bf16_rounds_by_seed_step_and_name_alone():
    def run(seed=0):
        torch.rand(seed + 3)
        return Run(toy().to(torch.bfloat16), seed=seed).steps(0, 1, 2)

    assert different(run().weights(), run().model) == []
    assert different(run().weights(), run(seed=1).model)
    halves = Run(toy().to(torch.bfloat16)).steps(0, 1)
    second = Run(halves.model).steps(2)
    assert different(run().weights(), second.model) == []


@pytest.mark.parametrize(("rule", "optimizer"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_without_stochastic_rounding_bf16_equals_torch(rule, optimizer):
    run = Run(toy().to(torch.bfloat16), rule=rule, stochastic_rounding=False).steps(*range(3))
    model = toy().to(torch.bfloat16)
    plain(model, optimizer(groups_of(model), lr=1e-2), range(3))
    assert different(run.weights(), model) == []


def test_adamw_on_bf16_keeps_fp32_state_through_a_checkpoint():
    first = Run(toy().to(torch.bfloat16), rule="adamw").steps(0, 1)
    saved = copy.deepcopy(first.optimizer.state_dict())
    kinds = {value.dtype for state in saved["state"].values() for value in state.values()}
    assert kinds == {torch.float32}
    second = Run(copy.deepcopy(first.model), rule="adamw")
    second.optimizer.load_state_dict(saved)
    second.method.train_begin(second.model, 2)
    assert different(first.steps(2, 3).weights(), second.steps(2, 3).model) == []


# -- cost


def measured(run, steps=2):
    meter = MemoryMeter(run.model)
    for step in range(steps):
        with meter.forward_backward():
            run.step(step)
        meter.observe(run.optimizer)
    return meter.peak_bytes()


@pytest.mark.parametrize("rule", ["sgd", "signsgd", "adamw"])
def test_predicted_bytes_are_those_held(rule):
    model = toy()
    predicted = cost(FusedConfig(rule=rule), facts_of(model)).bytes
    held = measured(Run(model, rule=rule))
    assert predicted["gradients"] == held["gradients"] == 0
    assert predicted["weights"] == pytest.approx(held["weights"], rel=0.02)
    assert predicted["optimizer"] == pytest.approx(held["optimizer"], rel=0.02, abs=100)


def test_rows_in_chunks_keep_gradients_and_the_forecast_says_so():
    predicted = cost(FusedConfig(), facts_of(toy(), row_chunks=2)).bytes
    assert predicted["gradients"] == sum(each.nbytes for each in toy().parameters())


@pytest.mark.parametrize(("clip", "limit"), [(None, 0.0), ("two_backwards", 1.0)])
def test_step_flops_are_counted_flops(clip, limit):
    model = toy()
    run = Run(model, clip=clip, max_grad_norm=limit)
    with FlopCounterMode(display=False) as counter:
        run.step(0, batch(0, rows=2, length=16))
    facts = facts_of(model, max_grad_norm=limit)
    assert run.method.step_flops(facts.model, [BatchShape(2, 16)], 0) == counter.get_total_flops()
    assert cost(FusedConfig(clip=clip), facts).step_flops == counter.get_total_flops()


# -- options and the real trainer


def test_options_that_freeze_are_refused():
    with pytest.raises(OptionError, match="clip_value"):
        FusedConfig(clip_value=0)


def test_another_optimizer_class_is_refused():
    context = OptimizerContext(
        model=toy(),
        candidates=frozenset(["model.norm.weight"]),
        decay_names=frozenset(),
        optimizer_class=torch.optim.Adagrad,
        optimizer_kwargs={"lr": 1e-3},
        weight_decay=0.0,
        stock=lambda: None,
        seed=0,
    )
    with pytest.raises(PlanError, match="Adagrad would be ignored"):
        Fused(FusedConfig()).create_optimizer(context)


def test_trainer_logs_the_norm_and_equals_plain_sgd(tmp_path):
    def trained(name, **arguments):
        trial = Trial(SPEC, tmp_path, arguments={"max_grad_norm": 0.0, "weight_decay": 0.1, **arguments})
        trainer = trial.build(name)
        trainer.train()
        norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        return {key: each.detach().clone() for key, each in trainer.model.named_parameters()}, norms

    weights, norms = trained("fused", memory_kwargs={})
    reference, expected = trained("sgd", memory="full", memory_kwargs={}, optim="sgd")
    assert norms == pytest.approx(expected, rel=1e-5)
    assert min(norms) > 0
    assert all(torch.equal(weights[name], reference[name]) for name in reference)
