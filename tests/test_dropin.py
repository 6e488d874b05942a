"""What users assert of a Trainer: on the stock class, on ours with defaults, on ours with a budget that never binds.

Defaults: everything is equal, files included. A loose budget: the same losses, logs and weights; files only beside.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from peft import LoraConfig
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from hf_eff import BudgetedSFTConfig, BudgetedSFTTrainer, BudgetedTrainer, BudgetedTrainingArguments
from hf_eff.testing.tiny import collator, tiny_model, tiny_pool, tiny_target, tiny_tokenizer, tokenised

LOOSE = {"budget": "1e30flop"}
KINDS = {
    "trainer": (Trainer, TrainingArguments, {}),
    "ours": (BudgetedTrainer, BudgetedTrainingArguments, {}),
    "ours-loose": (BudgetedTrainer, BudgetedTrainingArguments, LOOSE),
}
SFT_KINDS = {
    "sft": (SFTTrainer, SFTConfig, {}),
    "ours": (BudgetedSFTTrainer, BudgetedSFTConfig, {}),
    "ours-loose": (BudgetedSFTTrainer, BudgetedSFTConfig, LOOSE),
}
COMMON = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "max_steps": 4,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "seed": 3,
}
TIMING = re.compile(r"runtime|per_second|total_flos|num_tokens")


class Recorder(TrainerCallback):
    """Names every event in order, with the step it came at."""

    def __init__(self):
        self.events = []

    def __getattribute__(self, name):
        if name.startswith("on_"):
            events = object.__getattribute__(self, "events")
            return lambda args, state, control, **kwargs: events.append((name, state.global_step))
        return object.__getattribute__(self, name)


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def history(trainer):
    return [
        {key: value for key, value in entry.items() if not TIMING.search(key) and not key.startswith("eff/")}
        for entry in trainer.state.log_history
    ]


def log_keys(trainer):
    return [sorted(key for key in entry if not key.startswith("eff/")) for entry in trainer.state.log_history]


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


class Bench:
    """Builds one trainer of the class under test and says what happened to it."""

    def __init__(self, kind, folder):
        self.trainer_class, self.args_class, self.extra = kind
        self.folder = folder

    def args(self, **changes):
        return self.args_class(output_dir=str(self.folder), **{**COMMON, **self.extra, **changes})

    def trainer(self, *, args=None, model=None, **named):
        named.setdefault("train_dataset", tokenised(tiny_pool(24)))
        named.setdefault("eval_dataset", tokenised(tiny_target(8)))
        named.setdefault("data_collator", collator())
        model = model or (None if "model_init" in named else tiny_model(2, 32))
        return self.trainer_class(model=model, args=args or self.args(), **named)

    def sft(self, *, args=None, model=None, **named):
        named.setdefault("train_dataset", tiny_pool(24))
        named.setdefault("processing_class", tiny_tokenizer())
        defaults = {"bf16": False, "activation_checkpointing": False, "max_length": 64}
        return self.trainer_class(model=model or tiny_model(2, 32), args=args or self.args(**defaults), **named)

    def outcome(self, trainer, **more):
        return {
            "history": history(trainer),
            "keys": log_keys(trainer),
            "weights": weights(trainer.model),
            "step": trainer.state.global_step,
            "files": files(self.folder),
            **more,
        }


def plain(bench):
    trainer = bench.trainer(args=bench.args(save_strategy="steps", save_steps=2))
    metrics = trainer.train().metrics
    return bench.outcome(trainer, metric_names=sorted(metrics))


def callbacks_in_order(bench):
    recorder = Recorder()
    args = bench.args(eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2)
    trainer = bench.trainer(args=args, callbacks=[recorder])
    trainer.train()
    return bench.outcome(trainer, events=recorder.events)


def accumulation_clipping_and_schedule(bench):
    args = bench.args(
        gradient_accumulation_steps=2, max_grad_norm=0.1, lr_scheduler_type="cosine", warmup_steps=1, weight_decay=0.1
    )
    trainer = bench.trainer(args=args)
    trainer.train()
    return bench.outcome(trainer)


def epochs_instead_of_steps(bench):
    trainer = bench.trainer(args=bench.args(max_steps=-1, num_train_epochs=2, logging_strategy="epoch"))
    trainer.train()
    return bench.outcome(trainer, epoch=trainer.state.epoch)


def compute_metrics_evaluate_predict(bench):
    def accuracy(prediction):
        guess = np.argmax(prediction.predictions[:, :-1], -1)
        kept = prediction.label_ids[:, 1:] != -100
        return {"accuracy": float((guess == prediction.label_ids[:, 1:])[kept].mean())}

    trainer = bench.trainer(compute_metrics=accuracy)
    trainer.train()
    found = trainer.evaluate()
    predicted = trainer.predict(tokenised(tiny_target(8)))
    return bench.outcome(
        trainer,
        accuracy=found["eval_accuracy"],
        eval_keys=sorted(found),
        predictions=torch.from_numpy(predicted.predictions),
        predict_keys=sorted(predicted.metrics),
    )


def best_model_at_the_end(bench):
    args = bench.args(
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        learning_rate=0.3,
        save_total_limit=2,
    )
    trainer = bench.trainer(args=args, callbacks=[EarlyStoppingCallback(2)])
    trainer.train()
    return bench.outcome(trainer, best=Path(trainer.state.best_model_checkpoint).name)


def several_evaluation_sets(bench):
    sets = {"a": tokenised(tiny_target(4)), "b": tokenised(tiny_target(8, seed=2))}
    trainer = bench.trainer(args=bench.args(eval_strategy="steps", eval_steps=2), eval_dataset=sets)
    trainer.train()
    return bench.outcome(trainer, evaluated=sorted(trainer.evaluate()))


def label_smoothing(bench):
    trainer = bench.trainer(args=bench.args(label_smoothing_factor=0.1))
    trainer.train()
    return bench.outcome(trainer)


def streaming_dataset(bench):
    rows = tokenised(tiny_pool(24))
    stream = IterableDataset.from_generator(lambda: iter(rows))
    trainer = bench.trainer(train_dataset=stream)
    trainer.train()
    return bench.outcome(trainer)


def custom_collator_and_loss(bench):
    class Custom(bench.trainer_class):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            return (outputs.loss * 2, outputs) if return_outputs else outputs.loss * 2

    bench.trainer_class = Custom
    pad = collator()

    def longer(rows):
        batch = pad(rows)
        return {
            key: torch.nn.functional.pad(value, (0, 3), value=-100 if key == "labels" else 0)
            for key, value in batch.items()
        }

    trainer = bench.trainer(data_collator=longer)
    trainer.train()
    return bench.outcome(trainer)


def own_optimizer_and_scheduler(bench):
    model = tiny_model(2, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    trainer = bench.trainer(model=model, optimizers=(optimizer, scheduler))
    trainer.train()
    return bench.outcome(trainer, same=trainer.optimizer.optimizer is optimizer)


def model_init_and_search_entry(bench):
    trainer = bench.trainer(model_init=lambda trial: tiny_model(2, 32))
    trainer.train()
    first = weights(trainer.model)
    trainer.train()
    with pytest.raises((RuntimeError, ValueError)) as failure:
        trainer.hyperparameter_search(backend="nothing", n_trials=1)
    return bench.outcome(trainer, first=first, failure=str(failure.value))


def resumed(bench):
    args = bench.args(save_strategy="steps", save_steps=2)
    bench.trainer(args=args).train()
    trainer = bench.trainer(args=args)
    trainer.train(resume_from_checkpoint=str(bench.folder / "checkpoint-2"))
    return bench.outcome(trainer)


def bert_classifier(bench):
    config = BertConfig(
        vocab_size=262, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
    rows = [{"input_ids": [5 + i % 50, 7, 9], "attention_mask": [1, 1, 1], "label": i % 2} for i in range(16)]
    trainer = bench.trainer(model=model, train_dataset=rows, eval_dataset=rows[:4], data_collator=None)
    trainer.train()
    return bench.outcome(trainer, loss=trainer.evaluate()["eval_loss"])


def t5_seq2seq(bench):
    config = T5Config(vocab_size=262, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(config)
    rows = [{"input_ids": [5 + i, 7, 9], "attention_mask": [1, 1, 1], "labels": [8, 5 + i]} for i in range(16)]
    trainer = bench.trainer(model=model, train_dataset=rows, eval_dataset=rows[:4], data_collator=None)
    trainer.train()
    return bench.outcome(trainer, loss=trainer.evaluate()["eval_loss"])


def saved_and_loaded(bench):
    trainer = bench.trainer(args=bench.args(save_strategy="epoch", max_steps=-1, num_train_epochs=1))
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    return bench.outcome(trainer)


SCENARIOS = [
    plain,
    callbacks_in_order,
    accumulation_clipping_and_schedule,
    epochs_instead_of_steps,
    compute_metrics_evaluate_predict,
    best_model_at_the_end,
    several_evaluation_sets,
    label_smoothing,
    streaming_dataset,
    custom_collator_and_loss,
    own_optimizer_and_scheduler,
    model_init_and_search_entry,
    resumed,
    bert_classifier,
    t5_seq2seq,
    saved_and_loaded,
]


def sft_plain(bench):
    trainer = bench.sft(eval_dataset=tiny_target(8))
    trainer.train()
    return bench.outcome(trainer, loss=trainer.evaluate()["eval_loss"])


def sft_checkpoints_and_resume(bench):
    args = bench.args(save_strategy="steps", save_steps=2, bf16=False, activation_checkpointing=False)
    bench.sft(args=args).train()
    trainer = bench.sft(args=args)
    trainer.train(resume_from_checkpoint=str(bench.folder / "checkpoint-2"))
    return bench.outcome(trainer)


def sft_peft(bench):
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = bench.sft(peft_config=config)
    trainer.train()
    trainer.save_model()
    return bench.outcome(trainer)


def sft_packing(bench):
    args = bench.args(packing=True, max_length=64, bf16=False, activation_checkpointing=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl.trainer.sft_trainer.logger.warning", lambda *a, **k: None)
        trainer = bench.sft(args=args)
    trainer.train()
    return bench.outcome(trainer)


def sft_loss_on_everything(bench):
    args = bench.args(completion_only_loss=False, bf16=False, activation_checkpointing=False)
    trainer = bench.sft(args=args)
    trainer.train()
    return bench.outcome(trainer)


def sft_defaults_bf16_and_checkpointing(bench):
    trainer = bench.sft(args=bench.args())
    trainer.train()
    return bench.outcome(trainer)


def sft_formatting_func(bench):
    trainer = bench.sft(
        train_dataset=tiny_pool(24).remove_columns("completion").rename_column("prompt", "question"),
        formatting_func=lambda row: f"Q: {row['question']}",
    )
    trainer.train()
    return bench.outcome(trainer)


SFT_SCENARIOS = [
    sft_plain,
    sft_checkpoints_and_resume,
    sft_peft,
    sft_packing,
    sft_loss_on_everything,
    sft_defaults_bf16_and_checkpointing,
    sft_formatting_func,
]
OURS_BESIDE = re.compile(r"^(plan\.json|report\.json|report\.md|README\.md|governor\.jsonl)$|hf_eff_state\.")


def assert_same(stock, ours, *, loose):
    assert stock.keys() == ours.keys()
    for key, wanted in stock.items():
        got = ours[key]
        if key == "files":
            got = [name for name in got if not (loose and OURS_BESIDE.search(name) and name not in wanted)]
        if isinstance(wanted, dict) and all(isinstance(value, torch.Tensor) for value in wanted.values()):
            assert wanted.keys() == got.keys()
            assert all(torch.equal(wanted[name], got[name]) for name in wanted), f"{key} differ"
        elif isinstance(wanted, torch.Tensor):
            assert torch.equal(wanted, got), f"{key} differ"
        else:
            assert got == wanted, f"{key} differ"


def _compare(kinds, scenario, tmp_path):
    names = list(kinds)
    outcomes = {}
    for name in names:
        folder = tmp_path / name
        folder.mkdir()
        outcomes[name] = scenario(Bench(kinds[name], folder))
    assert outcomes[names[0]]["step"] > 0
    for name in names[1:]:
        assert_same(outcomes[names[0]], outcomes[name], loose=name.endswith("loose"))


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda each: each.__name__)
def test_trainer_is_a_drop_in(scenario, tmp_path):
    _compare(KINDS, scenario, tmp_path)


@pytest.mark.parametrize("scenario", SFT_SCENARIOS, ids=lambda each: each.__name__)
def test_sft_trainer_is_a_drop_in(scenario, tmp_path):
    _compare(SFT_KINDS, scenario, tmp_path)


def test_default_checkpoints_are_equal_in_content(tmp_path):
    for name in ("trainer", "ours"):
        folder = tmp_path / name
        folder.mkdir()
        plain(Bench(KINDS[name], folder))
    for name in ("trainer_state.json",):
        states = [json.loads((tmp_path / kind / "checkpoint-4" / name).read_text()) for kind in ("trainer", "ours")]
        assert states[0] == states[1]
    for name in ("model.safetensors",):
        assert (tmp_path / "trainer" / "checkpoint-4" / name).read_bytes() == (
            tmp_path / "ours" / "checkpoint-4" / name
        ).read_bytes()


def test_stock_arguments_work_with_our_trainers(tmp_path):
    """People change the trainer's import first and its arguments later."""
    args = TrainingArguments(output_dir=str(tmp_path), **COMMON)
    trainer = BudgetedTrainer(tiny_model(2, 32), args, collator(), tokenised(tiny_pool(24)))
    trainer.train()
    assert trainer.state.global_step == 4
