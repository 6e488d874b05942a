"""Every family of directions lowers the loss of SmolLM2 with adapters; first-order training lowers it further."""

import importlib.util
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

STEPS, START, REACHED = 80, 2.88, 2.82
FIRST_ORDER_STEPS, FIRST_ORDER_REACHED = 12, 1.5


def bench():
    path = Path(__file__).parents[1] / "benchmarks" / "zeroth_order_learning.py"
    spec = importlib.util.spec_from_file_location("zeroth_order_learning", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BENCH = bench()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("smollm2"))


@pytest.mark.parametrize("family", BENCH.FAMILIES)
def test_a_family_reaches_the_stated_loss_in_eighty_steps(cache, family):
    losses = BENCH.curve(family, STEPS, cache)
    assert losses[0] > START
    assert losses[STEPS] < REACHED, losses


def test_first_order_training_goes_further_in_fewer_steps(cache):
    losses = BENCH.curve("AdamW", FIRST_ORDER_STEPS, cache)
    assert losses[0] > START
    assert losses[FIRST_ORDER_STEPS] < FIRST_ORDER_REACHED, losses
