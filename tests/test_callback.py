import json

import pytest
import torch
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer

from hf_eff import GovernorCallback
from hf_eff.engines.facts import batch_shape, model_facts
from hf_eff.errors import CheckpointError, PlanError
from hf_eff.numerics.flops import training_flops
from hf_eff.testing.tiny import collator, tiny_model, tiny_pool, tiny_target, tiny_tokenizer, tokenised

COMMON = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "per_device_train_batch_size": 4,
    "max_steps": 6,
    "learning_rate": 1e-3,
    "save_strategy": "no",
}


def make(folder, callback, **options):
    args = TrainingArguments(output_dir=str(folder), **{**COMMON, **options})
    return Trainer(tiny_model(2, 32), args, collator(), train_dataset=tokenised(tiny_pool(24)), callbacks=[callback])


def test_spending_is_the_closed_form_over_the_batches_seen(tmp_path):
    callback = GovernorCallback(budget="1e30flop")
    trainer = make(tmp_path, callback)
    shapes = []
    stock = trainer.compute_loss

    def spy(model, inputs, **kwargs):
        shapes.append(batch_shape(inputs, model_facts(model)))
        return stock(model, inputs, **kwargs)

    trainer.compute_loss = spy
    trainer.train()
    facts = model_facts(trainer.model)
    assert callback.ledger.spent()["flops"] == pytest.approx(sum(training_flops(facts, shape) for shape in shapes))
    assert callback.ledger.spent()["tokens"] == sum(shape.tokens for shape in shapes)


def test_a_budget_ends_a_stock_trainer(tmp_path):
    callback = GovernorCallback(budget="3steps")
    trainer = make(tmp_path, callback)
    trainer.train()
    assert trainer.state.global_step == 3
    assert callback.stop_reason == "budget: another step would pass the steps limit"


def test_watching_changes_no_bit(tmp_path):
    plain = Trainer(
        tiny_model(2, 32),
        TrainingArguments(output_dir=str(tmp_path / "a"), **COMMON),
        collator(),
        train_dataset=tokenised(tiny_pool(24)),
    )
    plain.train()
    callback = GovernorCallback(
        "marginal_gain",
        mode="observe",
        governor_kwargs={"num_examples": 2, "probe_share": 1.0},
        eval_dataset=tokenised(tiny_target(4)).remove_columns("source"),
        data_collator=collator(),
        log_path=tmp_path / "log.jsonl",
    )
    watched = make(tmp_path / "b", callback)
    watched.train()
    states = plain.model.state_dict(), watched.model.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum(record["kind"] == "decision" for record in records) > 0
    assert not watched.model._forward_pre_hooks


def test_resuming_goes_on_counting(tmp_path):
    make(tmp_path, GovernorCallback(budget="1e30flop"), save_strategy="steps", save_steps=3).train()
    callback = GovernorCallback(budget="5steps")
    trainer = make(tmp_path, callback)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert trainer.state.global_step == 5
    assert callback.ledger.spent()["steps"] == 5


def test_resuming_without_its_state_is_refused(tmp_path):
    plain = make(tmp_path, GovernorCallback(budget="1h"), save_strategy="steps", save_steps=3)
    plain.remove_callback(GovernorCallback)
    plain.train()
    with pytest.raises(CheckpointError, match="so what was spent before is unknown"):
        make(tmp_path, GovernorCallback(budget="1h")).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_probing_governor_needs_rows():
    with pytest.raises(PlanError, match=r"governor='marginal_gain' probes a target; pass eval_dataset"):
        GovernorCallback("marginal_gain")


def test_a_trl_trainer_can_be_governed(tmp_path):
    from datasets import Dataset

    rows = [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": " no"} for i in range(16)]
    callback = GovernorCallback(budget="2steps")
    args = DPOConfig(output_dir=str(tmp_path), **{**COMMON, "bf16": False, "activation_checkpointing": False})
    trainer = DPOTrainer(
        tiny_model(2, 32),
        ref_model=tiny_model(2, 32),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        callbacks=[callback],
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert callback.ledger.spent()["tokens"] > 0
