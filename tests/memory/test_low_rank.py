"""What every method on low-rank optimizer state must do: GaLore and APOLLO."""

import copy
import dataclasses
import io

import pytest
import torch

from hf_eff.contracts.cost import TensorFacts
from hf_eff.errors import OptionError, PlanError
from hf_eff.memory import apollo, galore
from hf_eff.numerics.flops import everything_trains
from hf_eff.options import EffOptions
from hf_eff.plan import make_plan
from hf_eff.testing.update_scene import UpdateScene, batch, different, facts_of, is_matrix, stock_step, toy

NAME = "model.layers.0.mlp.up_proj.weight"  # [64, 32]
STRONG = {"galore": {"rank": 4, "scale": 1.0}, "apollo": {"rank": 32, "scale": 4.0}}
SMALL = {"rank": 4, "update_gap": 3}


@pytest.fixture(params=[apollo.SPEC, galore.SPEC], ids=lambda spec: spec.name)
def spec(request):
    return request.param


def scene(spec, model, **options):
    return UpdateScene(spec, model, **{**SMALL, **options})


def predicted_bytes(spec, facts, **options):
    return spec.cost(spec.config(**{**SMALL, **options}), facts).bytes


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_target_modules_are_priced_by_name(spec):
    model, chosen = toy(), ("mlp.up_proj", "q_proj")
    places, kinds = {}, {name: "linear" for name, _ in model.named_parameters() if is_matrix(name)}
    for name, parameter in model.named_parameters():
        inside = [index for index in range(2) if f".layers.{index}." in name]
        key = name.replace(".0.", ".{}.").replace(".1.", ".{}.")
        places.setdefault((key, tuple(parameter.shape), kinds.get(name, "other")), []).extend(inside)
    tensors = tuple(
        TensorFacts(name=name, shape=shape, kind=kind, blocks=tuple(blocks))
        for (name, shape, kind), blocks in places.items()
    )
    facts = facts_of(model)
    trained = dataclasses.replace(everything_trains(facts.model), tensors=tensors)
    facts = facts.replace(model=dataclasses.replace(facts.model, trainable=trained))
    predicted = predicted_bytes(spec, facts, target_modules=chosen)
    held = scene(spec, model, target_modules=chosen).measured()
    assert predicted["optimizer"] == pytest.approx(held["optimizer"], rel=0.02)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layerwise", [False, True])
def test_interrupted_in_mid_gap_and_resumed_equals_uninterrupted(spec, kind, layerwise):
    whole = scene(spec, toy().to(kind), layerwise=layerwise).steps(*range(7))
    first = scene(spec, toy().to(kind), layerwise=layerwise).steps(*range(4))
    second = scene(spec, copy.deepcopy(first.model), layerwise=layerwise)
    second.optimizer.load_state_dict(through_a_file(first.optimizer.state_dict()))
    second.method.train_begin(second.model, 4)
    torch.rand(7)
    second.steps(4, 5, 6)
    assert different(whole.weights(), second.model) == []
    kinds = {v.dtype for state in second.optimizer.state.values() for v in state.values() if torch.is_tensor(v)}
    assert kinds == {torch.float32}


def test_layerwise_equals_a_step_after_the_backward_bit_for_bit(spec):
    whole, inside = scene(spec, toy()).steps(*range(5)), scene(spec, toy(), layerwise=True).steps(*range(5))
    assert different(whole.weights(), inside.model) == []


