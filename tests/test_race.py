"""Several runs under one budget: the budget is never passed, and a killed race ends as an uninterrupted one does."""

from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_eff.contracts.budget import Budget
from hf_eff.errors import CheckpointError, DataError, OptionError, PlanError
from hf_eff.race import RACE, Advance, Race, RacePlan, RaceRecord, Reading, RunRecord, Slice, fence, read_race
from hf_eff.race.standings import best_rate, judge, outlook_of, threshold

TWO = {"a": {}, "b": {}}


def plan_of(limits, runs=TWO, **more):
    return RacePlan(budget=Budget(limits), runs=runs, **more)


# The threshold and the verdicts


def test_the_threshold_rises_from_the_lowest_density_over_e_to_the_best():
    for z in (0.0, 0.3, 0.9, 1.0):
        upper, lower = 5.0, 0.02 * 5.0
        assert threshold(z, upper, 0.02) == pytest.approx((upper * math.e / lower) ** z * lower / math.e)
    assert threshold(0.0, 5.0, 0.02) == pytest.approx(0.1 / math.e)
    assert threshold(1.0, 5.0, 0.02) == pytest.approx(5.0)
    assert threshold(0.5, 5.0, 0.0) == threshold(0.5, 0.0, 0.02) == 0.0


def curve(name, loss, upto, count=8, noise=0.0, ended=""):
    """A run with readings of a known loss at equal steps of compute."""
    generator, readings, before = random.Random(name), [], None
    for place in range(count):
        position = upto * place / (count - 1)
        now = loss(position) + generator.gauss(0.0, noise)
        delta = None if before is None else before - now
        readings.append(Reading(place, position, now, delta, noise, None if place == 0 else 1e-3))
        before = now
    return RunRecord(name, steps=count - 1, spent={"steps": 100.0 * upto}, readings=readings, ended=ended)


def verdicts(*runs, spent=0.4, best=0.0, **more):
    """Verdict of each run, most of the budget being spent elsewhere."""
    plan = plan_of({"steps": 100.0}, {run.name: {} for run in runs}, **more)
    record = RaceRecord(plan.digest, plan.shared, {run.name: run for run in runs}, best_rate=best)
    held = sum(run.spent["steps"] for run in runs)
    record.runs[runs[0].name].reading_spent["steps"] = 100.0 * spent - held
    return {each.name: each.verdict for each in judge(plan, record)}


def test_a_run_that_cannot_catch_up_is_dominated_and_one_that_may_is_not():
    good = curve("good", lambda c: 1.0 + math.exp(-c / 0.05), 0.2, noise=0.002)
    flat = curve("flat", lambda c: 1.9 + 0.1 * math.exp(-c / 0.03), 0.2, noise=0.002)
    falling = curve("falling", lambda c: 3.0 - 4.0 * c, 0.2, noise=0.002)
    found = verdicts(good, flat, falling, spent=0.65)
    assert found["good"] == ""
    assert found["flat"].startswith("dominated by ")
    assert found["falling"] == ""
    assert verdicts(good, flat, falling, spent=0.999)["falling"].startswith("dominated by good")  # nothing is left


def test_a_run_that_ended_is_still_in_the_lead_and_gets_no_verdict():
    ended = curve("ended", lambda c: 1.0, 0.1, ended="all its steps are done")
    flat = curve("flat", lambda c: 2.0 + 0.1 * math.exp(-c / 0.02), 0.2, noise=0.001)
    found = verdicts(ended, flat)
    assert found["ended"] == ""
    assert found["flat"].startswith("dominated by ended")


def test_an_index_below_the_shared_threshold_stops_even_the_leader():
    leader = curve("leader", lambda c: 1.0 + math.exp(-c / 0.05), 0.3, noise=0.001)
    other = curve("other", lambda c: 1.2 + math.exp(-c / 0.05), 0.05, count=3)
    assert verdicts(leader, other, best=20.0)["leader"].startswith("gain rate")
    assert verdicts(leader, other, best=20.0, epsilon=0.0)["leader"] == ""
    assert verdicts(leader, other, best=20.0, delta=0.0)["leader"] == ""
    steep = curve("steep", lambda c: 5.0 - 10.0 * c, 0.3, noise=0.001)
    assert verdicts(steep, other, best=20.0)["steep"] == ""


