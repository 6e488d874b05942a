"""Every zeroth-order method and direction family through a plain training loop."""

import copy
import json

import pytest
import torch
from torch import nn

from hf_eff.contracts.memory import BatchShape, OptimizerContext, StepContext
from hf_eff.engines.facts import model_facts
from hf_eff.engines.packed_weights import never_packed
from hf_eff.engines.replay import replay
from hf_eff.engines.replay_log import ReplayLog
from hf_eff.errors import EffWarning, OptionError
from hf_eff.registry import build, get_method
from hf_eff.testing.tiny import tiny_model

METHODS = {
    "sparse": ("mezo", {"distribution": "sparse"}),
    "momentum": ("mezo", {"momentum": 0.5}),
    "one-sided": ("mezo", {"one_sided": True, "num_directions": 2}),
    "lozo": ("lozo", {"refresh_every": 2}),
    "lozo, n-SPSA": ("lozo", {"refresh_every": 2, "num_directions": 2}),
    "lozo_m": ("lozo_m", {"refresh_every": 2}),
    "subzero": ("subzero", {"rank": 4, "refresh_every": 2}),
}
EVERY = pytest.mark.parametrize("kind", METHODS)


def toy(dtype=torch.float32, **options):
    return tiny_model(layers=2, width=32, **options).to(dtype)


def batch(seed=0, rows=4):
    ids = torch.randint(6, 262, (rows, 12), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def rows(inputs, parts):
    return [{key: value.chunk(parts)[i] for key, value in inputs.items()} for i in range(parts)]


def summed_loss(model, inputs, num_items):
    logits = model(input_ids=inputs["input_ids"]).logits[:, :-1]
    labels = inputs["labels"][:, 1:]
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / num_items


class Run:
    """A plain training loop around a method."""

    def __init__(self, model, kind, lr=1e-3, seed=0, **options):
        name, chosen = METHODS.get(kind, (kind, {}))
        self.model = model
        self.method = build(get_method("memory", name), {**chosen, **options})
        names = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
        self.optimizer = self.method.create_optimizer(
            OptimizerContext(
                model=model,
                candidates=names,
                decay_names=frozenset(name for name in names if "norm" not in name),
                optimizer_class=torch.optim.AdamW,
                optimizer_kwargs={"lr": lr},
                weight_decay=0.1,
                stock=lambda: None,
                seed=seed,
            )
        )
        self.method.train_begin(model, 0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 - step / 20)
        self.index = 0

    def probe(self, window):
        self.method.step_begin(self.index)
        items = sum(each["labels"][:, 1:].numel() for each in window)
        losses = [
            self.method.training_step(
                StepContext(
                    model=self.model,
                    unwrapped=self.model,
                    inputs=inputs,
                    num_items=items,
                    micro_step=i,
                    micro_steps=len(window),
                    global_step=self.index,
                    stock=lambda *_: pytest.fail("the parent's training step differentiates"),
                    loss=summed_loss,
                    mean_over_ranks=lambda value: value,
                )
            )
            for i, inputs in enumerate(window)
        ]
        return sum(losses)

    def step(self, window):
        loss = self.probe(window)
        self.optimizer.step()
        self.schedule.step()
        self.index += 1
        return loss

    def steps(self, count, parts=2):
        for _ in range(count):
            self.step(rows(batch(self.index), parts))
        return self

    def weights(self):
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_log_replays_the_run_bit_for_bit(tmp_path, kind, dtype):
    run = Run(toy(dtype), kind).steps(3)
    middle = run.weights()
    run.steps(2)
    run.method.save_log(tmp_path / "replay.jsonl")
    log = ReplayLog.load(tmp_path / "replay.jsonl")
    for until, expected in ((None, run.weights()), (3, middle)):
        model = toy(dtype)
        replay(model, log, until)
        assert same(dict(model.named_parameters()), expected)
    assert not same(middle, run.weights())


@EVERY
@pytest.mark.parametrize("cut", [2, 3])
def test_resumed_equals_uninterrupted(kind, cut):
    """Also where the interruption falls on a refresh."""
    reference, first = Run(toy(), kind).steps(5), Run(toy(), kind).steps(cut)
    saved = copy.deepcopy((first.model.state_dict(), first.optimizer.state_dict(), first.schedule.state_dict()))
    state = json.loads(json.dumps(first.method.state_dict()))
    torch.manual_seed(1234)
    second = Run(toy(), kind)
    second.model.load_state_dict(saved[0])
    second.method.load_state_dict(state, global_step=cut)
    second.optimizer.load_state_dict(saved[1])
    second.schedule.load_state_dict(saved[2])
    second.index = cut
    torch.rand(10)
    second.steps(5 - cut)
    assert same(second.weights(), reference.weights())
    assert second.method.state_dict() == reference.method.state_dict()


@EVERY
def test_a_probe_leaves_no_trace(kind):
    run, packed = Run(toy().train(), kind, eps_check_every=1), []
    before, state = run.weights(), torch.get_rng_state()
    with torch.autograd.graph.saved_tensors_hooks(packed.append, lambda x: x):
        run.probe(rows(batch(), 2))
    assert same(run.weights(), before)
    assert not packed
    assert all(parameter.grad is None for parameter in run.model.parameters())
    assert run.model.training
    assert torch.equal(torch.get_rng_state(), state)


@EVERY
def test_dropout_and_global_random_numbers_do_not_matter(kind):
    found = []
    for seed in (1, 2):
        model = toy(attention_dropout=0.5).train()
        model.model.embed_tokens.register_forward_hook(
            lambda module, _, out: nn.functional.dropout(out, 0.5, module.training)
        )
        run = Run(model, kind)
        torch.manual_seed(seed)
        found.append(run.steps(2).weights())
    assert same(found[0], found[1])
    assert same(found[0], Run(toy(), kind).steps(2).weights())


@EVERY
def test_accumulated_rows_equal_one_batch(kind):
    whole, parts = Run(toy(torch.float64), kind).steps(3, parts=1), Run(toy(torch.float64), kind).steps(3, parts=4)
    for name, parameter in whole.weights().items():
        torch.testing.assert_close(parts.weights()[name], parameter, rtol=0, atol=1e-9)


class Turned(nn.Module):
    """The same parameters in another order."""

    def __init__(self, turned):
        super().__init__()
        names = ["first", "second", "third"]
        for name in names[::-1] if turned else names:
            size = 16 + 4 * names.index(name)
            generator = torch.Generator().manual_seed(size)
            setattr(self, name, nn.Linear(size, 16, bias=name == "first"))
            for parameter in getattr(self, name).parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, x):
        return sum(getattr(self, name)(x[:, : 16 + 4 * i]) for i, name in enumerate(("first", "second", "third")))


