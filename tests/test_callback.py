import json

import pytest
import torch
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from hf_eff import GovernorCallback
from hf_eff.contracts.memory import BatchShape
from hf_eff.engines.facts import batch_shape, model_facts
from hf_eff.engines.held_out import HeldOutNumber
from hf_eff.errors import CheckpointError, EffWarning, PlanError
from hf_eff.governor import GovernorLog
from hf_eff.hardware import energy
from hf_eff.numerics.flops import forward_flops, training_flops
from hf_eff.testing.tiny import collator, tiny_model, tiny_pool, tiny_target, tokenised

COMMON = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "per_device_train_batch_size": 4,
    "max_steps": 6,
    "learning_rate": 1e-3,
    "save_strategy": "no",
}


def make(folder, callback, eval_dataset=None, **options):
    args = TrainingArguments(output_dir=str(folder), **{**COMMON, **options})
    rows = tokenised(tiny_pool(24))
    return Trainer(tiny_model(2, 32), args, collator(), rows, eval_dataset, callbacks=[callback])


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


def make_growing(folder, callback):
    """A trainer whose steps get dearer: one row a step, each longer than the one before."""

    class InOrder(Trainer):
        def _get_train_sampler(self, train_dataset=None):
            return SequentialSampler(self.train_dataset)

    rows = [{"input_ids": [5] * length, "labels": [5] * length} for length in (4, 8, 16, 20, 40)]
    args = TrainingArguments(output_dir=str(folder), **{**COMMON, "per_device_train_batch_size": 1, "max_steps": 5})
    return InOrder(tiny_model(2, 32), args, collator(), train_dataset=rows, callbacks=[callback])


@pytest.mark.parametrize("share", [0.1, 0.35, 0.7])
def test_a_limit_is_passed_by_one_growing_step_at_most(tmp_path, share):
    facts = model_facts(tiny_model(2, 32))
    steps = [training_flops(facts, BatchShape(1, length)) for length in (4, 8, 16, 20, 40)]
    limit = share * sum(steps)
    callback = GovernorCallback(budget=f"{limit}flop")
    trainer = make_growing(tmp_path, callback)
    trainer.train()
    done = trainer.state.global_step
    spent = callback.ledger.spent()["flops"]
    assert spent == pytest.approx(sum(steps[:done]))
    assert spent - limit <= steps[done - 1] - max(steps[: done - 1], default=0.0)
    assert sum(steps[:done]) + steps[done - 1] > limit  # and no step that would have fitted was left out


class Counter:
    """Energy that a test sets, in joules."""

    def __init__(self):
        self.now = 0.0

    def joules(self):
        return self.now


@pytest.fixture
def no_counter(monkeypatch):
    for find in ("_nvml_counter", "_zeus_counter"):
        monkeypatch.setattr(energy, find, lambda: None)
    monkeypatch.setattr(energy, "_rapl_counter", lambda folder: None)


@pytest.mark.parametrize(("joules_a_step", "stops_at", "binding"), [(400.0, 2, "kwh"), (1.0, 4, "steps")])
def test_the_scarcer_of_two_currencies_ends_the_run(
    tmp_path, monkeypatch, no_counter, joules_a_step, stops_at, binding
):
    counter = Counter()
    monkeypatch.setattr(energy, "_nvml_counter", lambda: counter)
    callback = GovernorCallback(budget="1000J, 4steps", log_path=tmp_path / "log.jsonl")
    trainer = make(tmp_path, callback, logging_steps=1)
    step = trainer.training_step

    def spend(*args, **kwargs):
        counter.now += joules_a_step
        return step(*args, **kwargs)

    trainer.training_step = spend
    trainer.train()
    assert trainer.state.global_step == stops_at
    assert callback.stop_reason == f"budget: another step would pass the {binding} limit"
    assert callback.ledger.binding() == binding
    logged = [entry for entry in trainer.state.log_history if "eff/share_kwh" in entry]
    assert logged[-1]["eff/share_kwh"] == pytest.approx(stops_at * joules_a_step / 1000)
    assert logged[-1]["eff/share_steps"] == stops_at / 4
    assert logged[-1]["eff/kwh"] > 0
    assert GovernorLog(tmp_path / "log.jsonl").header()["run"]["energy"] == "nvml"
    assert GovernorLog(tmp_path / "log.jsonl").summary()["ended"] == callback.stop_reason


