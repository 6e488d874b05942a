"""Memory that runs out: rungs in order, the same weights where a rung is exact, and a cap that is real."""

import json
import logging
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from hf_eff import BudgetedSFTConfig, BudgetedSFTTrainer, BudgetedTrainer, BudgetedTrainingArguments, ZOTrainer
from hf_eff.errors import BudgetExceededError, MemoryExhaustedError, OptionError
from hf_eff.testing.tiny import collator, tiny_model, tiny_pool, tiny_tokenizer, tokenised

# Four steps are too few for blocks to take turns, and blocks that take over in an emergency say so.
pytestmark = pytest.mark.filterwarnings("ignore::hf_eff.errors.OutsideIntendedUseWarning")
AMPLE = "1e30flop"
COMMON = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "seed": 3,
    "budget": AMPLE,
}


class Small:
    """Makes a model's forward fail beyond some tokens at a time, as if its memory ended there.

    ``when`` says under which circumstances it is that small.
    """

    def __init__(self, model, limit, when=lambda model: True, in_training=True):
        self.limit, self.when, self.in_training, self.failed = limit, when, in_training, 0
        model.register_forward_pre_hook(self.check, with_kwargs=True)

    def check(self, model, args, kwargs):
        if model.training is self.in_training and kwargs["input_ids"].numel() > self.limit and self.when(model):
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def make(folder, cls=BudgetedTrainer, model=None, rows=None, callbacks=None, **options):
    return cls(
        model=model or tiny_model(2, 32),
        args=BudgetedTrainingArguments(output_dir=str(folder), **{**COMMON, **options}),
        train_dataset=tokenised(tiny_pool(24)) if rows is None else rows,
        data_collator=collator(),
        callbacks=callbacks,
    )


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def apart(first, second):
    """Largest difference of any weight."""
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def rungs(trainer):
    return [event["rung"] for event in trainer.budgeted_run.rescue.events]


@pytest.fixture
def undisturbed(tmp_path):
    trainer = make(tmp_path / "undisturbed")
    trainer.train()
    return trainer


# rows in parts


@pytest.mark.parametrize("accumulation", [1, 2])
def test_fewer_rows_at_a_time_train_alike(tmp_path, accumulation):
    options = {"gradient_accumulation_steps": accumulation}
    free = make(tmp_path / "free", **options)
    free.train()
    model = tiny_model(2, 32)
    small = Small(model, 60)
    trainer = make(tmp_path / "small", model=model, **options)
    trainer.train()
    assert small.failed
    assert set(rungs(trainer)) == {"row_chunks"}
    assert trainer.budgeted_run.rescue.token_limit <= 60
    assert apart(weights(trainer), weights(free)) < 1e-6
    assert apart(weights(trainer), tiny_model(2, 32).state_dict()) > 1e-4
    logged = [[entry["loss"] for entry in each.state.log_history if "loss" in entry] for each in (trainer, free)]
    assert logged[0] == pytest.approx(logged[1], rel=1e-5)


def test_a_lesson_is_learnt_once(tmp_path):
    """After the first failure batches of the same size are split ahead of time."""
    model = tiny_model(2, 32)
    small = Small(model, 60)
    make(tmp_path, model=model, max_steps=12).train()
    assert small.failed <= 3


def test_dropout_draws_as_if_nothing_had_failed(tmp_path):
    """The failed attempt consumed random numbers; the next one starts from the same state."""
    losses = {}
    for failing in (False, True):
        model = tiny_model(2, 32, attention_dropout=0.5)
        if failing:
            Small(
                model, 1, when=lambda model: not any(getattr(m, "gradient_checkpointing", 0) for m in model.modules())
            )
        trainer = make(tmp_path / str(failing), model=model, per_device_train_batch_size=1, memory="full", max_steps=3)
        trainer.train()
        losses[failing] = weights(trainer)
        assert rungs(trainer) == (["checkpointing"] if failing else [])
    assert apart(losses[True], losses[False]) == 0


def test_zeroth_order_steps_are_split_too(tmp_path):
    free = make(tmp_path / "free", ZOTrainer, memory_kwargs={"eps": 1e-2})
    free.train()
    model = tiny_model(2, 32)
    small = Small(model, 60, in_training=False)  # probes run in evaluation mode
    trainer = make(tmp_path / "small", ZOTrainer, model=model, memory_kwargs={"eps": 1e-2})
    trainer.train()
    assert small.failed
    assert apart(weights(trainer), weights(free)) < 1e-5


