"""The callback on TRL's own trainers: FLOPs as torch counts them, the objectives of each, budgets."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid
from torch.utils.flop_counter import FlopCounterMode

from hf_eff import GovernorCallback
from hf_eff.contracts.memory import BatchShape
from hf_eff.engines.facts import model_facts
from hf_eff.engines.held_out import HeldOutReward, TrainerLoss
from hf_eff.numerics.flops import forward_flops
from hf_eff.testing.tiny import tiny_config, tiny_model, tiny_tokenizer

trl = pytest.importorskip("trl")

COMMON = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "bf16": False,
    "activation_checkpointing": False,
}
PAIRS = [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": " no"} for i in range(12)]
PROBING = {"governor_kwargs": {"num_examples": 4, "probe_share": 1.0}, "mode": "observe"}


def small_model():
    # Eager attention: torch counts no FLOPs of the fused kernel on a CPU.
    return tiny_model(2, 32, attn_implementation="eager")


def added(acc, a, b, *_, **__):
    """FLOPs of ``acc.addmm_(a, b)``, which torch does not count."""
    return 2 * a[0] * a[1] * b[1]


def counted_by_torch(trainer):
    """Make the trainer's steps count themselves; the total is in the list afterwards."""
    stock, totals = trainer.training_step, []

    def step(*args, **kwargs):
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added}) as counter:
            loss = stock(*args, **kwargs)
        totals.append(counter.get_total_flops())
        return loss

    trainer.training_step = step
    return totals


def preference_loss(trainer, row):
    """The DPO loss of one pair, written out: -log sigmoid(beta (chosen - rejected)), beta 0.1."""

    def log_likelihood(model, answer):
        ids = torch.tensor([row["prompt_ids"] + answer])
        with torch.no_grad():
            scores = model.eval()(input_ids=ids).logits.log_softmax(dim=-1)[0, :-1]
        return scores.gather(1, ids[0, 1:, None])[len(row["prompt_ids"]) - 1 :].sum()

    ratio = {
        name: log_likelihood(trainer.model, row[name]) - log_likelihood(trainer.ref_model, row[name])
        for name in ("chosen_ids", "rejected_ids")
    }
    return float(-logsigmoid(0.1 * (ratio["chosen_ids"] - ratio["rejected_ids"])))


def test_dpo_counts_its_reference_and_watches_the_held_out_preference_loss(tmp_path):
    trainer = trl.DPOTrainer(
        small_model(),
        ref_model=small_model(),
        args=trl.DPOConfig(output_dir=str(tmp_path), max_steps=3, **COMMON),
        train_dataset=Dataset.from_list(PAIRS),
        eval_dataset=Dataset.from_list(PAIRS[:4]),
        processing_class=tiny_tokenizer(),
    )
    callback = GovernorCallback("marginal_gain", trainer=trainer, log_path=tmp_path / "log.jsonl", **PROBING)
    trainer.add_callback(callback)
    totals = counted_by_torch(trainer)
    trainer.train()
    by_purpose = callback.ledger.by_purpose()
    assert by_purpose["train"]["flops"] == sum(totals) > 0
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert records[0]["run"]["objective"] == {"name": "loss of DPOTrainer", "better": "smaller", "noise": "examples"}
    looks = [record["telemetry"]["probe"] for record in records if record["kind"] == "decision"]
    assert len(looks) == 3
    assert all(look["paired_se"] > 0 for look in looks[1:])
    expected = [preference_loss(trainer, row) for row in trainer.eval_dataset]
    assert looks[-1]["mean"] == pytest.approx(np.mean(expected), rel=1e-3)
    assert by_purpose["eval"]["flops"] == 0  # a probe is charged once
    # Nothing of a probe is left in what the trainer collected, and its cost is that of policy and reference.
    assert not trainer._metrics["eval"]
    lengths = [
        len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in trainer.eval_dataset
    ]
    forward = sum(forward_flops(model_facts(trainer.model), BatchShape(2, length)) for length in lengths)
    assert by_purpose["probe"]["flops"] == pytest.approx(3 * 2 * forward)


def test_a_reference_that_no_one_showed_is_taken_to_be_as_large(tmp_path):
    callback = GovernorCallback(budget="2steps")
    trainer = trl.DPOTrainer(
        small_model(),
        ref_model=small_model(),
        args=trl.DPOConfig(output_dir=str(tmp_path), max_steps=4, **COMMON),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tiny_tokenizer(),
        callbacks=[callback],
    )
    totals = counted_by_torch(trainer)
    trainer.train()
    assert trainer.state.global_step == 2
    assert callback.ledger.spent()["flops"] == sum(totals)