def test_few_readings_are_no_verdict_but_a_loss_that_is_not_finite_is():
    young = curve("young", lambda c: 9.0, 0.1, count=4)
    broken = curve("broken", lambda c: 2.0, 0.1, count=3)
    broken.readings[-1] = Reading(2, 0.1, None, None, None, 1e-3)
    assert verdicts(young, broken) == {"young": "", "broken": "held-out loss is not finite"}


def test_readings_that_skip_a_loss_are_fitted_without_it():
    whole = curve("whole", lambda c: 1.0 + math.exp(-c / 0.05), 0.2, count=9)
    whole.readings[3] = Reading(3, whole.readings[3].position, None, None, None, 1e-3)
    assert outlook_of(whole.readings) is not None
    assert outlook_of(whole.readings[:4]) is None


def test_the_best_rate_is_the_steepest_piece():
    runs = [curve("a", lambda c: 3.0 - 4.0 * c, 0.2), curve("b", lambda c: 3.0 - 6.0 * c**2, 0.2)]
    assert best_rate(runs) == pytest.approx(4.0)
    assert best_rate([curve("c", lambda c: 1.0 + c, 0.2)]) == 0.0
    assert best_rate([RunRecord("d")]) == 0.0


def test_the_lowest_loss_wins_but_not_a_run_that_failed():
    runs = {
        name: curve(name, lambda c, level=level: level, 0.1) for name, level in zip("abc", (2.0, 1.0, 3.0), strict=True)
    }
    record = RaceRecord("x", {"steps": 1.0}, runs)
    assert record.winner.name == "b"
    runs["b"].failed = True
    assert record.winner.name == "a"
    assert RaceRecord("x", {"steps": 1.0}, {"a": RunRecord("a")}).winner is None


# The fence


def test_the_gate_closes_at_the_fence_and_shows_the_whole_budget():
    gate = Slice({"flops": 100.0, "tokens": 50.0}, {"flops": 60.0})
    assert gate.limits == {"flops": 100.0, "tokens": 50.0}
    assert gate.first_passed({"flops": 50.0}, {"flops": 10.0}) is None
    assert gate.first_passed({"flops": 50.0}, {"flops": 10.5}) == "flops"
    assert gate.first_passed({"tokens": 50.0}, {"tokens": 1.0}) == "tokens"
    assert gate.is_fence("flops")
    assert not gate.is_fence("tokens")
    assert not Slice({"flops": 100.0}, {"flops": 100.0}).is_fence("flops")
    assert gate.share({"flops": 50.0}) == 0.5


def test_a_fence_keeps_the_turn_and_leaves_room_for_readings():
    assert fence({"flops": 40.0}, {"flops": 30.0}, {"flops": 100.0}, {"flops": 2.0}) == {"flops": 40.0}
    assert fence({"flops": 40.0}, {"flops": 30.0}, {"flops": 7.0}, {"flops": 2.0}) == {"flops": 35.0}


# The loop, on runs that cost what a random number says