def test_trl_counts_every_token_once(tmp_path):
    """Token counts and metrics of an attempt that failed are taken back."""

    def run(name, limit):
        model = tiny_model(2, 32)
        if limit:
            Small(model, limit)
        trainer = BudgetedSFTTrainer(
            model=model,
            args=BudgetedSFTConfig(
                output_dir=str(tmp_path / name), **{**COMMON, "bf16": False, "gradient_checkpointing": False}
            ),
            train_dataset=tiny_pool(24),
            processing_class=tiny_tokenizer(),
        )
        trainer.train()
        return trainer

    free, small = run("free", 0), run("small", 60)
    assert rungs(small)
    assert apart(weights(small), weights(free)) < 1e-6
    counted = [
        [entry["num_tokens"] for entry in each.state.log_history if "num_tokens" in entry] for each in (free, small)
    ]
    assert counted[0] == counted[1]
    assert counted[0]


# the ladder


def checkpointed(model):
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def blockwise(model):
    return not all(parameter.requires_grad for parameter in model.parameters())


def test_rungs_come_in_order_and_are_told(tmp_path, caplog):
    model = tiny_model(2, 32)
    Small(model, 5, when=lambda model: not blockwise(model))
    with caplog.at_level(logging.WARNING, logger="hf_eff"):
        trainer = make(tmp_path, model=model)
        trainer.train()
    assert [rung.name for rung in trainer.plan.ladder] == ["row_chunks", "checkpointing", "badam", "length_split"]
    assert list(dict.fromkeys(rungs(trainer))) == ["row_chunks", "checkpointing", "badam"]
    told = " ".join(record.message for record in caplog.records)
    assert "checkpointing from here on. The result stays the same." in told
    assert "badam from here on. This changes the result." in told
    report = json.loads((tmp_path / "report.json").read_text())
    assert [event["rung"] for event in report["out_of_memory"]] == rungs(trainer)
    assert "Where memory ran out" in (tmp_path / "report.md").read_text()
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())  # let go at the end
    assert not checkpointed(trainer.model)


def test_blockwise_takes_over_the_optimizer(tmp_path):
    """Once blocks take turns, the optimizer holds state of one block only."""
    model = tiny_model(4, 32)
    Small(model, 1, when=lambda model: not blockwise(model))
    held = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            held.append(sum(parameter.numel() for parameter in optimizer.state))

    trainer = make(tmp_path, model=model, callbacks=[Look()])
    trainer.train()
    layer = sum(parameter.numel() for parameter in trainer.model.model.layers[0].parameters())
    assert held == [layer] * 4


def test_segments_are_the_last_rung(tmp_path):
    rows = Dataset.from_list([{"input_ids": list(range(3, 203)) * 2, "labels": list(range(3, 203)) * 2}] * 8)
    model = tiny_model(2, 32)
    Small(model, 200)
    trainer = make(tmp_path, model=model, rows=rows)
    trainer.train()
    assert rungs(trainer)[-1] == "length_split"
    assert trainer.budgeted_run.rescue.length_limit == 200
    assert trainer.state.global_step == 4


def test_exact_rungs_only(tmp_path):
    model = tiny_model(2, 32)
    Small(model, 5)
    trainer = make(tmp_path, model=model, out_of_memory="exact")
    with pytest.raises(MemoryExhaustedError, match=r"does not fit in memory at 1 x \d+ tokens .*CUDA out of memory"):
        trainer.train()
    assert set(rungs(trainer)) == {"row_chunks", "checkpointing"}


def test_raise_leaves_the_error_alone(tmp_path):
    model = tiny_model(2, 32)
    Small(model, 60)
    trainer = make(tmp_path, model=model, out_of_memory="raise")
    assert trainer.plan.ladder == ()
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()


def test_other_errors_pass(tmp_path):
    model = tiny_model(2, 32)

    def fail(module, args, kwargs):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    model.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(RuntimeError, match="mat1"):
        make(tmp_path, model=model).train()


def test_an_unknown_way_is_refused(tmp_path):
    with pytest.raises(OptionError, match="out_of_memory must be one of"):
        make(tmp_path, out_of_memory="pray")


