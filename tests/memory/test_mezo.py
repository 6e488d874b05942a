import copy
import json
import math

import pytest
import torch
from torch import nn

from hf_eff.contracts.cost import Facts, HardwareFacts, PoolFacts, RunFacts
from hf_eff.contracts.memory import BatchShape, OptimizerContext, StepContext
from hf_eff.engines.directions import FAMILIES
from hf_eff.engines.ephemeral import unique_parameters
from hf_eff.engines.facts import model_facts
from hf_eff.engines.replay import replay
from hf_eff.engines.replay_log import ReplayLog
from hf_eff.errors import CheckpointError, EffWarning, OptionError, PlanError, TrainingDivergedError
from hf_eff.memory.mezo import SPEC, MeZO, MeZOConfig
from hf_eff.testing.tiny import tiny_model

BOTH = pytest.mark.parametrize("distribution", sorted(FAMILIES))


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
    """A plain training loop around the method."""

    def __init__(self, model, loss=summed_loss, seed=0, lr=1e-3, decay=0.0, frozen=(), **options):
        self.model, self.loss = model, loss
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        names = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
        self.method = MeZO(MeZOConfig(**options))
        self.optimizer = self.method.create_optimizer(
            OptimizerContext(
                model=model,
                candidates=names,
                decay_names=frozenset(name for name in names if "norm" not in name),
                optimizer_class=torch.optim.AdamW,
                optimizer_kwargs={"lr": lr},
                weight_decay=decay,
                stock=lambda: None,
                seed=seed,
            )
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 - step / 20)
        self.step_index = 0

    def probe(self, window):
        self.method.step_begin(self.step_index)
        items = sum(each["labels"][:, 1:].numel() for each in window)
        return [self.method.training_step(self.context(window, i, items)) for i in range(len(window))]

    def context(self, window, index, items):
        return StepContext(
            model=self.model,
            unwrapped=self.model,
            inputs=window[index],
            num_items=items,
            micro_step=index,
            micro_steps=len(window),
            global_step=self.step_index,
            stock=lambda *_: pytest.fail("the parent's training step differentiates"),
            loss=self.loss,
            mean_over_ranks=lambda value: value,
        )

    def step(self, window):
        loss = sum(self.probe(window))
        self.optimizer.step()
        self.schedule.step()
        self.step_index += 1
        return loss

    def steps(self, count):
        for _ in range(count):
            self.step(rows(batch(self.step_index), 2))
        return self

    def weights(self):
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@BOTH
@pytest.mark.parametrize("directions", [1, 3])
def test_a_run_equals_the_in_place_algorithm(distribution, directions):
    """Algorithm 1 of the paper, literally, in fp64 where restoring by subtraction loses next to nothing."""
    model, family, eps = toy(torch.float64), FAMILIES[distribution](0), 1e-3
    run = Run(copy.deepcopy(model), distribution=distribution, num_directions=directions, decay=0.1).steps(4)
    named = unique_parameters(model, dict(model.named_parameters()))

    def perturb(scale, step, draw):
        for name, parameter in named.items():
            family.add_(parameter.data, name, step, scale, draw=draw)

    with torch.no_grad():
        for step in range(4):
            inputs, projected = batch(step), []
            for draw in range(directions):
                perturb(eps, step, draw)
                above = summed_loss(model, inputs, 44)
                perturb(-2 * eps, step, draw)
                below = summed_loss(model, inputs, 44)
                perturb(eps, step, draw)
                projected.append((above - below) / (2 * eps))
            lr = 1e-3 * (1 - step / 20)
            for name, parameter in named.items():
                parameter *= 1 - lr * (0.1 if "norm" not in name else 0.0)
            for draw, c in enumerate(projected):
                perturb(-lr * c / directions, step, draw)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(run.weights()[name], parameter.data, rtol=0, atol=1e-10)
    moved = max((run.weights()[name] - p).abs().max() for name, p in toy(torch.float64).named_parameters())
    assert moved > 1e-3


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_log_replays_the_run_bit_for_bit(tmp_path, distribution, dtype):
    run = Run(toy(dtype), distribution=distribution, decay=0.1, num_directions=2).steps(3)
    middle = run.weights()
    run.steps(3)
    run.method.save_log(tmp_path / "replay.jsonl")
    log = ReplayLog.load(tmp_path / "replay.jsonl")
    for until, expected in ((None, run.weights()), (3, middle)):
        model = toy(dtype)
        replay(model, log, until)
        assert same(dict(model.named_parameters()), expected)
    assert not same(middle, run.weights())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_probe_leaves_the_weights_bitwise_as_they_are(dtype):
    run = Run(toy(dtype).train(), num_directions=2, eps_check_every=1)
    before = run.weights()
    run.probe(rows(batch(), 2))
    assert same(run.weights(), before)
    assert all(parameter.grad is None for parameter in run.model.parameters())
    assert run.model.training


