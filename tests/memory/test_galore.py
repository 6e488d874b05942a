"""GaLore against a plain loop, against the package galore-torch, and against its own formula for state."""

import copy
import dataclasses
import io
import warnings

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_eff.contracts.cost import Facts, HardwareFacts, PoolFacts, RunFacts, TensorFacts
from hf_eff.contracts.memory import BatchShape, OptimizerContext, StepContext
from hf_eff.engines.facts import model_facts
from hf_eff.errors import OptionError, PlanError
from hf_eff.hardware.memory_meter import MemoryMeter
from hf_eff.memory.full import Full, FullConfig
from hf_eff.memory.galore import SPEC, GaLore, GaLoreConfig, cost
from hf_eff.numerics.flops import everything_trains
from hf_eff.numerics.gradient_subspace import project
from hf_eff.options import EffOptions
from hf_eff.plan import make_plan
from hf_eff.testing.tiny import tiny_model

DECAY = 0.1
STRONG = {"rank": 4, "scale": 1.0}


def toy(**changes):
    return tiny_model(layers=2, width=32, **{"attn_implementation": "eager", **changes})


def batch(step, rows=2, length=6):
    ids = torch.randint(3, 200, (rows, length), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids}


def decayed(model):
    return frozenset(name for name, parameter in model.named_parameters() if parameter.dim() > 1)


def is_matrix(name):
    return "_proj" in name


class Run:
    """One model under the method, without a trainer."""

    def __init__(self, model, *, lr=1e-2, seed=0, weight_decay=DECAY, adam=None, **options):
        self.model = model
        self.method = GaLore(GaLoreConfig(**{"rank": 4, "update_gap": 3, **options}))
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
            )
        )
        self.method.train_begin(model, 0)

    def differentiate(self, index):
        self.method.step_begin(index)
        self.method.training_step(
            StepContext(self.model, self.model, batch(index), 1, 0, 1, index, stock_step, None, lambda value: value)
        )

    def step(self, index):
        self.differentiate(index)
        self.optimizer.step()
        self.model.zero_grad()
        return self

    def steps(self, *indices):
        for index in indices:
            self.step(index)
        return self

    def weights(self):
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def state(self, name):
        return self.optimizer.state[dict(self.model.named_parameters())[name]]


def stock_step(model, inputs, num_items):
    loss = model.train()(**inputs).loss
    loss.backward()
    return loss.detach()


def different(first, model):
    return [name for name, each in model.named_parameters() if not torch.equal(first[name], each.detach())]


def apart(first, second):
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def facts_of(model, backend="none", **run):
    return Facts(
        model=model_facts(model),
        pool=PoolFacts(num_rows=100, mean_tokens=16, max_tokens=16),
        hardware=HardwareFacts(backend=backend, world_size=1 if backend == "none" else 2),
        run=RunFacts(**{"batch_size": 2, "length": 16, "max_grad_norm": 0.0, **run}),
    )


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def measured(run, steps=2):
    meter = MemoryMeter(run.model)
    for step in range(steps):
        with meter.forward_backward():
            run.differentiate(step)
        run.optimizer.step()
        meter.observe(run.optimizer)
        run.model.zero_grad()
    return meter.peak_bytes()


NAME = "model.layers.0.mlp.up_proj.weight"  # [64, 32]


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
    run = Run(toy(), svd="exact", adam=adam).steps(*range(8))
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
    run = Run(toy(), lr=1e-3, weight_decay=0.0, svd="exact", scale=1.0, adam={"eps": 1e-15}).steps(*range(7))
    assert apart(run.weights(), {name: each.detach() for name, each in model.named_parameters()}) < 1e-5
    assert apart(run.weights(), Run(toy()).weights()) > 1e-3


def test_at_full_rank_it_is_not_adam():
    run = Run(toy(), rank=64, scale=1.0, svd="exact").step(0)
    model = toy()
    names = decayed(model)
    groups = [{"params": [p], "weight_decay": DECAY if n in names else 0.0} for n, p in model.named_parameters()]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    stock_step(model, batch(0), 1)
    optimizer.step()
    difference = run.weights()[NAME] - dict(model.named_parameters())[NAME].detach()
    assert float(difference.abs().max()) > 1e-3


def test_moments_outlive_a_new_projection():
    run = Run(toy(), update_gap=1).steps(0)
    first, projector = run.state(NAME)["exp_avg"].clone(), run.state(NAME)["projector"].clone()
    run.step(1)
    stock_step(model := toy(), batch(0), 1)
    assert not torch.equal(projector, run.state(NAME)["projector"])
    small = project(dict(model.named_parameters())[NAME].grad, projector, "right")
    assert torch.allclose(first, 0.1 * small, atol=1e-7)
    assert float((run.state(NAME)["exp_avg"] - 0.9 * first).abs().max()) > 0
    assert run.state(NAME)["step"] == 2


def test_a_gradient_that_is_not_finite_gives_no_projection():
    run = Run(toy(), layerwise=False)
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
    run = Run(toy()).step(0)
    for name, parameter in run.model.named_parameters():
        held = sum(value.nbytes for value in run.state(name).values() if torch.is_tensor(value))
        if is_matrix(name):
            m, n = sorted(parameter.shape)
            assert held == 4 * (2 * n * 4 + m * 4), name
        else:
            assert held == 8 * parameter.numel() + 4, name


