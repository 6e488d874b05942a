"""Recipes on a Hub: pushed, listed, pulled by revision, run; what a stranger put there is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import yaml

from hf_eff.auto import AutoSelector
from hf_eff.cli import main
from hf_eff.errors import OptionError
from hf_eff.hub import HubError
from hf_eff.recipe import Recipe, list_recipes
from hf_eff.testing.tiny import tiny_model, tiny_pool, tiny_tokenizer
from tests.local_hub import LocalHub
from tests.online import go_online

SMALL = Recipe(
    "small",
    options={"selection": "random", "selection_kwargs": {"fraction": 0.5}},
    training={"max_steps": 2, "per_device_train_batch_size": 2, "bf16": False, "save_strategy": "no"},
    run={"task": "trainer", "max_tokens": 32},
    summary="For tests.",
)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with LocalHub() as server:
        go_online(monkeypatch, server, tmp_path / "home")
        yield server


def test_a_recipe_is_pushed_listed_and_pulled_by_revision(hub, tmp_path, capsys):
    first = SMALL.push_to_hub("alice/recipes")
    later = dataclasses.replace(SMALL, version="1.1", training={**SMALL.training, "max_steps": 3})
    later.push_to_hub("alice/recipes")
    dataclasses.replace(SMALL, name="other").push_to_hub("alice/recipes")
    assert Recipe.from_pretrained("alice/recipes/small") == later
    assert Recipe.from_pretrained(f"alice/recipes/small@{first}") == SMALL
    assert Recipe.from_pretrained("alice/recipes", "small", revision=first) == SMALL
    assert [each.name for each in list_recipes("alice/recipes")] == ["other", "small"]
    with pytest.raises(
        OptionError, match=r"holds the recipes \['other', 'small'\]; name one, as in 'alice/recipes/other'"
    ):
        Recipe.from_pretrained("alice/recipes")
    card = hub.files("model", "alice/recipes")["README.md"].decode()
    assert "| `small` | 1.1 | selection=random | any | For tests. |" in card
    assert "hf-eff train --recipe alice/recipes/other" in card
    assert yaml.safe_load(card.split("---\n")[1])["tags"] == ["hf_eff", "hf_eff-recipes"]
    assert main(["recipes", "list", "alice/recipes"]) == 0
    assert "| small | 1.1 |" in capsys.readouterr().out
    assert main(["recipes", "pull", "alice/recipes/small", "--to", str(tmp_path)]) == 0
    assert main(["recipes", "push", str(tmp_path / "small.yaml"), "alice/copy"]) == 0
    assert Recipe.from_pretrained("alice/copy") == later


def test_the_card_of_a_model_is_not_replaced(hub):
    hub.add("model", "alice/model", {"README.md": b"# My model\n", "config.json": b"{}"})
    SMALL.push_to_hub("alice/model")
    files = hub.files("model", "alice/model")
    assert files["README.md"] == b"# My model\n"
    assert Recipe.from_pretrained("alice/model") == SMALL


def test_a_recipe_of_the_hub_is_run_and_flags_override_it(hub, tmp_path, capsys):
    SMALL.push_to_hub("alice/recipes")
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    tiny_pool(12).to_json(tmp_path / "pool.jsonl")
    words = ["train", "--recipe", "alice/recipes/small", "--model", str(tmp_path / "model"), "--json"]
    words += ["--dataset", str(tmp_path / "pool.jsonl"), "--output_dir", str(tmp_path / "out"), "--report_to", "none"]
    capsys.readouterr()
    assert main([*words, "--max_steps", "1"]) == 0
    report = json.loads(capsys.readouterr().out)["report"]
    assert report["steps"] == {"planned": 1, "done": 1}
    assert report["methods"]["selection:random"]["fraction"] == 0.5
    assert report["selection"]["rows"] == 6


def stranger(**changes):
    values = {"format": "hf_eff.recipe", "format_version": 1, "name": "small", "version": "1.0", **changes}
    return yaml.safe_dump(values).encode()


STRANGE = {
    "code": (b"!!python/object/apply:os.system ['touch x']\n", "uses the tag"),
    "bomb": (b"a: &a [1]\nb: [*a, *a]\n", "anchors and aliases"),
    "output": (stranger(training={"output_dir": "/tmp/x"}), "names no place outside|cannot set it"),
    "remote code": (stranger(run={"trust_remote_code": True}), "whether foreign code runs"),
    "path": (stranger(run={"dataset": "../secrets"}), "names no place outside"),
    "not text": (b"\xff\xfe", "not UTF-8"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_a_stranger_wrote_is_refused_in_a_sentence(name, hub, tmp_path, capsys, monkeypatch):
    content, sentence = STRANGE[name]
    hub.add("model", "bob/recipes", {"recipes/small.yaml": content})
    monkeypatch.chdir(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(OptionError, match=sentence):
        Recipe.from_pretrained("bob/recipes")
    assert main(["train", "--recipe", "bob/recipes", "--output_dir", "out", "--model", "m", "--dataset", "d"]) == 2
    assert sum("hf-eff: " in line for line in capsys.readouterr().err.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} - before <= {"home"}


def test_a_huge_file_is_refused_before_it_is_fetched(hub):
    hub.add("model", "bob/recipes", {"recipes/small.yaml": b"#" * 2**20})
    with pytest.raises(OptionError, match="larger than a recipe may be"):
        Recipe.from_pretrained("bob/recipes")
    assert not [line for line in hub.log if "/resolve/" in line]


def test_a_hub_that_cannot_be_reached_is_a_sentence(hub, capsys):
    hub.revoke(hub.token)
    with pytest.raises(HubError, match="401"):
        SMALL.push_to_hub("alice/recipes")
    assert main(["recipes", "show", "alice/never"]) == 1
    assert capsys.readouterr().err.startswith("hf-eff: fetching model 'alice/never' failed")


def test_a_method_description_travels_too(hub):
    AutoSelector.push_to_hub("alice/half", "random", fraction=0.5)
    assert AutoSelector.from_pretrained("alice/half").config.fraction == 0.5
    assert list(hub.files("model", "alice/half")) == [".gitattributes", "hf_eff_method.json"]