def test_an_error_in_the_forward_leaves_the_weights_bitwise_as_they_are():
    run = Run(toy().train())
    before = run.weights()
    handle = run.model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.probe([batch()])
    handle.remove()
    assert same(run.weights(), before)
    assert run.model.training
    reference = Run(toy().train())
    reference.step([batch()])
    run.step([batch()])  # the failed attempt counts for nothing
    assert same(run.weights(), reference.weights())


def test_nothing_is_saved_for_a_backward():
    run, packed = Run(toy()), []
    with torch.autograd.graph.saved_tensors_hooks(packed.append, lambda x: x):
        loss = run.step([batch()])
    assert not packed
    assert not loss.requires_grad
    assert run.optimizer.state_dict()["state"] == {}


def test_loss_is_the_mean_of_both_sides():
    model = toy(torch.float64)
    run = Run(model, eps=1e-4)
    with torch.no_grad():
        plain = summed_loss(model, batch(), 44)
    (loss,) = run.probe([batch()])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)


@BOTH
def test_accumulated_rows_equal_one_batch(distribution):
    whole, parts = (Run(toy(torch.float64), distribution=distribution) for _ in range(2))
    for step in range(3):
        whole.step([batch(step)])
        parts.step(rows(batch(step), 4))
    for name, parameter in whole.weights().items():
        torch.testing.assert_close(parts.weights()[name], parameter, rtol=0, atol=1e-10)


def test_a_batch_retried_in_row_chunks_counts_once():
    """A trainer that runs out of memory gives one micro-batch in several pieces under the same index."""
    whole, pieces = Run(toy(torch.float64)), Run(toy(torch.float64))
    whole.step([batch()])
    pieces.method.step_begin(0)
    for inputs in rows(batch(), 4):
        pieces.method.training_step(pieces.context([inputs], 0, 44))
    pieces.optimizer.step()
    for name, parameter in whole.weights().items():
        torch.testing.assert_close(pieces.weights()[name], parameter, rtol=0, atol=1e-10)


def test_a_window_begun_anew_forgets_its_first_attempt():
    plain, again = Run(toy()), Run(toy())
    plain.step(rows(batch(), 2))
    again.method.step_begin(0)
    again.method.training_step(again.context(rows(batch(), 2), 0, 44))
    again.step(rows(batch(), 2))
    assert same(again.weights(), plain.weights())


def test_losses_are_averaged_over_ranks():
    first, second, both = (Run(toy(torch.float64)) for _ in range(3))
    first.step([batch(0)])
    second.step([batch(1)])
    elsewhere = second.method._window[1]  # what the other rank would contribute
    context = both.context([batch(0)], 0, 44)
    context.mean_over_ranks = lambda value: (value + elsewhere) / 2
    both.method.training_step(context)
    both.optimizer.step()
    mine, other, mean = (run.optimizer.log.records[0].coefficients[0] for run in (first, second, both))
    assert mean == pytest.approx((mine + other) / 2, rel=1e-9)
    assert mine != other


