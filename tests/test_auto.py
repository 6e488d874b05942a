from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_eff.auto import FILE, AutoGovernor, AutoMemoryStrategy, AutoSelector
from hf_eff.errors import EffError, OptionError, UnknownMethodError
from hf_eff.registry import get_method, list_methods, unregister_method

DOORS = (AutoSelector, AutoMemoryStrategy, AutoGovernor)


@pytest.mark.parametrize("door", DOORS)
def test_every_registered_method_is_built_by_its_name(door):
    assert door.list() == list_methods(door.kind)
    for name in door.list():
        spec = get_method(door.kind, name)
        assert type(door.from_name(name, **spec.tiny)) is type(spec.build(spec.config(**spec.tiny)))


def test_options_are_checked():
    assert AutoSelector.from_name("random", fraction=0.25).config.fraction == 0.25
    with pytest.raises(OptionError, match=r"has no option 'fractoin'\. Did you mean 'fraction'"):
        AutoSelector.from_name("random", fractoin=0.25)
    with pytest.raises(UnknownMethodError, match="Did you mean 'random'"):
        AutoSelector.from_name("randm")
    with pytest.raises(TypeError, match=r"call AutoSelector\.from_name"):
        AutoSelector()


def test_a_method_of_another_kind_is_not_registered_and_a_right_one_is():
    spec = dataclasses.replace(get_method("selection", "random"), name="mine")
    with pytest.raises(OptionError, match="registers governor methods"):
        AutoGovernor.register(spec)
    AutoSelector.register(spec)
    try:
        assert "mine" in AutoSelector.list()
        with pytest.raises(OptionError, match="already registered"):
            AutoSelector.register(spec)
    finally:
        unregister_method("selection", "mine")


@pytest.mark.parametrize("door", DOORS)
def test_saved_options_build_the_same_method(door, tmp_path):
    for name in door.list():
        spec = get_method(door.kind, name)
        folder = tmp_path / name
        door.save_pretrained(folder, name, **spec.tiny)
        described = json.loads((folder / FILE).read_text(encoding="utf-8"))
        assert spec.config.from_dict(described["options"]) == spec.config(**spec.tiny)
        assert type(door.from_pretrained(folder)) is type(door.from_name(name, **spec.tiny))


GOOD = {"format_version": 1, "kind": "selection", "name": "random", "options": {}}


@pytest.mark.parametrize(
    ("content", "error", "sentence"),
    [
        (None, OptionError, "no hf_eff_method.json was found"),
        ("{", OptionError, "is not JSON"),
        ("[]", OptionError, "must hold exactly"),
        (json.dumps({**GOOD, "format_version": 2}), OptionError, "format_version 1"),
        (json.dumps({**GOOD, "code": "import os"}), OptionError, "must hold exactly"),
        (json.dumps({**GOOD, "name": ["random"]}), OptionError, "'name' must be a string"),
        (json.dumps({**GOOD, "options": {"nope": 1}}), OptionError, "has no option 'nope'"),
        (json.dumps({**GOOD, "kind": "memory"}), OptionError, "AutoSelector needs selection"),
        (json.dumps({**GOOD, "name": "os.system"}), UnknownMethodError, "is not registered"),
        (json.dumps({**GOOD, "name": "../memory/badam"}), UnknownMethodError, "is not registered"),
        ('{"kind": "selection", "kind": "memory"}', OptionError, "a key is repeated"),
        ("[" * 100_000, OptionError, "is not JSON"),
        (" " * 2**20, OptionError, "larger than a description may be"),
    ],
    ids=[
        *("absent", "broken", "list", "version", "extra", "name", "option", "kind", "code", "path"),
        *("twice", "deep", "large"),
    ],
)
def test_a_file_can_only_name_registered_methods(tmp_path, content, error, sentence):
    if content is not None:
        (tmp_path / FILE).write_text(content, encoding="utf-8")
    with pytest.raises(error, match=sentence):
        AutoSelector.from_pretrained(tmp_path)


def test_a_hub_repository_is_read_through_the_hub_module(tmp_path, monkeypatch):
    calls = []

    def pull(repo_id, destination, repo_type, **options):
        calls.append((repo_id, repo_type, options))
        AutoSelector.save_pretrained(destination, "random", fraction=0.5)

    monkeypatch.setattr("hf_eff.hub.pull_folder", pull)
    selector = AutoSelector.from_pretrained("user/method", revision="v1", token="secret")
    assert selector.config.fraction == 0.5
    assert calls == [("user/method", "model", {"patterns": [FILE], "revision": "v1", "token": "secret"})]


def test_a_description_is_published_without_code(monkeypatch):
    sent = {}

    def push(folder, repo_id, repo_type, message, token, *, private):
        files = {path.name: path.read_text() for path in Path(folder).iterdir()}
        sent.update(files=files, repo=(repo_id, repo_type, private), token=token)
        return "c" * 40

    monkeypatch.setattr("hf_eff.hub.push_folder", push)
    commit = AutoSelector.push_to_hub("user/method", "random", token="secret", fraction=0.5)
    assert commit == "c" * 40
    assert sent["repo"] == ("user/method", "model", True)
    assert list(sent["files"]) == [FILE]
    assert "secret" not in sent["files"][FILE]
    with pytest.raises(OptionError, match="Did you mean 'fraction'"):
        AutoSelector.push_to_hub("user/method", "random", fractoin=0.5)


def _json():
    keys = st.one_of(st.sampled_from([*GOOD, "fraction", "mode", "random"]), st.text(max_size=6))
    leaves = st.one_of(
        *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12)),
        st.sampled_from(["random", "selection", "os.system", "../x", 0.5, "0.5", "balanced"]),
    )
    return st.recursive(
        leaves,
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3)),
        max_leaves=6,
    )


_described = st.fixed_dictionaries(
    {key: st.one_of(st.just(value), st.just(value), _json()) for key, value in GOOD.items()},
    optional={"extra": _json()},
)


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(values=st.one_of(_described, _json()), options=st.one_of(st.none(), _json()))
def test_any_description_builds_a_registered_method_or_a_clear_error(tmp_path_factory, values, options):
    folder = tmp_path_factory.getbasetemp() / "described"
    folder.mkdir(exist_ok=True)
    if isinstance(values, dict) and isinstance(options, dict):
        values = {**values, "options": options}
    (folder / FILE).write_text(json.dumps(values), encoding="utf-8")
    sentence = "built"
    try:
        assert AutoSelector.from_pretrained(folder).config is not None
    except EffError as error:
        sentence = str(error)
    assert sentence
    assert [path.name for path in folder.iterdir()] == [FILE]