class Stub:
    """Runs whose steps, readings and selections cost random whole amounts; some end, some break."""

    def __init__(self, seed):
        draw = random.Random(seed)
        self.names = [f"r{number}" for number in range(draw.randint(2, 3))]
        self.rate = {name: draw.choice([0.5, 3.0, 20.0]) for name in self.names}
        self.steps = {name: draw.choice([3, 30, 1000]) for name in self.names}
        self.breaks = {name: draw.choice([None, None, None, 5]) for name in self.names}
        self.select = {name: draw.choice([0, 0, 7]) for name in self.names}
        self.largest = draw.randint(1, 30)
        self.reading = draw.randint(0, 4)
        self.seed = seed
        limits = {"flops": float(draw.randint(20, 2000))}
        if draw.random() < 0.4:
            limits["tokens"] = float(draw.randint(20, 2000))
        more = {"rounds": draw.randint(1, 6), "epsilon": draw.choice([0.0, 0.02])}
        self.plan = plan_of(limits, {name: {} for name in self.names}, **more)
        self.turns = []
        self.paid = dict.fromkeys(limits, 0.0)

    def cost(self, name, step):
        draw = random.Random(f"{self.seed} {name} {step}")
        return {each: float(draw.randint(1, self.largest)) for each in self.plan.shared}

    def read(self, run, step, spent, before):
        position = self.plan.budget.share(spent)
        now = 1.0 + 2.0 * math.exp(-self.rate[run.name] * position)
        delta = None if before is None else before - now
        return Reading(step, position, now, delta, 0.01, 1e-3 if step else None)

    def __call__(self, run, until, left):
        assert not run.ended
        self.turns.append(run.name)
        done = self.advance(run, until, left)
        for name in self.paid:
            new = done.spent.get(name, 0.0) - run.spent.get(name, 0.0)
            self.paid[name] += new + done.reading_spent.get(name, 0.0)
        return done

    def advance(self, run, until, left):
        once = dict.fromkeys(self.plan.shared, float(self.reading))
        count = 1 if run.readings else 2
        gate = Slice(self.plan.budget.limits, fence(until, run.spent, left, {k: count * v for k, v in once.items()}))
        if any(limit <= run.spent.get(name, 0.0) for name, limit in gate.until.items()):
            return Advance(run.steps, run.spent)
        readings = [] if run.readings else [self.read(run, 0, {}, None)]
        before = [*run.readings, *readings][-1].mean
        spent, step = dict(run.spent or dict.fromkeys(self.plan.shared, 0.0)), run.steps
        paid = dict.fromkeys(self.plan.shared, float(self.reading * len(readings)))
        need = dict.fromkeys(self.plan.shared, float(self.select[run.name]))
        if step == 0 and any(need.values()):
            if gate.first_passed(spent, need):
                return Advance(0, spent, paid, tuple(readings), ended="failed", failed=True)
            spent = {name: spent[name] + need[name] for name in spent}
        while step < self.steps[run.name] and gate.first_passed(spent, self.cost(run.name, step)) is None:
            spent = {name: amount + self.cost(run.name, step)[name] for name, amount in spent.items()}
            step += 1
            if step == self.breaks[run.name]:
                return Advance(run.steps, spent, paid, tuple(readings), ended="failed", failed=True)
        if step == run.steps:
            ended = "failed" if step == 0 and any(spent.values()) else ""
            return Advance(step, spent, paid, tuple(readings), ended=ended, failed=bool(ended))
        readings.append(self.read(run, step, spent, before))
        paid = {name: amount + self.reading for name, amount in paid.items()}
        ended = "done" if step == self.steps[run.name] else ""
        return Advance(step, spent, paid, tuple(readings), None, f"checkpoint-{step}", ended)


class Disk:
    """The race's file in memory: a real one, flushed after every turn, would take most of the time."""

    def __init__(self, patch):
        self.text, self.keeps = None, True
        real = RaceRecord.write, RaceRecord.read.__func__
        patch.setattr("hf_eff.race.record.write_json", self.dump)
        patch.setattr("hf_eff.race.runner.require_writable", lambda path: path)
        patch.setattr(RaceRecord, "write", lambda record, path: real[0](record, path) if self.keeps else None)
        patch.setattr(RaceRecord, "read", classmethod(lambda cls, path: real[1](cls, self)))

    def dump(self, path, value):
        self.text = json.dumps(value, sort_keys=True)

    def __truediv__(self, name):
        return self

    def is_file(self):
        return self.text is not None

    def read_text(self, encoding):
        return self.text


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


class Killed(Exception):
    """The process is gone."""