def test_layerwise_keeps_one_gradient_and_reports_the_norm(spec):
    model, alive = toy(), []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(each.grad is not None for each in model.parameters()))
        )
    reference = toy()
    stock_step(reference, batch(0), 1)
    norm = float(torch.nn.utils.clip_grad_norm_(reference.parameters(), 1e9))
    run = scene(spec, model, layerwise=True).step(0)
    assert max(alive) == 1
    assert run.method.grad_norm() == pytest.approx(norm, rel=1e-5)
    assert scene(spec, toy()).step(0).method.grad_norm() is None
    run.method.train_end()
    stock_step(model, batch(1), 1)
    assert all(each.grad is not None for each in model.parameters())


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ({"max_grad_norm": 1.0}, "set max_grad_norm=0, or layerwise=False"),
        ({"accumulation": 2}, "gradient_accumulation_steps=1"),
        ({"fp16": True}, "bf16=True"),
        ({"backend": "ddp"}, "one process"),
    ],
)
def test_what_layerwise_cannot_do_is_refused_by_the_plan(spec, run, words):
    with pytest.raises(PlanError, match=words):
        make_plan(EffOptions(memory=spec.name, memory_kwargs={"layerwise": True}), facts_of(toy(), **run))
    make_plan(EffOptions(memory=spec.name), facts_of(toy(), **run))


def test_adapters_are_refused(spec):
    facts = facts_of(toy())
    with pytest.raises(PlanError, match="PEFT"):
        make_plan(EffOptions(memory=spec.name), facts.replace(model=dataclasses.replace(facts.model, is_peft=True)))
    with pytest.raises(PlanError, match="adapters have few dimensions"):
        make_plan(EffOptions(memory=f"lora+{spec.name}"), facts)


def test_target_modules_choose_what_is_projected(spec):
    run = scene(spec, toy(), target_modules=("up_proj", "self_attn.q_proj")).step(0)
    projected = {name for name, p in run.model.named_parameters() if run.optimizer.is_projected(p)}
    layers = ("model.layers.0.", "model.layers.1.")
    assert projected == {f"{at}{end}.weight" for at in layers for end in ("mlp.up_proj", "self_attn.q_proj")}
    assert run.state("model.layers.0.mlp.down_proj.weight")["exp_avg"].shape == (32, 64)
    with pytest.raises(OptionError, match="up_projection"):
        scene(spec, toy(), target_modules=("up_projection",))


def test_frozen_weights_stay(spec):
    model = toy()
    frozen = [NAME, "model.embed_tokens.weight"]
    for name in frozen:
        dict(model.named_parameters())[name].requires_grad_(False)
    run = scene(spec, model)
    before = run.weights()
    moved = different(before, run.steps(0, 1).model)
    assert sorted({*before} - {*moved}) == sorted(frozen)


def test_loss_scaling_by_a_power_of_two_changes_nothing(spec):
    plain, scaled = scene(spec, toy()), scene(spec, toy())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for index in range(4):
        plain.step(index)
        scaled.method.step_begin(index)
        scaler.scale(scaled.model.train()(**batch(index)).loss).backward()
        scaler.step(scaled.optimizer)
        scaler.update()
        scaled.model.zero_grad()
    assert different(plain.weights(), scaled.model) == []


def test_bf16_weights_move_by_updates_below_their_spacing(spec):
    run = scene(spec, toy().to(torch.bfloat16), lr=1e-5, weight_decay=0.0, **STRONG[spec.name])
    before = run.weights()[NAME].float()
    moved = (run.step(0).weights()[NAME].float() - before).abs()
    wide = scene(spec, toy().to(torch.bfloat16).float(), lr=1e-5, weight_decay=0.0, **STRONG[spec.name])
    start = wide.weights()[NAME]
    expected = (wide.step(0).weights()[NAME] - start).abs()
    assert float(moved.mean()) == pytest.approx(float(expected.mean()), rel=0.25)


@pytest.mark.parametrize("options", [{}, {"layerwise": True}, {"rank": 1}])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_predicted_bytes_are_those_held(spec, options, kind):
    model = toy().to(kind)
    facts = facts_of(model)
    predicted = predicted_bytes(spec, facts, **options)
    held = scene(spec, model, **options).measured()
    for term in ("weights", "gradients", "optimizer"):
        assert predicted[term] == pytest.approx(held[term], rel=0.02), term
