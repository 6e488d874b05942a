"""A generated method has a sound identity, formats and types, and fails on behaviour until it is filled."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from hf_eff.contracts.spec import KINDS
from hf_eff.errors import OptionError
from hf_eff.testing.check import judge
from hf_eff.testing.checks import identity, options
from hf_eff.testing.skeleton import write_skeleton
from hf_eff.testing.suite import checks_for

ROOT = Path(__file__).parent.parent


@pytest.fixture(params=KINDS)
def made(request, tmp_path):
    files = write_skeleton(request.param, "my_method", tmp_path)
    module = f"made_{request.param}_my_method"
    loader = importlib.util.spec_from_file_location(module, files[0])
    loaded = importlib.util.module_from_spec(loader)
    sys.modules[module] = loaded
    loader.loader.exec_module(loaded)
    yield files, loaded.SPEC
    del sys.modules[module]


def test_identity_and_options_hold_behaviour_does_not(made):
    _, spec = made
    verdicts = {check.name: judge(check, spec).status for check in checks_for(spec)}
    sound = {check.name for check in (*identity.CHECKS, *options.CHECKS)} & set(verdicts)
    assert {name for name in sound if verdicts[name] != "passed"} == set()
    assert "failed" in verdicts.values()


def test_passes_the_formatter_and_linter(made):
    files, _ = made
    for action in (["format", "--check"], ["check", "--no-cache", "--ignore", "ARG001,INP001"]):
        command = [sys.executable, "-m", "ruff", *action, "--config", str(ROOT / "pyproject.toml"), str(files[0])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_its_own_test_fails_until_filled(made):
    files, _ = made
    assert "pytest.fail" in files[2].read_text()
    assert [path.suffix for path in files] == [".py", ".md", ".py"]


def test_refuses_to_overwrite(tmp_path):
    write_skeleton("memory", "my_method", tmp_path)
    with pytest.raises(OptionError, match="exists"):
        write_skeleton("memory", "my_method", tmp_path)


@pytest.mark.parametrize(
    ("kind", "name"), [("memmory", "a"), ("memory", "MyMethod"), ("memory", "../x"), ("memory", "")]
)
def test_refuses_names(tmp_path, kind, name):
    with pytest.raises(OptionError, match="must be"):
        write_skeleton(kind, name, tmp_path)


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "hf_eff.testing", "new", "governor", "my_rule", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert [Path(line).name for line in done.stdout.split()] == ["my_rule.py", "my_rule.md", "test_my_rule.py"]