@EVERY
def test_the_order_of_the_parameters_does_not_matter(kind):
    found = []
    for turned in (False, True):
        run = Run(Turned(turned), kind)
        for step in range(3):
            run.optimizer.stage(step, [1.0 + step, 2.0][: run.method.config.num_directions])
            run.optimizer.step()
        found.append(run.weights())
    assert list(found[0]) != list(found[1])
    assert same(found[0], found[1])
    assert not same(found[0], Run(Turned(False), kind).weights())


@EVERY
def test_frozen_parameters_rest(kind):
    model = toy()
    frozen = {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    run = Run(model, kind)
    before = run.weights()
    run.steps(2)
    assert {name for name, each in run.weights().items() if not torch.equal(each, before[name])} == set(before) - frozen


def quantised():
    """A toy model of 4-bit layers with adapters, and its frozen bytes."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny_model(layers=2, width=64)
    for block in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            old = getattr(block.mlp, name)
            new = bitsandbytes.nn.Linear4bit(
                old.in_features, old.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
            )
            weight = bitsandbytes.nn.Params4bit(old.weight.detach(), requires_grad=False, quant_type="nf4")
            new.weight = weight.to("cpu")
            setattr(block.mlp, name, new)
    model.is_loaded_in_4bit = True
    return build(get_method("memory", "lora"), {"r": 8}).prepare_model(model, 0)


def loss_of(model):
    with torch.no_grad(), never_packed(model):
        return summed_loss(model.eval(), batch(), 44)


@pytest.mark.parametrize("kind", ["mezo", *METHODS])
def test_adapters_learn_on_a_4_bit_base_that_is_never_touched(kind):
    model = quantised()
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    stored = {name: (p.data_ptr(), p.detach().clone()) for name, p in frozen.items()}
    run = Run(model, kind, eps=1e-2, lr=0.02)
    seen = set()
    inner = run.optimizer.family.add_

    def watched(out, name, *args, **kwargs):
        seen.add(name)
        return inner(out, name, *args, **kwargs)

    run.optimizer.family.add_ = watched
    before, inputs = run.weights(), [batch()]
    start = loss_of(model)
    for _ in range(12):
        run.step(inputs)
    end = loss_of(model)
    adapters = {name for name, p in model.named_parameters() if p.requires_grad}
    assert seen == adapters
    assert all("lora_" in name for name in adapters)
    assert not any(torch.equal(before[name], run.weights()[name]) for name in adapters if "lora_B" in name)
    assert end < start
    assert any(p.dtype == torch.uint8 for p in frozen.values())
    for name, (address, value) in stored.items():
        assert torch.equal(dict(model.named_parameters())[name], value), name
        assert frozen[name].data_ptr() == address


def test_one_sided_estimates_take_one_more_forward_than_directions():
    run, calls = Run(toy(torch.float64), "mezo", one_sided=True, num_directions=3, eps=1e-5), []
    run.model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    run.steps(1, parts=1)  # the first evaluation also watches what the model reads
    calls.clear()
    run.steps(1, parts=1)
    assert len(calls) == 4
    both = Run(toy(torch.float64), "mezo", num_directions=3, eps=1e-5).steps(1, parts=1)
    for one, two in zip(
        run.optimizer.log.records[0].coefficients, both.optimizer.log.records[0].coefficients, strict=True
    ):
        assert one == pytest.approx(two, rel=1e-2, abs=1e-2)
        assert one != two
    facts, shapes = model_facts(run.model), [BatchShape(4, 12)]
    assert run.method.step_flops(facts, shapes, 0) == 4 / 6 * both.method.step_flops(facts, shapes, 0)


def test_one_sided_loss_is_that_of_the_weights_themselves():
    model = toy(torch.float64)
    with torch.no_grad():
        plain = summed_loss(model, batch(), 44)
    assert Run(model, "mezo", one_sided=True, eps=0.5).probe([batch()]).item() == pytest.approx(plain.item(), rel=1e-6)


def test_one_sided_check_of_eps():
    smooth = Run(toy(torch.float64), "mezo", one_sided=True, eps_check_every=1, eps=1e-4)
    smooth.probe([batch()])  # warnings are errors
    steep = Run(toy(torch.float64), "mezo", one_sided=True, eps_check_every=1, eps=1.0)
    with pytest.warns(EffWarning, match="lower eps"):
        steep.probe([batch()])


def test_clipping_by_the_median_of_recent_coefficients():
    run = Run(toy(), "mezo", clip_factor=2.0)
    for step in range(12):
        run.method._finish(step, torch.tensor([[1.0 + 2e-3 * (step + 1), 1.0]], dtype=torch.float64))
        run.optimizer.step()
    run.method._finish(12, torch.tensor([[101.0, 1.0]], dtype=torch.float64))
    run.optimizer.step()
    found = [record.coefficients[0] for record in run.optimizer.log.records]
    assert found[:12] == pytest.approx(range(1, 13))  # too few for a median, or below twice of it
    assert found[12] == pytest.approx(2 * 6.5)
    both = Run(toy(), "mezo", clip_factor=2.0, clip=0.5)
    both.method._finish(0, torch.tensor([[101.0, 1.0]], dtype=torch.float64))
    both.optimizer.step()
    assert both.optimizer.log.records[0].coefficients == (0.5,)


def test_n_directions_are_averaged():
    """n-SPSA: the move along n directions is the mean of the n single moves."""
    several = Run(toy(torch.float64, tie_word_embeddings=False), "lozo", num_directions=2)
    several.optimizer.param_groups[0]["weight_decay"] = 0.0
    before = several.weights()
    several.optimizer.stage(0, [2.0, -4.0])
    several.optimizer.step()
    family = several.optimizer.family
    for name, weight in several.weights().items():
        z = [family.add_(torch.zeros_like(weight), name, 0, 1.0, draw=draw) for draw in (0, 1)]
        move = -1e-3 * family.update_scale(name, weight) * (2.0 * z[0] - 4.0 * z[1]) / 2
        torch.testing.assert_close(weight - before[name], move, rtol=0, atol=1e-12)


def test_momentum_and_masks_that_follow_the_weights_exclude_each_other():
    with pytest.raises(OptionError, match="momentum must be 0 with distribution='sparse'"):
        Run(toy(), "sparse", momentum=0.9)


def test_sparse_directions_leave_large_weights_alone():
    run = Run(toy(), "sparse", density=0.3)
    before = run.weights()
    run.optimizer.param_groups[0]["weight_decay"] = 0.0
    run.steps(1)
    name = "model.layers.0.mlp.up_proj.weight"
    moved = run.weights()[name] != before[name]
    threshold = run.optimizer.family.thresholds[name]
    assert moved.float().mean() == pytest.approx(0.3, abs=0.01)
    assert (before[name][moved].abs() <= threshold).all()