def test_an_adapter_is_counted_as_its_own_reference(tmp_path):
    peft = pytest.importorskip("peft")
    callback = GovernorCallback(budget="1e30flop")
    trainer = trl.DPOTrainer(
        small_model(),
        args=trl.DPOConfig(output_dir=str(tmp_path), max_steps=1, **COMMON),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tiny_tokenizer(),
        peft_config=peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        callbacks=[callback],
    )
    totals = counted_by_torch(trainer)
    trainer.train()
    # The closed form charges the reference for the adapter that is switched off.
    assert sum(totals) <= callback.ledger.spent()["flops"] == pytest.approx(sum(totals), rel=0.02)


def test_a_reward_model_is_trained_on_pairs(tmp_path):
    from transformers import LlamaForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tiny_config(2, 32, num_labels=1, attn_implementation="eager")
        model = LlamaForSequenceClassification(config)
    texts = [{"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in PAIRS]
    trainer = trl.RewardTrainer(
        model,
        args=trl.RewardConfig(output_dir=str(tmp_path), max_steps=3, **COMMON),
        train_dataset=Dataset.from_list(texts),
        eval_dataset=Dataset.from_list(texts[:4]),
        processing_class=tiny_tokenizer(),
    )
    callback = GovernorCallback("marginal_gain", trainer=trainer, log_path=tmp_path / "log.jsonl", **PROBING)
    trainer.add_callback(callback)
    totals = counted_by_torch(trainer)
    trainer.train()
    # Within the score head, one row of 32 numbers.
    assert callback.ledger.by_purpose()["train"]["flops"] == pytest.approx(sum(totals), rel=5e-3)
    assert isinstance(callback._quantity, TrainerLoss)
    with torch.no_grad():
        rewards = {
            name: [float(model.eval()(torch.tensor([row[name]])).logits) for row in trainer.eval_dataset]
            for name in ("chosen_ids", "rejected_ids")
        }
    margins = torch.tensor(rewards["chosen_ids"]) - torch.tensor(rewards["rejected_ids"])
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-2])
    assert last["telemetry"]["probe"]["mean"] == pytest.approx(float(-logsigmoid(margins).mean()), rel=1e-3)


def letters(completions, **_):
    return [float(sum(letter.isalpha() for letter in text)) for text in completions]


def grpo(folder, callbacks, **options):
    config = {"num_generations": 4, "max_completion_length": 6, "max_steps": 2, **COMMON, **options}
    rows = Dataset.from_list([{"prompt": f"{i % 10} + {i % 10} ="} for i in range(12)])
    return trl.GRPOTrainer(
        small_model(),
        reward_funcs=letters,
        args=trl.GRPOConfig(output_dir=str(folder), **config),
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
    )


def test_grpo_counts_what_it_generates_and_watches_the_held_out_reward(tmp_path):
    # Two rounds of texts serve three micro-steps, so log-probabilities of older weights are taken as well.
    trainer = grpo(tmp_path, [], gradient_accumulation_steps=3, steps_per_generation=2)
    callback = GovernorCallback("marginal_gain", trainer=trainer, log_path=tmp_path / "log.jsonl", **PROBING)
    trainer.add_callback(callback)
    totals = counted_by_torch(trainer)
    trainer.train()
    assert callback.ledger.by_purpose()["train"]["flops"] == sum(totals)
    assert isinstance(callback._quantity, HeldOutReward)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert records[0]["run"]["objective"]["better"] == "larger"
    model, tokenizer = trainer.model.eval(), tiny_tokenizer()
    rewards = []
    for row in trainer.eval_dataset:
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        text = tokenizer.decode(
            model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :], skip_special_tokens=True
        )
        rewards += letters([text])
    assert records[-2]["telemetry"]["probe"]["mean"] == pytest.approx(-np.mean(rewards))


def test_grpo_keeps_a_budget_by_its_bound(tmp_path):
    free = GovernorCallback(budget="1e30flop")
    grpo(tmp_path / "a", [free], max_steps=1).train()
    step, bound = free.ledger.spent()["flops"], free._need()["flops"]
    assert step < bound < 2 * step
    limit = step + (step + bound) / 2  # room for another step like the first, not for the longest one possible
    callback = GovernorCallback(budget=f"{limit}flop")
    trainer = grpo(tmp_path / "b", [callback], max_steps=3)
    trainer.train()
    assert trainer.state.global_step == 1
    assert callback.ledger.spent()["flops"] == step
    assert callback.stop_reason == "budget: another step would pass the flops limit"
