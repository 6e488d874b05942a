from __future__ import annotations

import json

import pytest

from hf_eff.cli import main, sources
from hf_eff.profile import profile_memory
from hf_eff.registry import list_methods
from hf_eff.testing.tiny import tiny_config


def test_the_table_is_the_one_of_the_python_function(material, capsys, monkeypatch):
    monkeypatch.setattr(sources, "load_model", None)  # no weights
    words = ["profile", "--model", str(material / "model"), "--batch_size", "3", "--max_length", "40"]
    assert main([*words, "--memory", "full,badam"]) == 0
    expected = profile_memory(tiny_config(), memory=["full", "badam"], batch_size=3, max_length=40)
    assert capsys.readouterr().out.strip() == str(expected).strip()
    assert main([*words, "--memory", "full,badam", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == expected.to_dict()


def test_all_methods_are_compared_by_default(material, capsys):
    assert main(["profile", "--model", str(material / "model"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["memory"] for row in rows] == list_methods("memory")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--memory", "badan"], "Did you mean 'badam'?"),
        (["--model", "no/where"], "cannot be loaded"),
        (["--batch_size", "0"], "must both be at least 1"),
        (["--batch_size", "x"], "argument --batch_size"),
    ],
)
def test_what_cannot_be_profiled_is_one_sentence(material, capsys, flags, sentence):
    assert main(["profile", "--model", str(material / "model"), *flags]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-eff: ")]
    assert len(errors) == 1
    assert sentence in errors[0]
