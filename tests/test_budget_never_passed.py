"""A limit in FLOPs, tokens or steps is never passed, and never left unused for want of one more step that fits."""

import gc
import os
import random

import pytest
import torch

from hf_eff import BudgetedTrainer, BudgetedTrainingArguments, run_ends
from hf_eff.contracts.memory import BatchShape
from hf_eff.engines.facts import model_facts
from hf_eff.numerics.flops import training_flops
from hf_eff.registry import get_method
from hf_eff.testing.tiny import collator, tiny_model
from hf_eff.testing.trial import Trial

CASES, CHUNKS = 1000, 10
BATCH = 2


class Rows(torch.utils.data.Dataset):
    """Rows of given lengths."""

    def __init__(self, lengths):
        self.lengths = lengths

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        return {"input_ids": [5 + i] * self.lengths[i], "labels": [5 + i] * self.lengths[i]}


class CountingTrainer(BudgetedTrainer):
    """Notes the shape of every micro-batch whose loss is computed."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.computed = []

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.computed.append(tuple(inputs["input_ids"].shape))
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.fixture(scope="module")
def model():
    return tiny_model(layers=1, width=16, num_attention_heads=2, num_key_value_heads=2)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A thousand trainers: skip what only costs time between them."""
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(run_ends, "environment", lambda *_: {})


def windows(lengths, accumulation):
    """Shapes of the micro-batches of each optimizer step of one epoch, rows in order."""
    rows = [lengths[i : i + BATCH] for i in range(0, len(lengths), BATCH)]
    shapes = [(len(batch), max(batch)) for batch in rows]
    return [shapes[i : i + accumulation] for i in range(0, len(shapes), accumulation)]


def price(window, facts):
    """What one optimizer step costs, by currency."""
    return {
        "flops": sum(training_flops(facts, BatchShape(*shape)) for shape in window),
        "tokens": float(sum(rows * length for rows, length in window)),
        "steps": 1.0,
    }


def affordable(prices, limits):
    """Steps, in order, until the next one would pass a limit."""
    spent = dict.fromkeys(("flops", "tokens", "steps"), 0.0)
    for number, each in enumerate(prices):
        if any(spent[name] + each[name] > limit for name, limit in limits.items()):
            return number
        spent = {name: spent[name] + each[name] for name in spent}
    return len(prices)


def draw(generator, facts):
    """Random lengths, accumulation and limits between a fifth of the run and more than all of it."""
    accumulation = generator.choice([1, 2, 3, 4])
    lengths = [generator.randint(2, 40) for _ in range(BATCH * accumulation * generator.randint(1, 4))]
    prices = [price(window, facts) for window in windows(lengths, accumulation)]
    total = {name: sum(each[name] for each in prices) for name in prices[0]}
    names = generator.sample(["flops", "tokens", "steps"], generator.choice([1, 1, 2, 3]))
    limits = {name: max(1.0, float(int(total[name] * generator.uniform(0.2, 1.2)))) for name in names}
    if generator.random() < 0.2:  # exactly what the run costs: nothing may be cut
        limits = {name: total[name] for name in names}
    return lengths, accumulation, prices, limits


def train(model, folder, lengths, accumulation, limits):
    units = {"flops": "flop", "tokens": "tok", "steps": "steps"}
    trainer = CountingTrainer(
        model=model,
        args=BudgetedTrainingArguments(
            output_dir=str(folder),
            budget=", ".join(f"{limit!r}{units[name]}" for name, limit in limits.items()),
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=accumulation,
            train_sampling_strategy="sequential",
            num_train_epochs=1,
            learning_rate=1e-4,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=Rows(lengths),
        data_collator=collator(),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_never_passed_and_never_short(model, tmp_path, chunk):
    facts = model_facts(model)
    generator = random.Random(chunk)
    for case in range(CASES // CHUNKS):
        lengths, accumulation, prices, limits = draw(generator, facts)
        trainer = train(model, tmp_path, lengths, accumulation, limits)
        expected = affordable(prices, limits)
        where = f"chunk {chunk}, case {case}: {lengths}, {accumulation}, {limits}"
        assert trainer.state.global_step == expected, where
        assert trainer.computed == [shape for window in windows(lengths, accumulation)[:expected] for shape in window]
        spent = trainer.ledger.spent()
        done = price(trainer.computed, facts) | {"steps": float(expected)}
        for name, limit in limits.items():
            assert spent[name] <= limit, where
            assert spent[name] == pytest.approx(done[name], rel=1e-12), where


@pytest.mark.parametrize("share", [0.2, 0.45, 0.8])
def test_kept_across_a_resume(tmp_path, share):
    trial = Trial(get_method("memory", "full"), tmp_path, accumulation=2, max_steps=12)
    full = trial.whole().spent
    for currency, unit in (("flops", "flop"), ("tokens", "tok")):
        limit = share * full[currency]
        cut = Trial(
            trial.spec, tmp_path / currency, accumulation=2, max_steps=12, arguments={"budget": f"{limit!r}{unit}"}
        )
        whole = cut.whole()
        assert 0 < whole.steps < 12
        assert 0.5 * limit < whole.spent[currency] <= limit
        resumed = cut.interrupted(1)
        assert resumed.differences(whole) == []
