"""Recipes: a closed schema, safe text, versions that notice changed defaults, and flags that override."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_eff.cli import main, run_flags
from hf_eff.contracts.spec import knob
from hf_eff.errors import EffError, OptionError, UnknownMethodError
from hf_eff.recipe import ChangedDefaultWarning, Recipe, list_recipes, spec_version
from hf_eff.recipe.schema import OPTIONS, RUN, TRAINING
from hf_eff.recipe.text import MAX_BYTES, parse_yaml
from hf_eff.registry import get_method, register_method, unregister_method

HEAD = {"format": "hf_eff.recipe", "format_version": 1, "name": "small", "version": "1.0"}


@pytest.fixture
def recipe():
    return Recipe(
        "small",
        options={"selection": "random", "selection_kwargs": {"fraction": 0.5}, "memory": "badam", "budget": "2h"},
        training={"learning_rate": "1e-5", "max_steps": 4},
        run={"model": "org/model", "task": "sft"},
        summary="A test.",
    )


# Files


def test_a_recipe_comes_back_from_its_file_as_it_was(recipe, tmp_path):
    path = recipe.save(tmp_path)
    assert path == tmp_path / "recipes" / "small.yaml"
    assert Recipe.from_file(path) == recipe
    assert Recipe.from_pretrained(tmp_path) == recipe
    assert Recipe.from_pretrained(path) == recipe
    assert list_recipes(tmp_path) == [recipe]
    assert recipe.training == {"learning_rate": 1e-5, "max_steps": 4}  # YAML 1.1 reads 1e-5 as text
    assert list(yaml.safe_load(path.read_text()))[:4] == ["format", "format_version", "name", "version"]


def test_of_several_recipes_one_has_to_be_named(recipe, tmp_path):
    recipe.save(tmp_path)
    dataclasses.replace(recipe, name="large").save(tmp_path)
    with pytest.raises(OptionError, match=r"holds the recipes \['large', 'small'\]; name one"):
        Recipe.from_pretrained(tmp_path)
    assert Recipe.from_pretrained(tmp_path, "large").name == "large"
    with pytest.raises(OptionError, match=r"no recipe 'lrage'\. Did you mean 'large'"):
        Recipe.from_pretrained(tmp_path, "lrage")


@pytest.mark.parametrize("source", ["nowhere", "a/b/c/d", "user/repo@", "../x/y", "user/../x"])
def test_what_is_no_place_of_a_recipe_is_said_so(source):
    with pytest.raises(OptionError, match="neither a file nor a folder"):
        Recipe.from_pretrained(source)


def test_a_missing_file_is_a_sentence(tmp_path):
    with pytest.raises(OptionError, match="cannot be read"):
        Recipe.from_file(tmp_path / "none.yaml")


# What a recipe may not say

WRONG = {
    "format": ({"format": "other"}, "a recipe starts with 'format: hf_eff.recipe'"),
    "later": ({"format_version": 2}, "'format_version: 1'"),
    "field": ({"optoins": {}}, r"no field 'optoins'\. Did you mean 'options'"),
    "option": ({"options": {"memry": "badam"}}, r"options has no field 'memry'\. Did you mean 'memory'"),
    "training": ({"training": {"learning_rat": 1}}, r"Did you mean 'learning_rate'"),
    "folder": ({"training": {"output_dir": "out"}}, "'output_dir' decides where results go"),
    "token": ({"training": {"hub_token": "x"}}, "'hub_token' decides a secret"),
    "code": ({"run": {"trust_remote_code": True}}, "'trust_remote_code' decides whether foreign code runs"),
    "type": ({"training": {"max_steps": "many"}}, r"training.max_steps must be int, got 'many'"),
    "bool": ({"training": {"max_steps": True}}, "training.max_steps must be int"),
    "nan": ({"training": {"learning_rate": float("nan")}}, "finite number"),
    "text nan": ({"training": {"learning_rate": "nan"}}, "finite number"),
    "parts": ({"options": [1]}, "options must hold 'field: value' lines"),
    "name": ({"name": "../../etc/x"}, "names no place outside its own folder"),
    "name letters": ({"name": "A b"}, "name must be lower-case letters"),
    "name dots": ({"name": "a..b"}, "name must be lower-case letters"),
    "version": ({"version": 1.0}, "version must be a number such as '1.0', in quotes"),
    "absolute": ({"run": {"dataset": "/etc/passwd"}}, "names no place outside"),
    "home": ({"run": {"dataset": "~/rows.json"}}, "names no place outside"),
    "drive": ({"run": {"model": "C:\\models"}}, "names no place outside"),
    "url": ({"run": {"model": "https://host/model"}}, "must be the id of a Hub repository"),
    "inside": ({"options": {"selection_kwargs": {"proxy_model": "a/../../b"}}}, "options.selection_kwargs.proxy_model"),
    "deep": ({"options": {"memory_kwargs": {"a": [[[[[[1]]]]]]}}}, "nested more than 6 levels"),
    "long": ({"summary": "x" * 5000}, "more than 4000 characters"),
    "control": ({"summary": "a\x1b[31mb"}, "control characters"),
    "number": ({"options": {"price_per_hour": 2**70}}, "too large a number"),
    "object": ({"options": {"memory": object()}}, "must be text, a finite number"),
    "key": ({"options": {"memory_kwargs": {1: 2}}}, "keys are short texts"),
    "task": ({"run": {"task": "rlhf"}}, r"run.task must be one of \['sft', 'trainer'\]"),
    "methods": ({"methods": {"memory=badam": 3}}, "'version' and 'defaults'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_recipe_may_not_say_is_refused_by_its_place(name):
    changes, sentence = WRONG[name]
    with pytest.raises(OptionError, match=sentence):
        Recipe.from_dict({**HEAD, **changes})


BAD_TEXT = {
    "alias": ("a: &x [1]\nb: *x", "anchors and aliases"),
    "bomb": ("a: &a [x,x]\nb: &b [*a,*a]", "anchors and aliases"),
    "tag": ("a: !!python/object/apply:os.system [ls]", "uses the tag"),
    "own tag": ("a: !run ls", "uses the tag"),
    "deep": ("[" * 5000, "nested more than 20"),
    "key": ("a: 1\na: 2", "is repeated"),
    "merge": ("<<: {a: 1}", "a key must be plain text"),
    "list key": ("? [1]\n: 2", "a key must be plain text"),
    "digits": ("a: " + "9" * 5000, "cannot be read"),
    "zero": ("\x00", "is not YAML"),
    "open": ("a: [1", "is not YAML"),
}


@pytest.mark.parametrize("name", BAD_TEXT)
def test_only_plain_yaml_is_read(name):
    text, sentence = BAD_TEXT[name]
    with pytest.raises(OptionError, match=sentence):
        parse_yaml(text)


def test_dates_stay_text_and_words_of_yaml_1_1_do_not_surprise():
    assert parse_yaml("a: 2020-99-99\nb: 2020-01-01") == {"a": "2020-99-99", "b": "2020-01-01"}


def test_a_large_file_is_not_read_and_binary_is_no_text(tmp_path):
    (tmp_path / "large.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(OptionError, match="larger than a recipe may be"):
        Recipe.from_file(tmp_path / "large.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OptionError, match="not UTF-8"):
        Recipe.from_file(tmp_path / "binary.yaml")


def test_links_out_of_a_folder_are_not_followed(recipe, tmp_path):
    outside = recipe.save(tmp_path / "outside.yaml")
    (tmp_path / "repo" / "recipes").mkdir(parents=True)
    (tmp_path / "repo" / "recipes" / "small.yaml").symlink_to(outside)
    with pytest.raises(OptionError, match="holds no recipe"):
        Recipe.from_pretrained(tmp_path / "repo")


# Fuzz

_keys = st.one_of(
    st.sampled_from([*HEAD, "options", "training", "run", "methods", *OPTIONS, *TRAINING, *RUN, "output_dir", "../x"]),
    st.text(max_size=12),
)
_scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=30),
    st.sampled_from(["badam", "random", "2h", "../../x", "/etc/passwd", "~", "1e-3", "user/repo", "$(ls)", "\x00"]),
)  # fmt: skip
_data = st.recursive(
    _scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_keys, inner, max_size=3)),
    max_leaves=6,
)
_attacks = st.sampled_from(["../../x", "/etc/passwd", "a/../../b", "~/x", "file:///etc/x", "C:\\x", "\\\\host\\x"])
_parts = {"options": OPTIONS, "training": TRAINING, "run": RUN}
_known = {
    part: st.dictionaries(st.sampled_from(sorted(names)), st.one_of(_scalars, _attacks), max_size=2)
    for part, names in _parts.items()
}
_deep = st.fixed_dictionaries({key: st.just(value) for key, value in HEAD.items()}, optional=_known)
_nearly = st.fixed_dictionaries(
    {key: st.one_of(st.just(value), st.just(value), _scalars) for key, value in HEAD.items()},
    optional=dict.fromkeys(("options", "training", "run", "methods", "summary", "made_with", "extra"), _data),
)


def made_or_refused(make):
    """What was made; None where it was refused in a sentence. Any other exception passes."""
    try:
        return make()
    except OptionError as error:
        sentence = str(error)
    assert 10 < len(sentence) < 1000
    return None


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(values=st.one_of(_deep, _nearly, _data))
def test_any_data_is_a_recipe_or_a_clear_error(tmp_path_factory, values):
    recipe = made_or_refused(lambda: Recipe.from_dict(values))
    if recipe is None:
        return
    # Whatever is accepted goes into a file and back, in its own place.
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    path = recipe.save(folder)
    assert path.resolve().parent == folder.resolve() / "recipes"
    assert Recipe.from_file(path) == recipe
    path.unlink()
    for part in (recipe.options, recipe.training, recipe.run):
        assert "../" not in json.dumps(part)
        assert "/etc" not in json.dumps(part)


_good = yaml.safe_dump({**HEAD, "options": {"memory": "badam"}, "training": {"max_steps": 4}, "run": {"task": "sft"}})


@settings(max_examples=450, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    at=st.integers(0, len(_good)),
    cut=st.integers(0, 12),
    put=st.one_of(
        st.text(max_size=8), st.sampled_from(["&a ", "*a", "!!", "{", "[", "? ", "<<: ", "- ", "\t", "'", "|"])
    ),
)
def test_a_damaged_file_is_a_recipe_or_a_clear_error(tmp_path_factory, at, cut, put):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_bytes((_good[:at] + put + _good[at + cut :]).encode("utf-8", "replace"))
    made_or_refused(lambda: Recipe.from_file(path))
    assert [each.name for each in folder.iterdir()] == ["recipe.yaml"]


# Versions


@dataclasses.dataclass(frozen=True, kw_only=True)
class OldConfig(type(get_method("memory", "full").config())):
    period: int = knob(50, "Steps.", low=1)
    gone: int = knob(1, "Left later.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewConfig(type(get_method("memory", "full").config())):
    period: int = knob(100, "Steps.", low=1)


@pytest.fixture
def toy():
    old = dataclasses.replace(get_method("memory", "full"), name="toy", config=OldConfig)
    new = dataclasses.replace(old, config=NewConfig)
    register_method(old)
    yield old, new
    unregister_method("memory", "toy")


def test_a_changed_default_is_told_once_the_method_has_changed(toy):
    old, new = toy
    written = Recipe("small", options={"memory": "toy"}).pinned()
    assert written.methods["memory=toy"] == {"version": spec_version(old), "defaults": {"period": 50, "gone": 1}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written.resolve()
    register_method(new, replace=True)
    assert spec_version(new) != spec_version(old)
    with pytest.warns(ChangedDefaultWarning, match=r"'toy' had other defaults \(period 50 -> 100, gone 1 -> none\)"):
        written.resolve()


def test_a_default_that_the_recipe_sets_itself_may_change(toy):
    written = Recipe("small", options={"memory": "toy", "memory_kwargs": {"period": 7}}).pinned()
    register_method(dataclasses.replace(toy[1], config=NewConfig), replace=True)
    with pytest.warns(ChangedDefaultWarning, match=r"\(gone 1 -> none\)"):
        written.resolve()


def test_methods_that_are_not_registered_here_are_named():
    with pytest.raises(UnknownMethodError, match="memory='bdam' is not registered"):
        Recipe("small", options={"memory": "bdam"}).resolve()
    with pytest.raises(EffError, match="Did you mean 'fraction'"):
        Recipe("small", options={"selection": "random", "selection_kwargs": {"fractoin": 1}}).pinned()


def test_the_recipe_of_arguments_sets_them_again(tmp_path):
    from hf_eff.arguments import BudgetedTrainingArguments

    args = BudgetedTrainingArguments(
        output_dir=str(tmp_path / "secret place"), hub_token="hf_" + "x" * 30, memory="badam", use_cpu=True,
        memory_kwargs='{"switch_every": 3}', learning_rate=3e-4, max_steps=5, optim_target_modules=["q_proj"],
    )  # fmt: skip
    made = Recipe.of_arguments("run", args, run={"task": "trainer", "model": str(tmp_path), "dataset": "org/rows"})
    assert made.options == {"memory": "badam", "memory_kwargs": {"switch_every": 3}}
    assert made.training["learning_rate"] == 3e-4
    assert made.training["optim_target_modules"] == ["q_proj"]
    assert made.run == {"task": "trainer", "dataset": "org/rows"}
    text = made.save(tmp_path).read_text()
    assert "secret place" not in text
    assert "hf_x" not in text


# Flags


@pytest.fixture
def written(tmp_path):
    settings = {
        **HEAD,
        "options": {"selection": "random", "selection_kwargs": {"fraction": 0.5}, "memory": "badam"},
        "training": {"max_steps": 9, "learning_rate": 3.0e-4, "bf16": False, "gradient_checkpointing": True},
        "run": {"task": "trainer", "model": "org/model", "dataset": "org/rows", "text_column": "body"},
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def test_flags_and_settings_override_a_recipe(written, tmp_path):
    (tmp_path / "run.yaml").write_text("learning_rate: 1e-4\nmax_steps: 7\n")
    words = ["--recipe", str(written), "--config", str(tmp_path / "run.yaml"), "--max_steps", "2"]
    flags, args = run_flags.parse_run([*words, "--output_dir", str(tmp_path), "--dataset", "mine"], "train")
    assert (flags.model, flags.dataset, flags.task, flags.text_column) == ("org/model", "mine", "trainer", None)
    assert (args.max_steps, args.learning_rate, args.selection, args.memory) == (2, 1e-4, "random", "badam")
    assert args.selection_kwargs == {"fraction": 0.5}
    assert args.bf16 is False


def test_options_of_a_method_that_a_flag_replaces_do_not_stay(written, tmp_path):
    words = ["--recipe", str(written), "--output_dir", str(tmp_path), "--selection", "all"]
    _, args = run_flags.parse_run(words, "train")
    assert (args.selection, args.selection_kwargs) == ("all", None)


def test_a_setting_that_the_trainer_lacks_is_named(tmp_path):
    path = Recipe("small", training={"packing": True}, run={"task": "trainer"}).save(tmp_path)
    words = ["--recipe", str(path), "--model", "m", "--dataset", "d", "--output_dir", str(tmp_path)]
    with pytest.raises(OptionError, match="sets 'packing', which BudgetedTrainingArguments does not have"):
        run_flags.parse_run(words, "train")


def test_a_local_folder_does_not_stand_in_for_a_repository(written, tmp_path, monkeypatch):
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match="a local 'org/model' would be read"):
        run_flags.parse_run(["--recipe", str(written), "--output_dir", "out"], "train")


def test_the_command_lists_shows_and_copies(recipe, tmp_path, capsys):
    recipe.pinned().save(tmp_path / "made")
    assert main(["recipes", "list", str(tmp_path / "made")]) == 0
    assert "| small | 1.0 | org/model | A test. |" in capsys.readouterr().out
    assert main(["recipes", "show", str(tmp_path / "made"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["options"]["memory"] == "badam"
    assert main(["recipes", "pull", str(tmp_path / "made"), "--to", str(tmp_path / "here")]) == 0
    assert Recipe.from_file(tmp_path / "here" / "small.yaml") == recipe.pinned()
    assert main(["recipes", "pull", str(tmp_path / "made"), "--to", str(tmp_path / "here")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["recipes", "push", str(tmp_path / "none"), "user/repo"]) == 2
    assert main(["recipes", "list", str(tmp_path / "here" / "..")]) == 2
    assert "holds no recipe" in capsys.readouterr().err
