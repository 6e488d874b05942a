"""Training on objectives without a gradient, through the public trainers."""

import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    PrinterCallback,
    default_data_collator,
)

from hf_eff import (
    BudgetedSFTConfig,
    BudgetedTrainer,
    BudgetedTrainingArguments,
    ClassificationError,
    GenerationObjective,
    Objective,
    ZOSFTTrainer,
    ZOTrainer,
)
from hf_eff.engines.directions import Gaussian
from hf_eff.errors import OptionError, PlanError
from hf_eff.testing.tiny import collator, tiny_config, tiny_model, tiny_pool, tiny_tokenizer, tokenised
from hf_eff.testing.torchrun import torchrun
from hf_eff.testing.trial import outcome_of

WORDS = ["<pad>", "<eos>", ":", "a", "b", "c", "d", "yes", "no"]


@pytest.fixture(scope="module")
def words():
    """A tokenizer of nine words."""
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="module")
def task(words):
    """Whether the last letter before the colon is one of the first two; prompts of several lengths."""
    letters = "dbacbdacadbbccda"
    texts = [(" ".join(letters[place % 5 : place + 1][-1 - place % 3 :]) + " :") for place in range(16)]
    rows = []
    for text in texts:
        prompt, answer = words(text)["input_ids"], words("yes" if text[-3] in "ab" else "no")["input_ids"]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return Dataset.from_list(rows)


def word_model():
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return tiny_model(layers=1, width=16, vocab_size=len(WORDS), initializer_range=0.2, **special)


