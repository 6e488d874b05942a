"""Names lead to SPECs: built-ins by folder, packages by entry point, notebooks by call; errors that help."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_eff import registry
from hf_eff.contracts.spec import KINDS
from hf_eff.errors import MissingDependencyError, OptionError, UnknownMethodError
from hf_eff.registry import get_method, list_methods, method_card, register_method, resolve, summaries
from hf_eff.testing.toys import half, match

PLUGINS = Path(__file__).parent / "plugins"


@pytest.fixture
def registered():
    register_method(match.SPEC)
    yield match.SPEC
    registry.unregister_method(match.SPEC.kind, match.SPEC.name)


def run(code, *plugins):
    """Output of a fresh process that has these packages installed."""
    path = os.pathsep.join(str(PLUGINS / name) for name in plugins)
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, *code], capture_output=True, text=True, check=False, env=environment)


# Built-ins


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_files(kind):
    folder = Path(registry.__file__).parent / kind
    assert list_methods(kind) == sorted(path.stem for path in folder.glob("[a-z]*.py"))


def test_all_kinds_together():
    assert list_methods() == sorted({name for kind in KINDS for name in list_methods(kind)})


@pytest.mark.parametrize("kind", KINDS)
def test_summaries_are_those_of_the_specs(kind):
    for name, line in summaries(kind).items():
        assert line.strip(), name
        assert registry.origin(kind, name).endswith(f"{kind}/{name}.py")


def test_did_you_mean():
    with pytest.raises(UnknownMethodError, match=r"memory='badamm' is not registered\. Did you mean 'badam'"):
        get_method("memory", "badamm")


def test_unknown_name_lists_what_there_is():
    with pytest.raises(UnknownMethodError, match=r"Available: \['addax'"):
        get_method("memory", "zzz")


@pytest.mark.parametrize("kind", ["memmory", "select", "", None])
def test_unknown_kind(kind):
    with pytest.raises(UnknownMethodError, match="Kinds:"):
        get_method(kind, "full")


def test_near_kind_is_suggested():
    with pytest.raises(UnknownMethodError, match="Did you mean 'memory'"):
        list_methods("memmory")


def test_composition():
    assert [spec.name for spec in resolve("memory", " lora + badam ")] == ["lora", "badam"]


@pytest.mark.parametrize("names", ["", "lora+", "+", "lora++badam"])
def test_empty_part_of_a_composition(names):
    with pytest.raises(UnknownMethodError, match="empty part"):
        resolve("memory", names)


# This process


def test_registered_method_is_found(registered):
    assert get_method("selection", "match") is registered
    assert "match" in list_methods("selection")
    assert summaries("selection")["match"] == registered.summary
    assert registry.origin("selection", "match") == "this process (register_method)"
    assert registered.summary in method_card("selection", "match")


def test_unregistering_forgets_it(registered):
    registry.unregister_method("selection", "match")
    assert "match" not in list_methods("selection")


def test_taken_name_is_refused(registered):
    with pytest.raises(OptionError, match="already registered at this process"):
        register_method(registered)
    with pytest.raises(OptionError, match=r"already registered at .*full\.py"):
        register_method(dataclasses.replace(half.SPEC, name="full"))


def test_replacing_and_restoring_a_built_in():
    own = dataclasses.replace(half.SPEC, name="full")
    register_method(own, replace=True)
    assert get_method("memory", "full") is own
    registry.unregister_method("memory", "full")
    assert get_method("memory", "full") is not own


def test_missing_package_names_the_install_line():
    spec = dataclasses.replace(half.SPEC, requires={"no_such_package_here": "quant"})
    with pytest.raises(MissingDependencyError, match=r"pip install 'hf_eff\[quant\]'"):
        registry.build(spec, {})


def test_build_checks_options():
    with pytest.raises(OptionError, match=r"HalfConfig has no option 'shares'\. Did you mean 'share'"):
        registry.build(half.SPEC, {"shares": 0.1})


# Other packages


def test_plugin_is_found_by_its_entry_point():
    done = run(["-m", "hf_eff.testing", "selection=keep_first"], "keep_first")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "selection='keep_first': conforms" in done.stdout


def test_listing_does_not_import_the_plugin():
    code = (
        "import sys, hf_eff\n"
        "assert 'keep_first' in hf_eff.list_methods('selection')\n"
        "assert not [name for name in sys.modules if name.startswith('hf_eff_keep_first')]\n"
    )
    done = run(["-c", code], "keep_first")
    assert done.returncode == 0, done.stderr


def test_plugin_is_suggested():
    done = run(["-m", "hf_eff.testing", "selection=keep_frist"], "keep_first")
    assert done.returncode == 2
    assert "Did you mean 'keep_first'" in done.stderr


def test_two_packages_with_one_name_are_both_named():
    done = run(["-m", "hf_eff.testing", "selection=keep_first"], "keep_first", "rival")
    assert done.returncode == 2
    assert "hf_eff_keep_first.keep_first:SPEC and hf_eff_rival:SPEC" in done.stderr


def test_entry_point_under_a_wrong_name():
    done = run(["-m", "hf_eff.testing", "selection=misnamed"], "keep_first")
    assert done.returncode == 2
    assert "does not lead to a MethodSpec of that kind and name" in done.stderr