@BOTH
def test_resumed_equals_uninterrupted(distribution):
    def fresh():
        return Run(toy(), distribution=distribution, decay=0.1)

    reference = fresh().steps(6)
    first = fresh().steps(3)
    saved = copy.deepcopy(
        {
            "weights": first.model.state_dict(),
            "optimizer": first.optimizer.state_dict(),
            "lr": first.schedule.state_dict(),
        }
    )
    first.steps(1)  # the side-car was written later than the weights, as after a crash
    state = json.loads(json.dumps(first.method.state_dict()))
    torch.manual_seed(1234)
    second = fresh()
    second.model.load_state_dict(saved["weights"])
    second.method.load_state_dict(state, global_step=3)
    second.optimizer.load_state_dict(saved["optimizer"])
    second.schedule.load_state_dict(saved["lr"])
    second.step_index = 3
    torch.rand(10)
    second.steps(3)
    assert same(second.weights(), reference.weights())
    assert second.method.state_dict() == reference.method.state_dict()
    model = toy()
    replay(model, second.optimizer.log)
    assert same(dict(model.named_parameters()), reference.weights())


@pytest.mark.parametrize(
    "options", [{"eps": 1e-2}, {"seed": 1}, {"distribution": "rademacher"}, {"frozen": {"model.norm.weight"}}]
)
def test_resuming_another_run_is_refused(options):
    state = Run(toy()).steps(1).method.state_dict()
    with pytest.raises(CheckpointError, match="cannot resume the run with memory='mezo'"):
        Run(toy(), **options).method.load_state_dict(state, 1)


def test_global_random_numbers_and_dropout_do_not_matter():
    found = []
    for seed in (1, 2):
        model = toy(attention_dropout=0.5).train()
        model.model.embed_tokens.register_forward_hook(
            lambda module, _, out: nn.functional.dropout(out, 0.5, module.training)
        )
        run = Run(model)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        run.steps(2)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(run.weights())
    plain = Run(toy()).steps(2)
    assert same(found[0], found[1])
    assert same(found[0], plain.weights())