def test_two_currencies_are_governed_by_the_share_of_the_scarcer(tmp_path):
    facts = model_facts(tiny_model(2, 32))
    step = training_flops(facts, BatchShape(4, 30))
    callback = GovernorCallback(
        "marginal_gain",
        budget=f"{100 * step}flop, 1200tok",
        mode="observe",
        governor_kwargs={"num_examples": 2, "probe_share": 1.0},
        eval_dataset=tokenised(tiny_target(4)).remove_columns("source"),
        data_collator=collator(),
        log_path=tmp_path / "log.jsonl",
    )
    make(tmp_path, callback, max_steps=20).train()
    looks = GovernorLog(tmp_path / "log.jsonl").decisions()
    assert len(looks) > 2
    for look in looks:
        seen = look.telemetry
        assert seen.compute_limit == 1.0
        assert seen.compute == max(seen.spent["flops"] / (100 * step), seen.spent["tokens"] / 1200)
    assert callback.ledger.binding() == "tokens"
    assert callback.stop_reason == "budget: another step would pass the tokens limit"


def test_energy_without_a_counter_is_refused_or_estimated(tmp_path, no_counter):
    with pytest.raises(PlanError, match="nothing here counts it"):
        GovernorCallback(budget="0.5kWh")
    callback = GovernorCallback(budget="0.5kWh", power_watts=65.0, log_path=tmp_path / "log.jsonl")
    trainer = make(tmp_path, callback, max_steps=2, logging_steps=1)
    trainer.train()
    assert callback.ledger.energy_source == "estimated"
    entry = next(entry for entry in trainer.state.log_history if "eff/kwh_estimated" in entry)
    assert entry["eff/kwh_estimated"] > 0
    assert "eff/kwh" not in entry
    assert GovernorLog(tmp_path / "log.jsonl").header()["run"]["energy"] == "estimated"


def test_an_evaluation_is_paid_for_and_can_end_the_run(tmp_path):
    rows, facts = tokenised(tiny_target(8)).remove_columns("source"), model_facts(tiny_model(2, 32))
    options = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8}

    def run(name, budget, **more):
        callback = GovernorCallback(budget=budget)
        trainer = make(tmp_path / name, callback, rows, **options, **more)
        trainer.train()
        return trainer, callback

    trainer, callback = run("free", "1e30flop")
    _, first = run("first", "1e30flop", max_steps=1)
    length = max(len(row["input_ids"]) for row in rows)
    by_purpose = callback.ledger.by_purpose()
    assert by_purpose["eval"]["flops"] == 6 * forward_flops(facts, BatchShape(8, length))
    assert by_purpose["eval"]["tokens"] == 0
    trainer.evaluate()  # after the run nobody counts
    assert callback.ledger.by_purpose() == by_purpose
    step, evaluated = first.ledger.by_purpose()["train"]["flops"], by_purpose["eval"]["flops"] / 6
    trainer, callback = run("bounded", f"{2 * step + evaluated / 2}flop")  # two steps fit, but not the evaluation
    assert trainer.state.global_step == 1
    assert callback.stop_reason == "budget: another step would pass the flops limit"


def test_any_function_can_be_the_objective(tmp_path):
    def first_logit(model, batch):
        return model(input_ids=batch["input_ids"]).logits[:, 0, 0]

    numbers = iter(range(100))
    for name, objective, noise in (
        ("rows", first_logit, "examples"),
        ("number", HeldOutNumber(lambda model: next(numbers), maximise=True), "fit"),
    ):
        callback = GovernorCallback(
            "marginal_gain",
            mode="observe",
            objective=objective,
            maximise=True,
            governor_kwargs={"num_examples": 2, "probe_share": 1.0},
            eval_dataset=tokenised(tiny_target(4)).remove_columns("source"),
            data_collator=collator(),
            log_path=tmp_path / f"{name}.jsonl",
        )
        make(tmp_path / name, callback).train()
        log = GovernorLog(tmp_path / f"{name}.jsonl")
        assert log.header()["run"]["objective"]["noise"] == noise
        assert log.header()["run"]["objective"]["better"] == "larger"
        assert len(log.decisions()) > 2
    assert [look.telemetry.probe.mean for look in log.decisions()][:3] == [0.0, -1.0, -2.0]


def test_advice_is_given_and_not_taken(tmp_path):
    callback = GovernorCallback("marginal_gain", mode="advise", objective=HeldOutNumber(lambda model: 0.0))
    with pytest.warns(EffWarning, match="advises to stop: enough"):
        callback._carry_out(None, "enough")
    assert callback.stop_reason is None