def test_an_update_in_the_backward_has_no_ladder(tmp_path):
    trainer = make(tmp_path, memory="fused", max_grad_norm=0.0)
    assert trainer.plan.ladder == ()


# budgets and resuming


def test_another_attempt_is_charged(tmp_path, undisturbed):
    model = tiny_model(2, 32)
    Small(model, 60)
    trainer = make(tmp_path / "small", model=model)
    trainer.train()
    assert trainer.ledger.spent()["flops"] > undisturbed.ledger.spent()["flops"]
    assert trainer.ledger.spent()["steps"] == undisturbed.ledger.spent()["steps"]


def test_an_attempt_beyond_the_budget_is_not_made(tmp_path, undisturbed):
    model = tiny_model(2, 32)
    limit = undisturbed.ledger.spent()["flops"]
    Small(model, 60)
    trainer = make(tmp_path / "small", model=model, budget=f"{limit / 4 + 1}flop", max_steps=1)
    with pytest.raises(BudgetExceededError, match="a further attempt at optimizer step 0"):
        trainer.train()
    assert trainer.ledger.spent()["flops"] <= limit / 4 + 1


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            control.should_save = control.should_training_stop = True


@pytest.mark.parametrize(
    ("limit", "when", "last"),
    [
        (60, lambda model: True, "row_chunks"),
        (5, lambda model: not checkpointed(model), "checkpointing"),
        (5, lambda model: not blockwise(model), "badam"),
    ],
    ids=["rows", "checkpointing", "blocks"],
)
def test_resumed_runs_stay_on_their_rungs(tmp_path, limit, when, last):
    """Interrupted and resumed equals uninterrupted, bit for bit."""

    def run(name, resume=None, **options):
        model = tiny_model(2, 32)
        small = Small(model, limit, when)
        trainer = make(tmp_path / name, model=model, save_strategy="steps", save_steps=1000, **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, small.failed

    whole, failed = run("whole")
    first, _ = run("cut", callbacks=[Stop()])
    second, again = run("cut", resume=True)
    assert rungs(whole)[-1] == rungs(first)[-1] == last
    assert again < failed
    assert rungs(second)[: len(rungs(first))] == rungs(first)
    assert apart(weights(whole), weights(second)) == 0


# a cap that is real

BURST = """
import sys
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from hf_eff import BudgetedTrainer, BudgetedTrainingArguments
from hf_eff.hardware.probe import current_bytes, set_memory_cap
from hf_eff.testing.tiny import collator

folder, kind = sys.argv[1:]
torch.default_generator.manual_seed(0)
config = LlamaConfig(vocab_size=16384, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                     num_attention_heads=4, max_position_embeddings=2048, tie_word_embeddings=True, pad_token_id=0)
model = LlamaForCausalLM(config)
lengths = [16] * 24 + [1536] * 8 + [16] * 16  # a burst of long rows, 3 GiB of logits and their gradients in one batch
rows = Dataset.from_list([{"input_ids": [5 + i % 90] * n, "labels": [5 + i % 90] * n} for i, n in enumerate(lengths)])
common = dict(output_dir=folder, per_device_train_batch_size=8, num_train_epochs=1, use_cpu=True, report_to="none",
              disable_tqdm=True, save_strategy="no", train_sampling_strategy="sequential", logging_steps=1)
cap = current_bytes() + 700 * 2**20
if kind == "plain":
    set_memory_cap(cap)
    Trainer(model=model, args=TrainingArguments(**common), train_dataset=rows, data_collator=collator()).train()
else:
    args = BudgetedTrainingArguments(**common, budget=f"{cap / 2**30:.4f}GiB", out_of_memory="exact")
    trainer = BudgetedTrainer(model=model, args=args, train_dataset=rows, data_collator=collator())
    trainer.train()
    assert trainer.state.global_step == 6
    print([event["rung"] for event in trainer.budgeted_run.rescue.events], trainer.budgeted_run.rescue.token_limit)
"""


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="the cap of a CPU process, on Linux")
def test_a_burst_of_long_rows_kills_plain_training_and_not_ours(tmp_path):
    def run(kind):
        command = [sys.executable, "-c", BURST, str(tmp_path / kind), kind]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    plain, ours = run("plain"), run("ours")
    assert plain.returncode != 0
    assert "memory" in plain.stderr
    assert ours.returncode == 0, ours.stderr[-3000:]
