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


def test_flags_are_the_arguments_of_the_function(material, capsys, tmp_path):
    words = ["profile", "--model", str(material / "model"), "--memory", "lora, lora+checkpointing,fused", "--json"]
    flags = ["--budget", "2MiB", "--dtype", "bfloat16", "--optim", "sgd", "--world_size", "2", "--backend", "ddp"]
    flags += ["--device", "cuda", "--max_grad_norm", "0", "--memory_kwargs", '{"r": 4}', "--max_length", "64"]
    figure = tmp_path / "memory.svg"
    assert main([*words, *flags, "--figure", str(figure)]) == 0
    expected = profile_memory(
        tiny_config(),
        memory=["lora", "lora+checkpointing", "fused"],
        max_length=64,
        budget="2MiB",
        memory_kwargs={"r": 4},
        dtype="bfloat16",
        optim="sgd",
        world_size=2,
        backend="ddp",
        device="cuda",
        max_grad_norm=0.0,
    )
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(expected.to_dict()))
    assert figure.read_text().startswith("<?xml")


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
        (["--budget", "3h"], "an amount of memory"),
        (["--dtype", "int3"], "must be one of"),
        (["--figure", "out.gif"], "must end in one of"),
        (["--memory_kwargs", "{r: 1}"], "is not JSON"),
        (["--memory_kwargs", "[1]"], "must be a mapping"),
        (["--memory", "full", "--memory_kwargs", '{"r": 1}'], "is no option of full"),
        (["--measure", "--world_size", "2"], "leave out world_size"),
    ],
)
def test_what_cannot_be_profiled_is_one_sentence(material, capsys, flags, sentence):
    assert main(["profile", "--model", str(material / "model"), *flags]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-eff: ")]
    assert len(errors) == 1
    assert sentence in errors[0]
