"""Interrupted and resumed equals uninterrupted, bit for bit: every registered method, without exception."""

import contextlib
import fcntl
import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hf_eff.contracts.spec import KINDS
from hf_eff.errors import CheckpointError
from hf_eff.hardware.probe import device_name
from hf_eff.registry import get_method, list_methods
from hf_eff.testing.trial import Trial, outcome_of

# Toy runs are too short for every block to train, and a method that takes turns says so.
pytestmark = pytest.mark.filterwarnings("ignore::hf_eff.errors.OutsideIntendedUseWarning")
SPECS = [
    spec
    for kind in KINDS
    for spec in map(functools.partial(get_method, kind), list_methods(kind))
    if not spec.traits.needs_accelerator or device_name() != "cpu"
]


def case(spec, trainer, accumulation):
    """Every method in both trainers, once with accumulation where it can; the other two combinations are slow tests."""
    often = {("trainer", 2 if spec.traits.grad_accum else 1), ("sft", 1)}
    marks = [] if (trainer, accumulation) in often else [pytest.mark.slow]
    name = f"{spec.kind}={spec.name}-{trainer}-accumulate{accumulation}"
    return pytest.param(spec, trainer, accumulation, marks=marks, id=name)


GRID = [
    case(spec, trainer, accumulation)
    for spec in SPECS
    for trainer in ("trainer", "sft")
    for accumulation in ((1, 2) if spec.traits.grad_accum else (1,))
]


@pytest.mark.parametrize(("spec", "trainer", "accumulation"), GRID)
def test_resumed_equals_uninterrupted(spec, trainer, accumulation, tmp_path):
    trial = Trial(spec, tmp_path, trainer, accumulation)
    whole = trial.whole()
    assert whole.steps == trial.epoch_steps + 2
    assert whole.spent["flops"] > 0
    if spec.kind == "governor" and spec.traits.needs_reference_set:
        assert len(whole.decisions) > 3
    middle, boundary = max(1, trial.epoch_steps // 2), trial.epoch_steps
    assert middle < boundary
    assert {step: trial.interrupted(step).differences(whole) for step in (middle, boundary)} == {
        middle: [],
        boundary: [],
    }


# Killed: one demanding method of each kind, found by what it declares

WORKER = Path(__file__).parent / "workers" / "killed.py"
DEMANDS = {
    "selection": lambda traits: traits.needs_model and traits.needs_reference_set,
    "memory": lambda traits: traits.needs_blocks,
    "governor": lambda traits: traits.needs_reference_set,
}
DEMANDING = [next(spec for spec in SPECS if spec.kind == kind and DEMANDS[kind](spec.traits)) for kind in KINDS]
SCENARIOS = {"term": -signal.SIGTERM, "save:1": -signal.SIGKILL, "save:4": -signal.SIGKILL, "half": -signal.SIGKILL}
KILLED = [
    pytest.param(spec, scenario, id=f"{spec.kind}={spec.name}-{scenario}")
    for spec in DEMANDING
    for scenario in SCENARIOS
]
SELECTING = DEMANDING[0]


@contextlib.contextmanager
def locked_folder(factory, name):
    """A folder that all workers of the session share, one of them at a time."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folder of the runs that died, and how each ended."""
    with locked_folder(tmp_path_factory, "killed") as folder:
        if not (folder / "ends.json").exists():
            (folder / "ends.json").write_text(_kill_all(folder))
        return folder, json.loads((folder / "ends.json").read_text())


def _kill_all(folder):
    words = [f"{spec.kind}={spec.name}:{scenario}" for spec in DEMANDING for scenario in SCENARIOS]
    words.append(f"{SELECTING.kind}={SELECTING.name}:select")
    done = subprocess.run(
        [sys.executable, str(WORKER), str(folder), *words], capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [line for line in done.stdout.splitlines() if line.startswith("ENDS ")][-1].removeprefix("ENDS ")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    outcomes = {}

    def run(spec):
        if spec.name not in outcomes:
            outcomes[spec.name] = Trial(spec, tmp_path_factory.mktemp("whole"), accumulation=2).whole()
        return outcomes[spec.name]

    return run


@pytest.mark.parametrize(("spec", "scenario"), KILLED)
def test_killed_and_resumed_equals_uninterrupted(spec, scenario, killed, uninterrupted):
    folder, ends = killed
    word = f"{spec.kind}={spec.name}:{scenario}"
    assert ends[word] == SCENARIOS[scenario]
    trial = Trial(spec, folder / word.replace(":", "-"), accumulation=2)
    trainer = trial.build("run", save_strategy="steps", save_steps=1)
    trainer.train(resume_from_checkpoint=True)
    assert outcome_of(trainer).differences(uninterrupted(spec)) == []


def test_killed_while_selecting_and_started_again(killed, uninterrupted):
    folder, ends = killed
    word = f"{SELECTING.kind}={SELECTING.name}:select"
    assert ends[word] == -signal.SIGKILL
    trainer = Trial(SELECTING, folder / word.replace(":", "-"), accumulation=2).build("run")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    trainer = Trial(SELECTING, folder / word.replace(":", "-"), accumulation=2).build("run")
    trainer.train()
    wrong = outcome_of(trainer).differences(uninterrupted(SELECTING))
    assert set(wrong) <= {"spent"}  # features kept from the first try need not be paid again
