from __future__ import annotations

import json

import pytest

from hf_eff.cli import main


def test_the_demo_runs_on_given_rows_and_writes_what_it_prints(named, tmp_path, capsys):
    words = ["demo", "--fast", *named, "--output_dir", str(tmp_path)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))
    assert (tmp_path / "demo.md").read_text(encoding="utf-8").strip() in printed
    less, random = written["less"], written["random"]
    assert written["target"] == "sum"
    assert written["chance"] == 0.5
    assert written["pool_rows"] == 24
    # Equal tokens: the second run may not pass the first one's, and stops within one step of it.
    assert 0 < random["train_tokens"] <= less["train_tokens"]
    assert less["loss_before"] == pytest.approx(random["loss_before"])
    assert less["flops"]["select"] > 0
    assert random["flops"]["select"] == 0
    assert sum(less["flops"].values()) <= float(written["budget"].removesuffix("flop"))
    for arm in (less, random):
        assert arm["loss_after"] < arm["loss_before"]
        report = tmp_path / arm["report"].removeprefix(f"{tmp_path}/")
        assert report.is_file()
        assert 0 <= arm["target_share"] <= 1
    assert (tmp_path / "less" / "governor.jsonl").is_file()


def test_own_rows_need_a_target(named, tmp_path, capsys):
    assert main(["demo", *named[:4], "--output_dir", str(tmp_path)]) == 2
    assert "--dataset needs --eval_dataset" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_finds_the_target_family_on_the_real_model(tmp_path, capsys):
    assert main(["demo", "--fast", "--output_dir", str(tmp_path), "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["less"]["target_share"] > 2 * outcome["chance"]
    assert outcome["less"]["loss_after"] < outcome["less"]["loss_before"]