def raced(stub, folder, kills=()):
    """The end of a race whose process dies at some turns, before or after the turn did its work."""
    count = 0

    def turn(run, until, left):
        nonlocal count
        count += 1
        if count in kills:
            if count % 2:
                stub(run, until, left)
            raise Killed
        done = stub(run, until, left)
        for name, amount in done.spent.items():
            reading = done.reading_spent.get(name, 0.0)
            assert amount <= until[name]
            assert amount - run.spent.get(name, 0.0) + reading <= left[name]
        return done

    while True:
        race = Race(stub.plan, folder)
        try:
            return race.run(turn, show_progress=False)
        except Killed:
            continue


def test_the_shared_budget_is_never_passed(disk, tmp_path):
    disk.keeps = False

    @settings(max_examples=1000, deadline=None)
    @given(seed=st.integers(0, 2**32))
    def law(seed):
        stub = Stub(seed)
        record = raced(stub, tmp_path)
        assert all(stub.paid[name] <= limit for name, limit in stub.plan.shared.items())
        assert record.total() == stub.paid
        assert record.ended
        assert len(stub.turns) < 60

    law()


@pytest.mark.parametrize("seed", range(60))
def test_a_race_killed_anywhere_ends_as_an_uninterrupted_one(disk, tmp_path, seed):
    stub = Stub(seed)
    raced(stub, tmp_path)
    whole, turns = disk.text, len(stub.turns)
    disk.text = None
    raced(Stub(seed), tmp_path, kills=random.Random(seed).sample(range(1, turns + 3), 2))
    assert disk.text == whole


def test_live_runs_stand_at_equal_compute_and_what_losers_leave_goes_to_the_rest(disk, tmp_path):
    stub = Stub(3)
    stub.names = ["bad", "good"]
    stub.plan = plan_of({"flops": 10000.0}, {"bad": {}, "good": {}}, rounds=10, epsilon=0.0)
    stub.rate, stub.steps = {"bad": 0.01, "good": 20.0}, dict.fromkeys(stub.names, 10**6)
    stub.breaks, stub.select, stub.largest, stub.reading = (
        dict.fromkeys(stub.names),
        dict.fromkeys(stub.names, 0),
        20,
        4,
    )
    record = raced(stub, tmp_path)
    bad, good = record.runs["bad"], record.runs["good"]
    assert bad.ended.startswith("dominated by good")
    assert record.winner is good
    for before, now in zip(bad.readings, good.readings, strict=False):
        assert abs(before.position - now.position) * 10000.0 <= stub.largest
    assert good.position > 0.7
    assert record.ended.startswith("the budget is spent")
    assert record.total()["flops"] > 10000.0 - 3 * stub.largest


def test_the_last_round_is_shared_evenly_too(disk, tmp_path):
    stub = Stub(3)
    stub.names = ["a", "b", "c"]
    stub.plan = plan_of({"flops": 1000.0}, {"a": {}, "b": {}, "c": {}}, rounds=2, epsilon=0.0, margin=99.0)
    stub.rate, stub.steps = dict.fromkeys(stub.names, 3.0), dict.fromkeys(stub.names, 10**6)
    stub.breaks, stub.select = dict.fromkeys(stub.names), dict.fromkeys(stub.names, 0)
    stub.largest, stub.reading = 2, 20
    record = raced(stub, tmp_path)
    spent = [run.spent["flops"] for run in record.runs.values()]
    assert max(spent) - min(spent) <= 3 * stub.largest


