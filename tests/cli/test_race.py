"""``hf-eff race``: mistakes before anything is spent, and one real race through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from hf_eff.cli import main, race, train
from hf_eff.race import RACE, read_race

EXAMPLE = Path(__file__).parents[2] / "examples" / "race.yaml"


def settings(named, **changes):
    """A race of two runs on the toy material."""
    every = {
        "model": named[1],
        "dataset": named[3],
        "eval_dataset": named[5],
        "task": "trainer",
        "per_device_train_batch_size": 4,
        "max_steps": 50,
        "bf16": False,
    }
    runs = {"slow": {"learning_rate": 1e-6}, "fast": {"learning_rate": "3e-3"}}
    return {"budget": "8steps", "rounds": 2, "examples": 8, "epsilon": 0, "all": every, "runs": runs, **changes}


def write(folder, values):
    path = folder / "race.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


def test_the_example_is_a_race():
    plan, folder = read_race(EXAMPLE)
    assert list(plan.runs) == ["slow", "middle", "fast"]
    assert plan.shared == {"flops": 60e12}
    assert folder == "out/race"
    assert plan.runs["fast"]["model"] == "smollm2"


WRONG = {
    "option": ({"runs": {"a": {"learning_rat": 1}, "b": {}}}, "runs.a: the settings file has the unknown option"),
    "budget": ({"budget": "2 parsecs"}, "is not an amount with a unit"),
    "runs": ({"runs": {"a": {}}}, "a race needs two runs or more"),
    "target": ({"all": {"model": "m", "dataset": "d"}}, ": a race compares held-out losses; give eval_dataset"),
    "own": ({"runs": {"a": {"save_steps": 1}, "b": {}}}, "'save_steps' is decided by the race"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_one_sentence_before_any_run_starts(name, named, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "load_model", None)
    changes, sentence = WRONG[name]
    assert main(["race", write(tmp_path, settings(named, **changes)), "--output_dir", str(tmp_path / "out")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-eff: ")]
    assert len(errors) == 1
    assert sentence in errors[0]


def test_a_runs_own_limits_count_where_they_are_lower(named, tmp_path):
    changes = {"runs": {"low": {"budget": "3steps, 1GiB"}, "high": {"budget": "9steps"}}, "budget": "8steps, 2GiB"}
    plan, _ = read_race(write(tmp_path, settings(named, **changes)))
    contenders = race._Contenders(plan, tmp_path)
    budgets = {name: contenders._parsed(name)[1].budget for name in plan.runs}
    assert budgets == {"low": "3.0steps, 1073741824.0B", "high": "8.0steps, 2147483648.0B"}


def test_a_race_by_one_command_that_can_be_called_again(named, tmp_path, capsys, monkeypatch):
    words = ["race", write(tmp_path, settings(named)), "--output_dir", str(tmp_path / "out"), "--json"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["winner"] == "fast"
    assert told["winner_dir"] == str(tmp_path / "out" / "fast")
    assert told["spent"]["steps"] == 8.0
    assert {each["name"]: each["steps"] for each in told["runs"]} == {"slow": 4, "fast": 4}
    assert told["ended"].startswith("the budget is spent")
    for name in ("model.safetensors", "report.md", "settings.yaml", "_train.log"):
        assert (tmp_path / "out" / "fast" / name).is_file(), name
    before = (tmp_path / "out" / RACE).read_bytes()
    monkeypatch.setattr(train, "build_trainer", None)
    assert main(words[:-1]) == 0  # over: nothing is trained again
    table = capsys.readouterr().out
    assert "| run | steps | compute | held-out loss | why it ended |" in table
    assert table.index("| fast |") < table.index("| slow |")
    assert f"Winner: fast, in {tmp_path / 'out' / 'fast'}." in table
    assert (tmp_path / "out" / RACE).read_bytes() == before
    assert main([*words, "--budget", "9steps"]) == 1
    assert "belongs to a race with other settings" in capsys.readouterr().err