def test_only_candidates_move():
    frozen = {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"}
    run = Run(toy(), frozen=frozen)
    before = run.weights()
    run.steps(2)
    moved = {name for name, value in run.weights().items() if not torch.equal(value, before[name])}
    assert moved == set(before) - frozen


def test_weights_that_are_not_finite_skip_and_then_end_the_run():
    run = Run(toy(), loss=lambda model, inputs, items: summed_loss(model, inputs, items) * math.inf)
    before = run.weights()
    for _ in range(9):
        with pytest.warns(EffWarning, match="moves nothing"):
            run.step([batch()])
    assert same(run.weights(), before)
    assert run.method.log_entries()["skipped_steps"] == 9
    with pytest.raises(TrainingDivergedError):
        run.step([batch()])


def test_clip_bounds_the_move_and_not_the_log():
    run, free = Run(toy(), clip=1e-2), Run(toy())
    run.step([batch()])
    free.step([batch()])
    assert run.method.grad_norm() == free.method.grad_norm() > 1e-2
    assert abs(run.optimizer.log.records[0].coefficients[0]) == 1e-2


def test_log_entries_and_grad_norm():
    run = Run(toy(), num_directions=2)
    assert run.method.grad_norm() is None
    assert run.method.log_entries() == {}
    run.step([batch()])
    first, second = run.optimizer.log.records[0].coefficients
    assert run.method.grad_norm() == pytest.approx((abs(first) + abs(second)) / 2)
    entries = run.method.log_entries()
    assert entries == {"projected_grad": pytest.approx((first + second) / 2), "eps": 1e-3, "skipped_steps": 0.0}


def test_eps_that_is_too_large_is_noticed():
    sharp = Run(
        toy(), loss=lambda model, *_: torch.sin(1e3 * model.model.norm.weight.double().sum()), eps_check_every=2, seed=3
    )
    with pytest.warns(EffWarning, match="lower eps"):
        sharp.step([batch()])
    sharp.step([batch()])  # step 1 is not checked
    assert Run(toy(torch.float64), eps_check_every=1).step([batch()]) > 0


def test_half_precision_weights_are_refused():
    with pytest.raises(PlanError, match=r"needs float32 or bfloat16 weights, and .* is torch.float16"):
        Run(toy(torch.float16))


def test_nothing_to_train_is_refused():
    model = toy()
    with pytest.raises(PlanError, match="no trainable parameter"):
        Run(model, frozen={name for name, _ in model.named_parameters()})


def test_clip_of_zero_is_refused():
    with pytest.raises(OptionError, match="clip must be above 0 or None"):
        MeZOConfig(clip=0)


def test_step_flops_are_those_of_the_forwards_that_ran():
    from torch.utils.flop_counter import FlopCounterMode

    model = toy(attn_implementation="eager", tie_word_embeddings=False)
    run = Run(model, num_directions=2, eps_check_every=2)
    run.steps(1)  # the first step also watches what the model reads
    facts, shapes = model_facts(model), [BatchShape(2, 12), BatchShape(2, 12)]
    for step, forwards in ((1, 8), (2, 10)):
        with FlopCounterMode(display=False) as counter:
            run.steps(1)
        planned = run.method.step_flops(facts, shapes, step)
        assert counter.get_total_flops() == pytest.approx(planned, rel=0.01)
        assert planned == forwards * run.method.step_flops(facts, shapes[:1], 1) / 4


def test_cost_is_inference_and_a_few_copies():
    model = toy()
    facts = Facts(
        model=model_facts(model),
        pool=PoolFacts(num_rows=8, mean_tokens=12, max_tokens=12),
        hardware=HardwareFacts(),
        run=RunFacts(batch_size=2, accumulation=2, length=12),
    )
    plain = SPEC.cost(MeZOConfig(), facts)
    assert plain.bytes["gradients"] == plain.bytes["optimizer"] == plain.bytes["activations"] == 0
    assert plain.bytes["weights"] == facts.model.weight_bytes
    copies = 4 * (262 * 32 + 32 * 64)
    assert copies < plain.bytes["rest"] < copies + 12 * 2**20
    method = MeZO(MeZOConfig(num_directions=3, eps_check_every=4))
    run = [method.step_flops(facts.model, [BatchShape(2, 12)] * 2, step) for step in range(4)]
    assert SPEC.cost(MeZOConfig(num_directions=3, eps_check_every=4), facts).step_flops == pytest.approx(sum(run) / 4)


def test_accelerate_can_wrap_the_optimizer():
    from accelerate import Accelerator

    run, plain = Run(toy()), Run(toy())
    wrapped = Accelerator(cpu=True).prepare(run.optimizer)
    run.probe([batch()])
    wrapped.step()
    wrapped.zero_grad()
    plain.step([batch()])
    assert same(run.weights(), plain.weights())


@pytest.mark.parametrize(("lora", "tied"), [(False, True), (False, False), (True, True)])
def test_trl_loss_sees_the_perturbed_weights(tmp_path, lora, tied, pool, tokenizer):
    """TRL multiplies by the head's weight itself: a probe through its loss equals the loss of a changed copy."""
    from trl import SFTConfig, SFTTrainer

    def trainer_of(scale=0.0):
        from peft import LoraConfig

        model = tiny_model(layers=2, width=32, tie_word_embeddings=tied)
        args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=32)
        trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=pool,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
        )
        names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
        with torch.no_grad():
            for name, parameter in unique_parameters(trainer.model, names).items():
                FAMILIES["gaussian"](5).add_(parameter.data, name, 0, 0.05)  # adapters start at zero
                FAMILIES["gaussian"](0).add_(parameter.data, name, 0, scale)
        return trainer

    trainer = trainer_of()
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    frozen = {name for name, parameter in trainer.model.named_parameters() if not parameter.requires_grad}
    run = Run(trainer.model, lambda model, each, items: trainer.compute_loss(model, each), frozen=frozen, eps=1e-2)
    seen = []
    probed = run.method._probe
    run.method._probe = lambda context: seen.append(probed(context)) or seen[-1]
    run.probe([inputs])
    for side, scale in enumerate((1e-2, -1e-2)):
        other = trainer_of(scale)
        other.model.eval()
        with torch.no_grad():
            expected = other.compute_loss(other.model, dict(inputs))
        assert seen[0][0, side] == expected.double()
    assert seen[0][0, 0] != seen[0][0, 1]
    assert ("lm_head.weight" in run.method._weights.resident) is not lora