@pytest.mark.parametrize("options", [{}, {"layerwise": True}, {"projection": "left"}])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_predicted_bytes_are_those_held(options, kind):
    model = toy().to(kind)
    facts = facts_of(model)
    predicted = cost(GaLoreConfig(rank=4, **options), facts).bytes
    held = measured(Run(model, **options))
    for term in ("weights", "gradients", "optimizer"):
        assert predicted[term] == pytest.approx(held[term], rel=0.02), term


def test_a_plan_from_shapes_alone_counts_the_same():
    model = toy()
    predicted = cost(GaLoreConfig(rank=4), facts_of(model)).bytes
    assert predicted["optimizer"] == pytest.approx(measured(Run(model))["optimizer"], rel=0.02)


def test_target_modules_are_priced_by_name():
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
    predicted = cost(GaLoreConfig(rank=4, target_modules=chosen), facts).bytes
    held = measured(Run(model, target_modules=chosen))
    assert predicted["optimizer"] == pytest.approx(held["optimizer"], rel=0.02)


def test_projections_are_counted():
    run = Run(toy()).step(0)
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


# -- checkpoints


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layerwise", [False, True])
def test_interrupted_in_mid_gap_and_resumed_equals_uninterrupted(kind, layerwise):
    whole = Run(toy().to(kind), layerwise=layerwise).steps(*range(7))
    first = Run(toy().to(kind), layerwise=layerwise).steps(*range(4))
    second = Run(copy.deepcopy(first.model), layerwise=layerwise)
    second.optimizer.load_state_dict(through_a_file(first.optimizer.state_dict()))
    second.method.train_begin(second.model, 4)
    torch.rand(7)
    second.steps(4, 5, 6)
    assert different(whole.weights(), second.model) == []
    kinds = {v.dtype for state in second.optimizer.state.values() for v in state.values() if torch.is_tensor(v)}
    assert kinds == {torch.float32}


# -- layerwise


def test_layerwise_equals_a_step_after_the_backward_bit_for_bit():
    whole, inside = Run(toy()).steps(*range(5)), Run(toy(), layerwise=True).steps(*range(5))
    assert different(whole.weights(), inside.model) == []


def test_layerwise_keeps_one_gradient_and_reports_the_norm():
    model, alive = toy(), []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(each.grad is not None for each in model.parameters()))
        )
    reference = toy()
    stock_step(reference, batch(0), 1)
    norm = float(torch.nn.utils.clip_grad_norm_(reference.parameters(), 1e9))
    run = Run(model, layerwise=True).step(0)
    assert max(alive) == 1
    assert run.method.grad_norm() == pytest.approx(norm, rel=1e-5)
    assert Run(toy()).step(0).method.grad_norm() is None
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
def test_what_layerwise_cannot_do_is_refused_by_the_plan(run, words):
    with pytest.raises(PlanError, match=words):
        make_plan(EffOptions(memory=SPEC.name, memory_kwargs={"layerwise": True}), facts_of(toy(), **run))
    make_plan(EffOptions(memory=SPEC.name), facts_of(toy(), **run))


# -- scope


def test_adapters_are_refused():
    facts = facts_of(toy())
    with pytest.raises(PlanError, match="PEFT"):
        make_plan(EffOptions(memory=SPEC.name), facts.replace(model=dataclasses.replace(facts.model, is_peft=True)))
    with pytest.raises(PlanError, match="adapters have few dimensions"):
        make_plan(EffOptions(memory=f"lora+{SPEC.name}"), facts)


def test_target_modules_choose_what_is_projected():
    run = Run(toy(), target_modules=("up_proj", "self_attn.q_proj")).step(0)
    projected = {name for name, p in run.model.named_parameters() if run.optimizer.is_projected(p)}
    layers = ("model.layers.0.", "model.layers.1.")
    assert projected == {f"{at}{end}.weight" for at in layers for end in ("mlp.up_proj", "self_attn.q_proj")}
    assert run.state("model.layers.0.mlp.down_proj.weight")["exp_avg"].shape == (32, 64)
    with pytest.raises(OptionError, match="up_projection"):
        Run(toy(), target_modules=("up_projection",))


def test_frozen_weights_stay():
    model = toy()
    frozen = [NAME, "model.embed_tokens.weight"]
    for name in frozen:
        dict(model.named_parameters())[name].requires_grad_(False)
    run = Run(model)
    before = run.weights()
    moved = different(before, run.steps(0, 1).model)
    assert sorted({*before} - {*moved}) == sorted(frozen)


def test_loss_scaling_by_a_power_of_two_changes_nothing():
    plain, scaled = Run(toy()), Run(toy())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for index in range(4):
        plain.step(index)
        scaled.method.step_begin(index)
        scaler.scale(scaled.model.train()(**batch(index)).loss).backward()
        scaler.step(scaled.optimizer)
        scaler.update()
        scaled.model.zero_grad()
    assert different(plain.weights(), scaled.model) == []


def test_bf16_weights_move_by_updates_below_their_spacing():
    run = Run(toy().to(torch.bfloat16), lr=1e-5, weight_decay=0.0, **STRONG)
    before = run.weights()[NAME].float()
    moved = (run.step(0).weights()[NAME].float() - before).abs()
    wide = Run(toy().to(torch.bfloat16).float(), lr=1e-5, weight_decay=0.0, **STRONG)
    start = wide.weights()[NAME]
    expected = (wide.step(0).weights()[NAME] - start).abs()
    assert float(moved.mean()) == pytest.approx(float(expected.mean()), rel=0.25)