# What is refused


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "cannot be read"),
        ("a: [", "is not YAML"),
        ("- a", "must hold 'option: value' lines, got list"),
        ("bugdet: 2h", "no option 'bugdet'. Did you mean 'budget'?"),
        ("runs: [a, b]\nbudget: 2h", "runs must hold"),
        ("runs: {a: , b: 3}\nbudget: 2h", "runs.b must hold"),
        ("runs: {a: , b: }", "needs a budget that adds up"),
        ("runs: {a: , b: }\nbudget: 2GiB", "needs a budget that adds up"),
        ("runs: {a: }\nbudget: 2h", "needs two runs or more"),
        ("runs: {a: , ../b: }\nbudget: 2h", "a run's name is a folder's name"),
        ("runs: {a: , b: {save-steps: 3}}\nbudget: 2h", "'save-steps' is decided by the race"),
        ("runs: {a: , b: }\nall: {output_dir: x}\nbudget: 2h", "'output_dir' is decided by the race"),
        ("runs: {a: , b: }\nbudget: 2h\nrounds: 0", "rounds must be a number of at least 1, got 0"),
        ("runs: {a: , b: }\nbudget: 2h\nrounds: 2.5", "rounds must be a number"),
        ("runs: {a: , b: }\nbudget: 2h\nepsilon: 2", "epsilon and delta are at most 1"),
        ("runs: {a: , b: }\nbudget: 2h\nmargin: .nan", "margin must be a number"),
    ],
)
def test_a_wrong_settings_file_is_one_sentence(tmp_path, text, sentence):
    path = tmp_path / "race.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(OptionError) as caught:
        read_race(path)
    assert sentence in str(caught.value)


def test_settings_of_all_runs_are_overridden_by_a_runs_own(tmp_path):
    path = tmp_path / "race.yaml"
    path.write_text("budget: 9steps\noutput_dir: x\nall: {seed: 1, model: m}\nruns: {a: {seed: 2}, b: }\nrounds: 3")
    plan, folder = read_race(path, "4steps, 2GiB")
    assert (plan.runs, folder) == ({"a": {"seed": 2, "model": "m"}, "b": {"seed": 1, "model": "m"}}, "x")
    assert plan.shared == {"steps": 4.0}
    assert plan.budget.limits["bytes"] == 2.0 * 2**30
    assert plan.slice_share == pytest.approx(1 / 6)
    assert read_race(path)[0].digest != plan.digest


def test_a_folder_with_another_race_is_refused(tmp_path):
    Race(plan_of({"steps": 10.0}), tmp_path)
    Race(plan_of({"steps": 10.0}), tmp_path)
    with pytest.raises(CheckpointError, match="other settings"):
        Race(plan_of({"steps": 11.0}), tmp_path)
    (tmp_path / RACE).write_text("{}")
    with pytest.raises(CheckpointError, match="is no record of a race"):
        Race(plan_of({"steps": 10.0}), tmp_path)


def test_runs_that_are_read_on_different_rows_are_refused(tmp_path):
    def turn(run, until, left):
        return Advance(1, {"steps": 1.0}, {}, (), {"examples": run.name}, "checkpoint-1")

    with pytest.raises(DataError, match="the same held-out rows"):
        Race(plan_of({"steps": 10.0}), tmp_path).run(turn, show_progress=False)


# Real trainers


def trainer_of(folder, learning_rate=3e-3, budget="16steps", **more):
    import torch
    from transformers import TrainerCallback

    from hf_eff import BudgetedTrainer, BudgetedTrainingArguments
    from hf_eff.testing.tiny import collator, tiny_model, tiny_pool, tiny_target, tokenised

    class StopAt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == more.get("stop"):
                control.should_training_stop = True

    options = {key: value for key, value in more.items() if key != "stop"}
    args = BudgetedTrainingArguments(
        output_dir=str(folder),
        budget=budget,
        learning_rate=learning_rate,
        use_cpu=not torch.accelerator.is_available(),
        **{
            "per_device_train_batch_size": 4,
            "max_steps": 100,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "steps",
            "save_steps": 10**9,
            **options,
        },
    )
    return BudgetedTrainer(
        model=tiny_model(2, 32),
        args=args,
        train_dataset=tokenised(tiny_pool(24)),
        eval_dataset=tokenised(tiny_target(8)),
        data_collator=collator(),
        callbacks=[StopAt()],
    )


def comparable(folder):
    """``race.json`` without what a clock decides."""
    values = json.loads((folder / RACE).read_text())
    for run in values["runs"].values():
        run["reading_spent"].pop("seconds", None)
    return values