def build(folder, rows, tokenizer, model=None, kind=ZOTrainer, collate=None, objective=None, **options):
    args = BudgetedTrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 0,
            **options,
        }
    )
    trainer = kind(
        model=model or word_model(),
        args=args,
        train_dataset=rows,
        data_collator=collate or collator(tokenizer),
        processing_class=tokenizer,
        **({} if objective is None else {"objective": objective}),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def coefficients(trainer):
    return [record.coefficients[0] for record in trainer.budgeted_run.replay_log.records]


def soft(model, inputs):
    return model(input_ids=inputs["input_ids"][:, :2]).logits.tanh().mean()


def no_loss(*_args, **_kwargs):
    raise AssertionError("the loss is not what is trained on")


@pytest.mark.parametrize(("memory", "rate"), [("mezo", 0.1), ("lora+mezo", 0.3)])
def test_wrong_answers_become_fewer(tmp_path, task, words, monkeypatch, memory, rate):
    options = {"eps": 0.1, "num_directions": 4}
    kwargs = options if memory == "mezo" else {"mezo": options, "lora": {"r": 8, "alpha": 16}}
    objective = GenerationObjective(words, "exact_match", max_new_tokens=1)
    arguments = {"max_steps": 15, "per_device_train_batch_size": 16, "learning_rate": rate}
    monkeypatch.setattr(ZOTrainer, "compute_loss", no_loss)
    trainer = build(tmp_path, task, words, memory=memory, memory_kwargs=kwargs, objective=objective, **arguments)

    def error():
        with torch.no_grad():
            return float(ClassificationError()(trainer.model.eval(), collator(words)([dict(row) for row in task])))

    before = error()
    trainer.train()
    assert before >= 0.75
    assert error() <= before - 0.25


# what a step is


def test_accumulated_batches_count_as_their_mean(tmp_path, task, words):
    found = []
    for parts in (1, 2):
        rows = {"per_device_train_batch_size": 4 // parts, "gradient_accumulation_steps": parts}
        trainer = build(tmp_path, task, words, word_model().double(), objective=soft, max_steps=3, **rows)
        trainer.train()
        found.append(coefficients(trainer))
    assert found[1] == pytest.approx(found[0], rel=1e-9)
    assert min(map(abs, found[0])) > 1e-6


def test_a_mean_over_micro_batches_is_taken(tmp_path, task, words):
    asked = []

    def each(model, inputs):
        asked.append(None)
        return float(len(asked))  # first batch: 1 above, 2 below; second batch: 3 above, 4 below

    run = build(tmp_path, task, words, objective=each, gradient_accumulation_steps=2, max_steps=1)
    run.train()
    (c,) = coefficients(run)
    assert c == pytest.approx(-1 / (2 * 1e-3))


def test_a_model_is_asked_in_evaluation_mode_and_left_as_found(tmp_path, task, words):
    seen = []

    class Watch(GenerationObjective):
        def __call__(self, model, inputs):
            seen.append((model.training, torch.is_grad_enabled(), model.config.use_cache))
            return super().__call__(model, inputs)

    model = word_model().train()
    generation = model.generation_config.to_dict()
    trainer = build(tmp_path, task, words, model, objective=Watch(words, max_new_tokens=2), learning_rate=0.0)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.config.use_cache = True  # the trainer turned it off
    trainer.train()
    assert set(seen) == {(False, False, False)}
    assert model.config.use_cache
    assert model.generation_config.to_dict() == generation
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_held_weights_are_drawn_once_and_change_nothing(tmp_path, task, words, monkeypatch):
    drawn = []
    entries = Gaussian.add_

    def count(self, out, name, *args, base=None, **kwargs):
        drawn.extend([name] * (base is not None))  # a probe, not an update
        return entries(self, out, name, *args, base=base, **kwargs)

    monkeypatch.setattr(Gaussian, "add_", count)
    found = {}
    for holds in (True, False):
        objective = GenerationObjective(words, "f1", max_new_tokens=4, holds_weights=holds)
        model = word_model()
        model.generation_config.eos_token_id = 8
        trainer = build(tmp_path, task, words, model, objective=objective, memory_kwargs={"eps": 0.3})
        trainer.train()
        second = len(drawn) // 2
        found[holds] = (outcome_of(trainer), second)
        drawn.clear()
    assert found[True][0].differences(found[False][0]) == []
    assert found[True][1] < found[False][1]


def test_resumed_equals_uninterrupted(tmp_path, task, words):
    """From a log alone: the objective is asked nothing again."""
    options = {"max_steps": 4, "memory_kwargs": {"eps": 0.3, "save": "log"}, "save_steps": 1, "save_strategy": "steps"}

    def make(name, **changes):
        return build(tmp_path / name, task, words, objective=soft, **{**options, **changes})

    whole, first, second = make("whole"), make("cut", max_steps=2), make("cut")
    whole.train()
    first.train()
    second.train(resume_from_checkpoint=True)
    assert outcome_of(second).differences(outcome_of(whole)) == []
    assert any(coefficients(whole))


def test_over_sft(tmp_path):
    tokenizer = tiny_tokenizer()
    seen = []

    def metric(predictions, references):
        seen.extend(references)
        return sum(map(len, predictions)) / 100

    args = BudgetedSFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, bf16=False, report_to="none",
        use_cpu=True, save_strategy="no", disable_tqdm=True, memory_kwargs={"eps": 0.1}, gradient_accumulation_steps=2,
    )  # fmt: skip
    pool = tiny_pool(8)
    objective = GenerationObjective(tokenizer, metric, max_new_tokens=3)
    trainer = ZOSFTTrainer(
        model=tiny_model(2, 32), args=args, train_dataset=pool, processing_class=tokenizer, objective=objective
    )
    trainer.train()
    assert set(seen) <= {row["completion"].strip() for row in pool}
    assert len(coefficients(trainer)) == 2
    assert trainer.ledger.spent()["flops"] > 0


@pytest.mark.distributed
def test_two_processes_take_the_mean(tmp_path):
    worker = Path(__file__).parent / "workers" / "two_objectives.py"
    torchrun(worker, str(tmp_path))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["coefficients"][0] == found["coefficients"][1]
    assert found["weights"][0] == found["weights"][1]
    # Rank r answers (r + 1) above and -(r + 1) below: the mean is 3 / 2.
    assert found["coefficients"][0] == pytest.approx([1.5 / 1e-3] * 2)


# what it costs


def test_the_plan_and_the_ledger_charge_generation(tmp_path, words):
    rows = [{"input_ids": [3, 4, 5, 2, 7], "labels": [-100] * 4 + [7]}] * 16
    rows = Dataset.from_list(rows)
    runs = {
        tokens: build(tmp_path, rows, words, objective=GenerationObjective(words, max_new_tokens=tokens))
        for tokens in (1, 8)
    }
    for run in runs.values():
        run.train()
        assert run.ledger.spent()["flops"] == pytest.approx(2 * run.plan.step_flops, rel=1e-9)
    plain = build(tmp_path, rows, words)
    assert runs[1].plan.step_flops < plain.plan.step_flops < runs[8].plan.step_flops
    held = runs[8].plan.bytes["rest"] - plain.plan.bytes["rest"]
    assert held == sum(parameter.numel() * 4 for parameter in word_model().parameters())
    assert build(tmp_path, rows, words, objective=lambda *_: 0.0).plan.step_flops == plain.plan.step_flops


def test_a_budget_stops_what_generation_would_pass(tmp_path, task, words):
    objective = GenerationObjective(words, max_new_tokens=16)
    one = build(tmp_path, task, words, objective=objective).plan.step_flops
    trainer = build(tmp_path, task, words, objective=objective, budget=f"{2.5 * one:.0f}flop", max_steps=9)
    trainer.train()
    assert trainer.state.global_step < 5
    assert trainer.ledger.spent()["flops"] <= 2.5 * one


# what is refused


@pytest.mark.parametrize("memory", ["full", "badam", "lora"])
def test_methods_that_differentiate_refuse_an_objective(tmp_path, task, words, memory):
    with pytest.raises(PlanError, match=f"memory='{memory}' differentiates; use a method that does not: .*'mezo'"):
        build(tmp_path, task, words, tiny_model(), BudgetedTrainer, memory=memory, objective=ClassificationError())


def test_splitting_rows_is_refused_and_not_planned(tmp_path, task, words):
    with pytest.raises(PlanError, match=r"splits micro-batches, and objective=\.\.\. is asked of whole ones"):
        build(tmp_path, task, words, memory="row_chunks+mezo", objective=ClassificationError())
    assert build(tmp_path, task, words, objective=ClassificationError()).plan.ladder == ()
    assert build(tmp_path, task, words).plan.ladder != ()


def test_what_is_no_objective_is_refused(tmp_path, task, words):
    with pytest.raises(OptionError, match="objective must be a function"):
        build(tmp_path, task, words, objective="exact_match")
    with pytest.raises(OptionError, match="objective must return one number"):
        build(tmp_path, task, words, objective=lambda *_: torch.zeros(3)).train()
    assert isinstance(ClassificationError(), Objective)


# heads


def heads():
    classes = [{"input_ids": [10 + place, 20, 30], "labels": place % 3} for place in range(8)]
    options = [{"input_ids": [[10 + place, n, 3] for n in range(3)], "labels": place % 3} for place in range(8)]
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertConfig(vocab_size=50, hidden_size=16, **small)
    return {
        "classifier": (lambda: LlamaForSequenceClassification(tiny_config(1, 32, num_labels=3)), classes),
        "multiple choice": (lambda: BertForMultipleChoice(bert), options),
    }


@pytest.mark.parametrize("name", heads())
@pytest.mark.parametrize("objective", [None, ClassificationError()], ids=["loss", "error"])
def test_heads_train_on_their_loss_and_on_their_error(tmp_path, name, objective):
    make, rows = heads()[name]
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        model = make()
    arguments = {
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "memory_kwargs": {"eps": 0.01 if objective is None else 0.5, "num_directions": 2},
        "learning_rate": 1e-3,
    }
    trainer = build(tmp_path, rows, None, model, collate=default_data_collator, objective=objective, **arguments)
    before = {key: value.clone() for key, value in model.named_parameters()}
    trainer.train()
    assert any(coefficients(trainer))
    assert any(not torch.equal(before[key], value) for key, value in model.named_parameters())
    if objective is None:
        assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(math.log(3), abs=0.1)


def test_tokenised_rows_with_a_users_function(tmp_path):
    def length_error(model, inputs):
        chosen = model(input_ids=inputs["input_ids"]).logits.argmax(-1)
        return (chosen != inputs["input_ids"]).double().mean()

    trainer = build(tmp_path, tokenised(tiny_pool(8)), tiny_tokenizer(), tiny_model(1, 16), objective=length_error)
    trainer.train()
    assert trainer.state.global_step == 2
