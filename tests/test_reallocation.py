"""A governor's changes of rows and memory: carried out as decided, recorded, repeated bit for bit, and harmless."""

import contextlib
import itertools
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from hf_eff import BudgetedSFTConfig, BudgetedSFTTrainer
from hf_eff.engines.row_phases import rows_of_steps
from hf_eff.errors import CheckpointError, EffWarning, PlanError
from hf_eff.manifest import Selection
from hf_eff.reallocation import read_phases
from hf_eff.testing.tiny import tiny_model, tiny_pool, tiny_target, tiny_tokenizer, tokenised
from hf_eff.testing.toys import scripted
from hf_eff.testing.trial import Trial, outcome_of, registered

pytestmark = pytest.mark.filterwarnings("ignore::hf_eff.errors.OutsideIntendedUseWarning")
CHOICE = {"selection": "perplexity", "selection_kwargs": {"num_examples": 12, "band": "high"}}
ALL = "refresh+next_band+widen+memory"
SCRIPT = "3 refresh, 5 widen, 8 next_band"


@pytest.fixture(autouse=True)
def scripted_governor():
    with registered(scripted.SPEC):
        yield


def trial(folder, script=SCRIPT, *, steps=11, accumulation=1, trainer="trainer", governor=None, **arguments):
    knobs = {"script": script, "actions": ALL, "window_steps": 2, **(governor or {})}
    arguments = {**CHOICE, "governor_kwargs": knobs, **arguments}
    return Trial(scripted.SPEC, folder, trainer, accumulation, steps, arguments)


def whole(folder, script=SCRIPT, name="run", **options):
    """A trainer after its run."""
    trainer = trial(folder, script, **options).build(name)
    trainer.train()
    return trainer


