"""What a SPEC says in the words of the filters of ``hf-eff methods``."""

from __future__ import annotations

import json

import pytest

from hf_eff.cli import main
from hf_eff.contracts.spec import KINDS
from hf_eff.registry import get_method, list_methods
from hf_eff.report.method_facts import backends, described, needs, saves


def listed(capsys, *words):
    assert main(["methods", *words, "--json"]) == 0
    return {name for lines in json.loads(capsys.readouterr().out).values() for name in lines}


def test_saved_terms_are_those_that_the_methods_are_known_for():
    assert saves(get_method("memory", "full")) == []
    assert saves(get_method("memory", "lora")) == ["gradients", "optimizer", "activations"]
    assert saves(get_method("memory", "mezo")) == ["gradients", "optimizer", "activations"]
    assert saves(get_method("memory", "galore")) == ["optimizer"]
    assert "activations" in saves(get_method("memory", "checkpointing"))
    assert saves(get_method("selection", "random")) == []


def test_needs_and_backends_are_those_of_the_traits():
    assert needs(get_method("selection", "less")) == ["model", "target", "package peft"]
    assert needs(get_method("memory", "mezo")) == []
    assert "fsdp2" not in backends(get_method("memory", "galore"))
    assert "fsdp2" in backends(get_method("memory", "badam"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_is_described_in_json(kind):
    for name in list_methods(kind):
        facts = described(get_method(kind, name))
        assert json.loads(json.dumps(facts)) == facts
        assert (facts["kind"], facts["name"]) == (kind, name)


def test_filters_are_joined_and_say_nothing_else(capsys):
    assert listed(capsys, "memory", "--slot", "activations") == {
        "checkpointing",
        "chunked_loss",
        "offload",
        "row_chunks",
    }
    assert listed(capsys, "memory", "--slot", "activations.layers", "--backend", "fsdp2") == {"checkpointing"}
    without = listed(capsys, "memory", "--without", "backward")
    assert {"mezo"} <= without
    assert not without & {"badam", "lora", "full"}
    probing = {"marginal_gain", "patience", "reservation", "tail", "target"}
    assert listed(capsys, "--needs", "target", "--slot", "policy") == probing
    saving = listed(capsys, "--saves", "optimizer", "--saves", "gradients", "--backend", "fsdp2")
    assert "badam" in saving
    assert "galore" not in saving


def test_an_unknown_word_of_a_filter_is_a_sentence(capsys):
    assert main(["methods", "--saves", "gradents"]) == 2
    assert "--saves must be one of ['weights', " in (error := capsys.readouterr().err)
    assert "Did you mean 'gradients'?" in error
    assert len(error.splitlines()) == 1


def test_json_of_a_card_holds_facts_and_version(capsys):
    assert main(["methods", "badam", "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)
    assert (entry["slot"], entry["status"], len(entry["version"])) == ("update", "stable", 8)
    assert entry["paper"]["link"].endswith("2404.02827")
