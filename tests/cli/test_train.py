from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from hf_eff.cli import main, train
from hf_eff.manifest import Selection

SHORT = ["--per_device_train_batch_size", "4", "--report_to", "none", "--max_steps", "4", "--bf16", "false"]
HALF = ["--selection", "random", "--selection_kwargs", '{"fraction": 0.5}']


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def fails(words, capsys, code=2):
    """The one sentence of a command that must fail."""
    assert main(words) == code
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-eff: ")]
    assert len(errors) == 1
    return errors[0]


def test_training_by_flags_leaves_a_whole_run_folder(named, tmp_path, capsys):
    words = ["train", *named, *SHORT, *HALF, "--budget", "1e12flop", "--output_dir", str(tmp_path / "out")]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "selection   random" in out
    assert "The run did 4 of 4 planned optimizer steps" in out
    folder = tmp_path / "out"
    for name in ("plan.json", "report.json", "report.md", "README.md", "model.safetensors", "tokenizer.json"):
        assert (folder / name).is_file(), name
    assert len(Selection.load(folder / "selection")) == 12
    assert read(folder / "plan.json")["options"]["budget"] == "1e12flop"
    assert read(folder / "report.json")["steps"] == {"planned": 4, "done": 4}
    assert main(["report", str(folder)]) == 0
    assert "## Memory at the peak" in capsys.readouterr().out


