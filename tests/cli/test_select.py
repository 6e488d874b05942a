from __future__ import annotations

import json
import math

import pytest
from datasets import load_dataset

from hf_eff.cli import main
from hf_eff.manifest import Selection
from hf_eff.testing.tiny import tiny_model

LESS = ["--selection", "less", "--selection_kwargs", '{"num_examples": 6, "dims": 32, "warmup_epochs": 1}']


def test_a_manifest_is_written_that_fits_the_dataset(named, tmp_path, capsys):
    assert main(["select", *named, *LESS, "--output_dir", str(tmp_path), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    selection = Selection.load(tmp_path)
    rows = load_dataset("json", data_files=named[3], split="train")
    assert summary["rows"] == "6 of 24"
    assert summary["digest"] == selection.digest
    assert summary["manifest"] == str(tmp_path / "manifest.json")
    assert sum(summary["sources"].values()) == len(selection.apply(rows)) == 6
    assert selection.manifest["selection"]["method"] == "less"


def test_equal_seeds_give_equal_manifests_and_others_do_not(named, tmp_path, capsys):
    digests = []
    for seed, folder in ((1, "a"), (1, "b"), (2, "c")):
        words = ["select", *named[:4], "--selection", "random", "--selection_kwargs", '{"num_examples": 6}']
        assert main([*words, "--seed", str(seed), "--output_dir", str(tmp_path / folder), "--json"]) == 0
        digests.append(json.loads(capsys.readouterr().out)["digest"])
    assert digests[0] == digests[1] != digests[2]


def test_a_settings_file_gives_options_as_yaml(named, tmp_path, capsys):
    path = tmp_path / "select.yaml"
    path.write_text("selection: random\nselection_kwargs:\n  fraction: 0.25\n", encoding="utf-8")
    assert main(["select", *named[:4], "--config", str(path), "--output_dir", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "rows        6 of 24" in out
    assert f"manifest    {tmp_path / 'out' / 'manifest.json'}" in out


@pytest.mark.parametrize(
    ("flags", "code", "sentence"),
    [
        (["--selection", "lesss"], 2, "Did you mean 'less'?"),
        (["--selection", "random", "--selection_kwargs", '{"fraction": 2}'], 2, "must be in [0.0, 1.0]"),
        (["--selection", "random", "--selection_kwargs", "[1]"], 2, "must be a mapping"),
        (["--selection", "random", "--selection_kwargs", '{"num_examples": 99}'], 2, "more than the 24 valid rows"),
        (["--selection", "less"], 2, "needs target rows; give --eval_dataset or --eval_split."),
        ([*LESS, "--eval_dataset", "TARGET", "--budget", "1flop"], 1, "spent"),
    ],
)
def test_what_cannot_be_selected_is_one_sentence(named, tmp_path, capsys, flags, code, sentence):
    flags = [named[5] if word == "TARGET" else word for word in flags]
    assert main(["select", *named[:4], "--output_dir", str(tmp_path), *flags]) == code
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-eff: ")]
    assert len(errors) == 1
    assert sentence in errors[0]
    assert not (tmp_path / "manifest.json").exists()


def test_text_needs_a_tokenizer(named, tmp_path, capsys):
    words = ["select", *named[2:4], "--selection", "random", "--output_dir", str(tmp_path)]
    assert main(words) == 2
    assert "needs --model" in capsys.readouterr().err


# dry run


def dry(named, capsys, *flags):
    assert main(["select", *named, "--dry-run", "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_dry_run_predicts_what_selecting_spends_and_writes_nothing(named, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    facts = dry(named, capsys, *LESS)
    assert not list(tmp_path.iterdir())
    assert main(["select", *named, *LESS, "--output_dir", "out", "--json"]) == 0
    spent = json.loads(capsys.readouterr().out)["flops"]
    assert facts["selection_flops"] == pytest.approx(spent, rel=0.35)  # rows are padded, and few
    assert (facts["rows"], facts["selected_rows"], facts["selection"]) == (24, 6, ["less"])


def test_a_dry_run_says_when_selecting_pays(named, capsys):
    facts = dry(named, capsys, *LESS)
    selecting, training = facts["selection_flops"], facts["training_flops"]
    assert facts["break_even_uses"] == pytest.approx(selecting / (training * 0.5))
    assert facts["needed_speedup"] == pytest.approx(1 + selecting / training)
    assert facts["pays"] is (facts["break_even_uses"] < 1)
    more = dry(named, capsys, *LESS, "--train_epochs", "300")
    assert more["training_flops"] == pytest.approx(100 * training)
    assert more["pays"]


def test_a_larger_model_to_train_makes_the_same_choice_pay_sooner(named, tmp_path, capsys):
    tiny_model(layers=8, width=128).save_pretrained(tmp_path / "large")
    small, large = dry(named, capsys, *LESS), dry(named, capsys, *LESS, "--train_model", str(tmp_path / "large"))
    assert large["selection_flops"] == small["selection_flops"]
    assert large["training_flops"] > 3 * small["training_flops"]


def test_a_dry_run_applies_the_cap(named, capsys):
    kwargs = json.dumps({"fraction": 0.25, "max_selection_fraction": 0.01})
    facts = dry(named, capsys, "--selection", "perplexity", "--selection_kwargs", kwargs)
    assert (facts["selection"], facts["selection_flops"]) == (["random"], 0.0)
    assert "more than the max_selection_fraction=0.01 allowed; balanced random rows" in facts["notes"][0]


def test_a_dry_run_for_people(named, capsys):
    assert main(["select", *named, *LESS, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "rows        6 of 24" in out
    assert "verdict     selection " in out


def test_trainings_done_before_give_the_speedup(named, tmp_path, capsys):
    path = tmp_path / "runs.jsonl"
    lines = [
        {"selection": name, "flops": 1e15 * share, "value": 0.4 + 0.3 * (1 - math.exp(-rate * share))}
        for name, rate in (("less", 9.0), ("random", 3.0))
        for share in (0.1, 0.3, 0.6, 1.0)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    facts = dry(named, capsys, *LESS, "--measured", str(path))
    assert facts["expected_speedup"] == pytest.approx(3.0, rel=0.02)
    path.write_text(json.dumps(lines[0]))
    assert main(["select", *named, *LESS, "--dry-run", "--measured", str(path)]) == 2
    assert "holds no usable trainings" in capsys.readouterr().err


def test_flags_of_a_dry_run_are_refused_without_one(named, tmp_path, capsys):
    assert main(["select", *named, *LESS, "--output_dir", str(tmp_path / "out"), "--train_model", "large"]) == 2
    assert "--train_model say what a dry run compares with; add --dry-run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
