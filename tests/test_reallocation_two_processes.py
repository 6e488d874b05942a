"""Two processes over gloo: one decision, one choice of rows, one order, the same weights, also after a resume."""

import json
from pathlib import Path

import numpy as np
import pytest

from hf_eff.engines.row_phases import rows_of_steps
from hf_eff.reallocation import read_phases
from hf_eff.testing.tiny import tiny_pool, tiny_tokenizer, tokenised
from hf_eff.testing.torchrun import torchrun

pytestmark = pytest.mark.distributed
WORKER = Path(__file__).parent / "workers" / "reallocation.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    torchrun(WORKER, str(folder))
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("part", ["weights", "resumed", "phases", "events", "best", "spent", "governor"])
def test_ranks_agree(found, part):
    assert found[part][0] == found[part][1]


def test_the_decisions_are_carried_out(found):
    assert found["events"][0] == [["refresh", 2], ["widen", 4]]
    best, restored = found["best"][0]
    assert best == restored is not None


def test_resumed_equals_uninterrupted(found):
    assert found["resumed"][0] == found["weights"][0]


def test_both_ranks_together_train_on_the_recorded_rows(found, folder):
    phases = read_phases(folder / "run")
    assert phases.rows_per_step == 2 * 2 * 8
    pool = tokenised(tiny_pool(64), tiny_tokenizer())
    numbers = np.concatenate([rows_of_steps(phases, step) for step in range(6)])
    micro_batches = [batch for pair in zip(*found["rows"], strict=True) for batch in pair]
    delivered = [row for batch in micro_batches for row in batch]
    assert delivered == [pool[int(number)]["input_ids"] for number in numbers]