def test_a_settings_file_does_what_the_flags_do_and_flags_override_it(named, tmp_path, capsys):
    settings = {
        "model": named[1],
        "dataset": named[3],
        "selection": "random",
        "selection_kwargs": {"fraction": 0.5},
        "max_steps": 9,
        "learning_rate": "1e-3",
        "per-device-train-batch-size": 4,
        "bf16": False,
        "report_to": "none",
        "output_dir": str(tmp_path / "out"),
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert main(["train", "--config", str(path), "--max_steps", "2", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["steps"] == 2
    assert printed["output_dir"] == str(tmp_path / "out")
    plan = read(tmp_path / "out" / "plan.json")
    assert plan["options"]["selection_kwargs"] == {"fraction": 0.5}
    assert plan["facts"]["run"]["learning_rate"] == 1e-3
    assert plan["facts"]["run"]["batch_size"] == 4
    assert printed["report"] == read(tmp_path / "out" / "report.json")


def test_the_plain_trainer_trains_too(named, tmp_path, capsys):
    words = ["train", *named, *SHORT, *HALF, "--task", "trainer", "--output_dir", str(tmp_path / "out"), "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 4
    assert read(tmp_path / "out" / "plan.json")["facts"]["run"]["trainer"] == "trainer"
    assert len(Selection.load(tmp_path / "out" / "selection")) == 12


def test_training_without_any_method_is_plain_training(named, tmp_path, capsys):
    assert main(["train", *named, *SHORT, "--output_dir", str(tmp_path / "out")]) == 0
    assert "Trained 4 steps without a method or a budget" in capsys.readouterr().out
    assert not (tmp_path / "out" / "plan.json").exists()


WRONG = {
    "method": (["--selection", "randon"], "selection='randon' is not registered. Did you mean 'random'?"),
    "option": ([*HALF[:2], "--selection_kwargs", '{"fractoin": 1}'], "Did you mean 'fraction'?"),
    "json": ([*HALF[:2], "--selection_kwargs", "{"], "is not JSON"),
    "budget": (["--budget", "2 parsecs"], "is not an amount with a unit"),
    "flag": (["--selektion", "random"], "unknown option '--selektion'. Did you mean '--selection'?"),
    "value": (["--max_steps", "many"], "argument --max_steps"),
    "slots": (["--memory", "badam+mezo"], "both fill the slot 'update'"),
    "combination": (["--memory", "badam", "--optim", "sgd", "--auto_find_batch_size", "true"], "auto_find_batch_size"),
    "task": (["--task", "rlhf"], "task must be one of ['sft', 'trainer'], got 'rlhf'."),
    "columns": (["--prompt_column", "prompt"], "prompt_column and completion_column go together"),
    "optim": (["--optim", "adamw_tosh"], "adamw_tosh"),
    "bytes": (["--budget", "1KiB"], "is below the predicted peak"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_usage_error_is_one_sentence_before_weights_are_loaded(name, named, tmp_path, capsys, monkeypatch):
    def refuse(*args):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(train, "load_model", refuse)
    flags, sentence = WRONG[name]
    error = fails(["train", *named, "--output_dir", str(tmp_path), *flags], capsys)
    assert sentence in error


def test_a_missing_target_is_told_before_weights_are_loaded(named, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "load_model", None)
    words = ["train", *named[:4], "--output_dir", str(tmp_path), "--eval_strategy", "steps"]
    assert "give --eval_dataset or --eval_split" in fails(words, capsys)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "does not exist"),
        ("", "has no rows"),
        ("{broken", "cannot be read"),
        ('{"a": 1}\n', "it needs 'messages', 'prompt' and 'completion', 'text' or 'input_ids'"),
    ],
)
def test_an_unreadable_or_empty_dataset_is_one_sentence(named, tmp_path, capsys, content, sentence):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    assert sentence in fails(["train", *named[:2], "--dataset", str(path), "--output_dir", str(tmp_path)], capsys)


def test_an_unwritable_output_folder_is_one_sentence(named, tmp_path, capsys):
    (tmp_path / "file").write_text("", encoding="utf-8")
    words = ["train", *named, "--output_dir", str(tmp_path / "file" / "out")]
    assert "cannot be written" in fails(words, capsys)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read"),
        ("a: [", "is not YAML"),
        ("- a\n", "must hold 'option: value' lines, got list"),
        ("selektion: random\n", "unknown option 'selektion'. Did you mean 'selection'?"),
    ],
)
def test_a_bad_settings_file_is_one_sentence(tmp_path, capsys, content, sentence):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    assert sentence in fails(["train", "--config", str(path)], capsys)


@pytest.mark.parametrize(
    ("checkpoint", "sentence"),
    [(None, "no checkpoint was written yet"), ("checkpoint-2", "--resume_from_checkpoint last")],
)
def test_an_interrupt_says_how_to_go_on(named, tmp_path, capsys, monkeypatch, checkpoint, sentence):
    def interrupt(flags, args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "build_trainer", interrupt)
    if checkpoint:
        (tmp_path / checkpoint).mkdir()
    assert sentence in fails(["train", *named, "--output_dir", str(tmp_path)], capsys, code=130)


def test_the_resume_command_that_is_printed_resumes(named, tmp_path, capsys):
    words = [*named, *SHORT, *HALF, "--output_dir", str(tmp_path / "out"), "--save_steps", "2", "--json"]
    assert main(["train", *words]) == 0
    whole = json.loads(capsys.readouterr().out)["report"]
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    (tmp_path / "out" / "model.safetensors").unlink()
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    assert main(["train", *words, "--resume_from_checkpoint", "last"]) == 0
    resumed = json.loads(capsys.readouterr().out)["report"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
    for currency in ("flops", "tokens", "steps"):
        assert resumed["currencies"][currency]["measured"] == whole["currencies"][currency]["measured"]


@pytest.fixture
def heeds_ctrl_c():
    """A job in the background ignores SIGINT, and so would what it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_in_the_middle_of_a_run_ends_it_with_130_and_the_command_that_goes_on(named, tmp_path):
    out = tmp_path / "out"
    words = [*named, *SHORT, *HALF, "--output_dir", str(out), "--max_steps", "100000", "--save_steps", "2"]
    command = [sys.executable, "-m", "hf_eff.cli", "train", *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 240
        while not any(out.glob("checkpoint-*/trainer_state.json")) and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.2)
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    (sentence,) = [line for line in errors.splitlines() if line.startswith("hf-eff: ")]
    assert sentence.startswith("hf-eff: interrupted; go on with: hf-eff train --model")
    assert sentence.endswith("--resume_from_checkpoint last")
    assert "Traceback" not in errors
