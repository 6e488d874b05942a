"""Two processes over gloo: ranks agree and weights move, or the plan refuses. One launch for all methods."""

import contextlib
import fcntl
import functools
import json
import os
from pathlib import Path

import pytest

from hf_eff.contracts.spec import KINDS
from hf_eff.hardware.probe import device_name
from hf_eff.registry import get_method, list_methods
from hf_eff.testing.torchrun import torchrun
from hf_eff.testing.toys import half

pytestmark = pytest.mark.distributed
WORKERS = Path(__file__).parent / "workers"
SPECS = [
    spec
    for kind in KINDS
    for spec in map(functools.partial(get_method, kind), list_methods(kind))
    if not spec.traits.needs_accelerator or device_name() != "cpu"
]
TRAINERS = ("trainer", "sft")
TRAINS = [(spec, trainer) for spec in SPECS if spec.traits.ddp for trainer in TRAINERS]


def _id(value):
    return value if isinstance(value, str) else f"{value.kind}={value.name}"


@contextlib.contextmanager
def locked_folder(factory, name):
    """A folder that all workers of the session share, one of them at a time."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def launched(factory, name):
    """What two ranks of a worker wrote; one launch however many processes run these tests."""
    with locked_folder(factory, name) as folder:
        if not (folder / "found.json").exists():
            torchrun(WORKERS / f"{name}.py", str(folder))
        return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return launched(tmp_path_factory, "two_ranks")


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    return launched(tmp_path_factory, "two_scorers")


@pytest.mark.parametrize(("spec", "trainer"), TRAINS, ids=_id)
def test_ranks_agree(found, spec, trainer):
    result = found[f"{spec.kind}={spec.name}-{trainer}"]
    assert "refused" not in result, result["refused"]
    assert result["world_size"] == 2
    for part in ("steps", "weights", "spent", "selection"):
        assert result[part][0] == result[part][1], part
    assert result["steps"][0] == 3
    assert result["weights"][0] != result["before"]


def test_what_cannot_run_on_two_is_refused_by_name(found):
    for spec in [half.SPEC, *(spec for spec in SPECS if not spec.traits.ddp)]:
        for trainer in TRAINERS:
            assert spec.address in found[f"{spec.kind}={spec.name}-{trainer}"]["refused"]


def test_ranks_that_drift_apart_are_noticed(found):
    weights = found["drifting"]["weights"]
    assert weights[0] != weights[1]


# shared scoring

SELECTORS = [spec for spec in SPECS if spec.kind == "selection"]


@pytest.mark.parametrize("spec", SELECTORS, ids=_id)
def test_two_processes_choose_as_one(scored, spec):
    result = scored[spec.name]
    for way in ("together", "stored"):
        first, second = result[way]
        assert first["positions"] == second["positions"] == result["alone"]["positions"], way
        assert first["scores"] == second["scores"] == result["alone"]["scores"], way


@pytest.mark.parametrize("spec", [spec for spec in SELECTORS if spec.traits.needs_model], ids=_id)
def test_scoring_is_shared_and_charged_alike(scored, spec):
    alone, (first, second) = scored[spec.name]["alone"], scored[spec.name]["together"]
    assert first["flops"] == second["flops"] >= alone["flops"]
    assert max(first["rows"], second["rows"]) < alone["rows"]
