from __future__ import annotations

import json

import pytest

from hf_eff.cli import main, sources
from hf_eff.engines.facts import model_facts
from hf_eff.testing.tiny import tiny_model

FLAGS = ["--selection", "random", "--selection_kwargs", '{"fraction": 0.5}', "--memory", "badam", "--budget", "1Tflop"]


def test_the_plan_is_printed_and_nothing_is_loaded_or_written(named, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sources, "load_model", None)
    words = ["plan", *named, *FLAGS, "--output_dir", str(tmp_path / "out")]
    assert main(words) == 0
    text = capsys.readouterr().out
    for line in ("selection   random", "memory      badam", "budget      1.00 TFLOP", "rows        12 of 24"):
        assert line in text
    assert not (tmp_path / "out").exists()
    assert main([*words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["format"] == "hf_eff.plan"
    assert plan["facts"]["model"]["params"] == model_facts(tiny_model()).params
    assert (plan["facts"]["pool"]["num_rows"], plan["facts"]["pool"]["num_reference"]) == (24, 8)


def test_the_plan_measures_lengths_in_tokens_of_the_model(named, capsys, pool, tokenizer):
    assert main(["plan", *named, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    from datasets import load_dataset

    rows = load_dataset("json", data_files=named[3], split="train")
    lengths = [len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) + 1 for row in rows]
    assert plan["facts"]["pool"]["mean_tokens"] == pytest.approx(sum(lengths) / len(lengths))
    assert plan["facts"]["pool"]["max_tokens"] == max(lengths)


def test_what_training_refuses_the_plan_refuses(named, capsys):
    assert main(["plan", *named[:4], "--selection", "less"]) == 2
    assert "eval_dataset" in capsys.readouterr().err