def test_a_real_race_killed_in_the_middle_ends_as_an_uninterrupted_one(tmp_path):
    from hf_eff.race import advance

    plan = plan_of({"steps": 16.0}, {"slow": {}, "fast": {}}, rounds=2, examples=8, epsilon=0.0)
    rates = {"slow": 1e-6, "fast": 3e-3}

    def race(folder, kill=None):
        turns = 0

        def turn(run, until, left):
            nonlocal turns
            turns += 1
            # The slow one falls with a schedule over the whole budget, which slices must not bend.
            kind = {"lr_scheduler_type": "linear" if run.name == "fast" else "constant"}
            done = advance(trainer_of(folder / run.name, rates[run.name], **kind), plan, run, until, left)
            if turns == kill:
                raise KeyboardInterrupt  # trained and saved, yet not written down
            return done

        return Race(plan, folder).run(turn, show_progress=False)

    whole = race(tmp_path / "whole")
    assert whole.winner.name == "fast"
    assert {run.steps for run in whole.runs.values()} == {8}
    assert whole.total()["steps"] == 16.0
    assert [reading.step for reading in whole.runs["fast"].readings] == [0, 4, 8]
    with pytest.raises(KeyboardInterrupt):
        race(tmp_path / "cut", kill=3)
    assert {path.name for path in (tmp_path / "cut" / "slow").glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8"}
    race(tmp_path / "cut")
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")
    for name in rates:
        weights = [(tmp_path / each / name / "model.safetensors").read_bytes() for each in ("whole", "cut")]
        assert weights[0] == weights[1]
    report = json.loads((tmp_path / "whole" / "fast" / "report.json").read_text())
    assert report["binding"]["stopped_by"] == "race"
    alone = trainer_of(tmp_path / "alone", rates["fast"], stop=8, lr_scheduler_type="linear")
    alone.train()
    alone.save_model()
    assert (tmp_path / "alone" / "model.safetensors").read_bytes() == weights_of(tmp_path / "whole" / "fast")


def weights_of(folder):
    return (folder / "model.safetensors").read_bytes()


def test_a_run_that_breaks_or_has_a_lower_limit_of_its_own_is_an_outcome(tmp_path):
    from hf_eff.race import advance

    plan = plan_of({"steps": 16.0}, rounds=2, examples=8)
    until, left = {"steps": 8.0}, {"steps": 16.0}
    own = advance(trainer_of(tmp_path / "own", budget="2steps"), plan, RunRecord("a"), until, left)
    assert (own.steps, own.ended, own.failed) == (2, "its own limit of steps is reached", False)
    done = advance(trainer_of(tmp_path / "done", max_steps=1), plan, RunRecord("a"), until, left)
    assert (done.steps, done.ended) == (1, "all its steps are done")
    broken = advance(trainer_of(tmp_path / "broken", learning_rate=1e30), plan, RunRecord("a"), until, left)
    assert broken.failed
    assert broken.ended.startswith("failed: TrainingDivergedError")
    assert broken.spent["steps"] > 0  # what is lost is paid, too
    nothing = advance(trainer_of(tmp_path / "none"), plan, RunRecord("a"), {"steps": 0.0}, left)
    assert (nothing.steps, nothing.readings, nothing.ended) == (0, (), "")
    cooling = {"governor": "marginal_gain", "governor_kwargs": {"cooldown": 0.1}, "lr_scheduler_type": "constant"}
    with pytest.raises(PlanError, match="race with cooldown=0"):
        advance(trainer_of(tmp_path / "cooling", **cooling), plan, RunRecord("a"), until, left)
    dear = plan_of({"flops": 1e6}, rounds=2, examples=8)
    with pytest.raises(PlanError, match="a reading of 8 held-out examples costs"):
        advance(trainer_of(tmp_path / "dear"), dear, RunRecord("a"), {"flops": 5e5}, {"flops": 1e6})