def weights_of(trainer):
    return {name: each.detach().clone() for name, each in trainer.model.named_parameters()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def events_of(trainer):
    return [
        (event["action"], event["step"], event.get("from_step")) for event in trainer.budgeted_run.reallocation.events
    ]


def looks(trainer):
    lines = (Path(trainer.args.output_dir) / "governor.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == "decision"]


class Delivered(TrainerCallback):
    """Rows of each micro-batch as the model gets them, without padding."""

    def __init__(self, trainer):
        self.rows = []
        stock = trainer.training_step

        def spy(model, inputs, num_items=None):
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
                self.rows.append(tuple(ids[mask.bool()].tolist()))
            return stock(model, inputs, num_items)

        trainer.training_step = spy


# Rows


@pytest.mark.parametrize(("accumulation", "workers"), [(1, 0), (2, 2)])
def test_the_rows_of_every_step_are_those_recorded(tmp_path, accumulation, workers):
    options = {"dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0}
    trainer = trial(tmp_path, accumulation=accumulation, **options).build("run")
    delivered = Delivered(trainer)
    trainer.train()
    assert events_of(trainer) == [("refresh", 3, 4), ("widen", 5, 6), ("next_band", 8, 8)]
    phases = read_phases(tmp_path / "run")
    assert [(len(phase.rows), phase.from_step) for phase in phases.phases] == [(12, 0), (12, 4), (18, 6), (18, 8)]
    numbers = np.concatenate([rows_of_steps(phases, step) for step in range(11)])
    pool = tokenised(tiny_pool(64), tiny_tokenizer())
    assert delivered.rows == [tuple(pool[int(number)]["input_ids"]) for number in numbers]
    assert trainer.state.max_steps == 11
    assert trainer.args.max_steps == 11
    assert [look["telemetry"]["data_phase"] for look in looks(trainer)] == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 3]


def test_phases_are_selections_that_name_their_parents(tmp_path):
    trainer = whole(tmp_path)
    chosen = [Selection.load(tmp_path / "run" / "selection" / name) for name in (".", "phase-1", "phase-2", "phase-3")]
    for parent, child in itertools.pairwise(chosen):
        assert child.manifest["provenance"]["parents"] == [parent.identity]
    assert [phase["from_step"] for phase in chosen[3].manifest["selection"]["phases"]] == [0, 4, 6, 8]
    assert trainer.selection.digest == chosen[3].digest
    refreshed, wider, band = (set(each.indices.tolist()) for each in chosen[1:])
    assert refreshed != set(chosen[0].indices.tolist())  # the model has moved since
    assert refreshed < wider
    assert not band & wider
    assert min(chosen[2].scores) >= max(chosen[3].scores)
    chosen[3].verify(tokenised(tiny_pool(64), tiny_tokenizer()))


def test_a_refresh_is_charged_and_leaves_the_model_alone(tmp_path):
    still = {"learning_rate": 0.0, "weight_decay": 0.0}
    trainer = trial(tmp_path, "3 refresh", steps=7, governor={"actions": "refresh"}, **still).build("run")
    before = weights_of(trainer)
    trainer.train()
    assert same(before, weights_of(trainer))
    select = trainer.ledger.by_purpose()["select"]
    first = Selection.load(tmp_path / "run" / "selection").manifest["cost"]["flops"]
    assert select["flops"] == 2 * first > 0
    asked = looks(trainer)
    assert {look["telemetry"]["offers"][0]["fixed_cost"] for look in asked} == {first}
    choices = [look["telemetry"]["overhead_spent"] - look["telemetry"]["probe_spent"] for look in asked]
    assert choices == [0.0] * 4 + [first] * 3
    read = [look["telemetry"]["drift"] for look in asked if look["telemetry"]["drift"]]
    assert [each["correlation"] for each in read] == pytest.approx([1.0] * len(read))
    assert read
    # The same model chooses the same rows.
    assert Selection.load(tmp_path / "run" / "selection" / "phase-1").indices.tolist() == (
        Selection.load(tmp_path / "run" / "selection").indices.tolist()
    )


def test_the_pool_is_read_as_often_as_takes_no_more_than_the_probes(tmp_path):
    trainer = whole(tmp_path, "", steps=10, governor={"actions": "refresh", "drift_examples": 12})
    supervisor = trainer.budgeted_run.supervisor
    ratio = supervisor.drift.cost_flops / supervisor.probe.cost_flops
    read = [number for number, look in enumerate(looks(trainer), start=1) if look["telemetry"]["drift"]]
    assert ratio > 2
    assert read == [math.ceil(ratio * times) for times in range(1, int(10 / ratio) + 1)]
    spent = (1 + len(read)) * supervisor.drift.cost_flops + 10 * supervisor.probe.cost_flops  # one to begin with
    assert trainer.ledger.by_purpose()["probe"]["flops"] == spent
    assert supervisor.state_dict()["readings"] == {"probe": 10, "drift": len(read)}


def test_a_refresh_that_cannot_be_paid_is_not_offered_and_not_done(tmp_path):
    trainer = whole(tmp_path, "3 refresh, 4 widen", steps=6, budget="3.1e8flop", governor={"drift_examples": 2})
    (refresh, *_), (event, *_) = looks(trainer)[2]["telemetry"]["offers"], trainer.budgeted_run.reallocation.events
    assert (refresh["feasible"], refresh["why_not"]) == (False, "it would pass the flops limit")
    assert event["not_done"] == refresh["why_not"]
    assert trainer.ledger.spent()["flops"] <= 3.1e8


def test_what_the_scores_do_not_allow_is_not_offered(tmp_path):
    random = {"selection": "random", "selection_kwargs": {"num_examples": 12}}
    trainer = whole(tmp_path, "1 widen, 2 refresh", steps=4, **random)
    offers = {offer["action"]: offer for offer in looks(trainer)[0]["telemetry"]["offers"] if not offer["target"]}
    assert offers["widen"]["why_not"] == "the selection keeps no score of every row"
    assert offers["refresh"]["feasible"]
    assert events_of(trainer) == [("widen", 1, None), ("refresh", 2, 2)]
    digests = [entry["digest"] for entry in read_phases(tmp_path / "run").record()["phases"]]
    assert len(set(digests)) == 2  # drawn anew


def test_one_change_at_a_time_and_one_a_window(tmp_path):
    script = ", ".join(f"{probe} {action}" for probe, action in enumerate(["widen", "next_band"] * 3, start=1))
    trainer = whole(tmp_path, script, steps=6, selection_kwargs={"num_examples": 4, "band": "high"})
    # The decision of step 2 finds that of step 1 waiting; that of step 5 finds no window left.
    assert events_of(trainer) == [
        ("widen", 1, 2),
        ("next_band", 2, None),
        ("widen", 3, 4),
        ("next_band", 4, None),
        ("widen", 5, None),
        ("next_band", 6, None),
    ]
    reasons = [event.get("not_done") for event in trainer.budgeted_run.reallocation.events]
    waits = "widen is decided and waits for its window"
    assert reasons == [None, waits, None, waits, *["no window begins before the run ends"] * 2]


# Resuming


def test_resumed_equals_uninterrupted(tmp_path):
    scene = trial(tmp_path)
    uninterrupted = scene.whole()
    # Decided and waiting, inside a window and at its end; in the middle of a later phase.
    assert {step: scene.interrupted(step).differences(uninterrupted) for step in (3, 4, 7)} == {3: [], 4: [], 7: []}


class Killed(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("trainer", ["trainer", "sft"])
def test_killed_after_a_change_that_no_checkpoint_saw(tmp_path, trainer):
    scene = trial(tmp_path, trainer=trainer, accumulation=2, steps=9)
    uninterrupted = scene.whole()
    first = scene.build("killed", save_strategy="steps", save_steps=3)
    first.add_callback(Killed(5))
    with contextlib.suppress(KeyboardInterrupt):
        first.train()
    assert (tmp_path / "killed" / "selection" / "phase-1").is_dir()
    second = scene.build("killed", save_strategy="steps", save_steps=3)
    second.train(resume_from_checkpoint=True)
    assert outcome_of(second).differences(uninterrupted) == []


def test_another_batch_size_or_manifest_does_not_resume(tmp_path):
    scene = trial(tmp_path, "1 widen", steps=4)
    first = scene.build("run", save_strategy="steps", save_steps=2)
    first.train()
    other = scene.build("run", per_device_train_batch_size=4)
    with pytest.raises(CheckpointError, match="ordered with rows_per_step=8 and this run has 4"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    Selection.load(tmp_path / "run" / "selection").save(tmp_path / "run" / "selection" / "phase-1")
    again = scene.build("run")
    with pytest.raises(CheckpointError, match="not the one of data phase 1"):
        again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))


# Modes


def test_observing_changes_no_bit(tmp_path):
    script = "2 refresh, 3 widen, 4 switch_memory checkpointing off, 5 cooldown, 6 stop"
    observed = whole(tmp_path, script, "observed", steps=8, governor_mode="observe")
    idle = whole(tmp_path, "", "idle", steps=8, governor_mode="observe")
    assert same(weights_of(observed), weights_of(idle))
    assert [look["action"] for look in looks(observed)][1:6] == [
        "refresh",
        "widen",
        "switch_memory",
        "cooldown",
        "stop",
    ]
    assert observed.state.global_step == 8
    none = Trial(scripted.SPEC, tmp_path, max_steps=8, arguments={**CHOICE, "governor": "none", "governor_kwargs": {}})
    none = none.build("none")
    none.train()
    plain = whole(tmp_path, "2 stop", "plain", steps=8, governor_mode="observe", governor={"actions": "memory"})
    assert same(weights_of(plain), weights_of(none))


def test_advice_is_given_once_for_each_action(tmp_path):
    script = "1 refresh, 2 refresh, 3 switch_memory checkpointing off, 4 widen, 5 refresh"
    trainer = trial(tmp_path, script, steps=6, governor_mode="advise").build("run")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        trainer.train()
    told = [str(each.message) for each in heard if isinstance(each.message, EffWarning)]
    assert [text.partition(": ")[0] for text in told if "advises" in text] == [
        "at step 1 the governor advises to refresh",
        "at step 3 the governor advises to switch_memory checkpointing off",
        "at step 4 the governor advises to widen",
    ]
    assert trainer.budgeted_run.reallocation.events == []


# Refused beforehand


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"selection": "all", "selection_kwargs": {}}, "changes which rows are chosen, and none are; set selection="),
        ({"governor_kwargs": {"actions": "refresh+dance"}}, "actions names 'dance'"),
        ({"governor_kwargs": {"cooldown": 0.2}, "lr_scheduler_type": "cosine"}, "use lr_scheduler_type='constant_"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, changes, sentence):
    with pytest.raises(PlanError, match=sentence):
        trial(tmp_path, **changes).build("run")


@pytest.mark.parametrize("flag", ["packing", "padding_free"])
def test_joined_rows_are_refused(tmp_path, flag):
    args = BudgetedSFTConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        max_length=64 if flag == "packing" else None,
        governor="scripted",
        governor_kwargs={"actions": "widen"},
        **{flag: True},
        **CHOICE,
    )
    with pytest.raises(PlanError, match=f"{flag}=True has joined rows before it; set {flag}=False"):
        BudgetedSFTTrainer(
            model=tiny_model(2, 32),
            args=args,
            train_dataset=tiny_pool(16),
            eval_dataset=tiny_target(),
            processing_class=tiny_tokenizer(),
        )
