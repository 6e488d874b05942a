"""Every registered method against every check that binds it. No method is named here."""

import subprocess
import sys

import pytest

from hf_eff.contracts.spec import KINDS
from hf_eff.registry import get_method, list_methods
from hf_eff.testing.suite import checks_for

SPECS = [get_method(kind, name) for kind in KINDS for name in list_methods(kind)]

# Toy runs are too short for every block to train, and a method that takes turns says so.
pytestmark = pytest.mark.filterwarnings("ignore::hf_eff.errors.OutsideIntendedUseWarning")


def _marks(spec, check):
    reason = dict(spec.known_failures).get(check.name)
    return [] if reason is None else [pytest.mark.xfail(reason=reason, strict=True)]


CASES = [
    pytest.param(spec, check, id=f"{spec.kind}={spec.name}-{check.name}", marks=_marks(spec, check))
    for spec in SPECS
    for check in checks_for(spec)
]


@pytest.mark.parametrize(("spec", "check"), CASES)
def test_conforms(spec, check):
    check.run(spec)


def test_every_kind_has_methods():
    assert {spec.kind for spec in SPECS} == set(KINDS)


def test_command_line_gives_the_same_verdict():
    first = SPECS[0]
    command = [sys.executable, "-m", "hf_eff.testing", f"{first.kind}={first.name}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    names = [check.name for check in checks_for(first)]
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[2] if line.startswith("passed") else line for line in lines[:-1]] == names


@pytest.mark.parametrize("words", [["selection=lesss"], ["selection"], ["selections=less"], []])
def test_command_line_refuses_wrong_addresses(words):
    done = subprocess.run(
        [sys.executable, "-m", "hf_eff.testing", *words], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
