import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_eff.contracts.cost import Facts, PoolFacts, RunFacts
from hf_eff.engines.facts import model_facts_from_config
from hf_eff.errors import PlanError
from hf_eff.memory_forecast import Setup
from hf_eff.numerics.flops import everything_trains, recompute_flops, training_flops
from hf_eff.numerics.largest_fit import largest
from hf_eff.numerics.planned_step import planned_shape
from hf_eff.numerics.trainable_blocks import trainable_blocks
from hf_eff.testing.tiny import tiny_config


def setup(memory="full", batch_size=4, length=32, kwargs=None, **run):
    return Setup(
        memory,
        kwargs or {},
        Facts(
            model=model_facts_from_config(tiny_config()),
            pool=PoolFacts(num_rows=None, mean_tokens=length, max_tokens=length),
            run=RunFacts(batch_size=batch_size, length=length, **run),
        ),
    )


@given(
    st.lists(st.floats(0, 100), min_size=1, max_size=60),
    st.floats(0, 3000),
)
def test_the_largest_number_is_the_one_that_a_scan_finds(steps, budget):
    needs = [math.fsum(steps[: number + 1]) for number in range(len(steps))]
    scanned = sum(need <= budget for need in needs)
    assert largest(lambda number: needs[number - 1], budget, len(needs)) == scanned


NEEDS = {
    "straight": lambda n: 7 * n + 3,
    "square": lambda n: n**2,
    "cube": lambda n: n**3 + 5 * n,
    "root": lambda n: 9 * math.sqrt(n),
}


@pytest.mark.parametrize("need", NEEDS.values(), ids=NEEDS)
@pytest.mark.parametrize("budget", [10.0, 1e4, 1e7])
def test_few_looks_are_enough(need, budget):
    seen = []
    found = largest(lambda number: seen.append(number) or need(number), budget, 1 << 24)
    assert found == 1 << 24 or (need(found) <= budget < need(found + 1))
    assert len(seen) <= 60


def test_even_growth_takes_a_handful_of_looks():
    seen = []
    assert largest(lambda number: seen.append(number) or 7.0 * number + 3, 1e6, 1 << 24) == 142856
    assert len(seen) <= 6


@pytest.mark.parametrize("memory", ["full", "badam", "lora", "mezo", "row_chunks", "lora+badam"])
@pytest.mark.parametrize("size", ["batch_size", "length"])
def test_what_fits_is_exact_against_brute_force(memory, size):
    start = setup(memory, kwargs={"badam": {"switch_every": 1}} if "badam" in memory else {})
    needs = [start.resized(**{size: amount}).forecast().total for amount in range(1, 27)]
    assert needs == sorted(needs)
    for budget in (needs[0] - 1, needs[0], needs[17], needs[23] + 1):
        scanned = sum(need <= budget for need in needs)
        assert start.most(size, budget) == scanned < 26


def test_what_fits_ends_at_a_limit():
    start = setup()
    assert start.most("length", 1e12, limit=512) == 512
    assert start.most("length", start.resized(length=511).forecast().total, limit=512) == 511


def test_a_setup_that_cannot_work_says_so():
    with pytest.raises(PlanError, match="accelerator"):
        setup("offload").forecast()


@pytest.mark.parametrize("how", ["checkpointing", "flag"])
def test_full_recomputation_is_charged_exactly(how):
    start = setup("checkpointing") if how == "checkpointing" else setup(checkpointing=True)
    model, shape = start.facts.model, planned_shape(start.facts)
    expected = training_flops(model, shape) + recompute_flops(model, shape)
    assert start.forecast().step_flops == pytest.approx(expected, rel=1e-12)
    assert setup().forecast().step_flops == training_flops(model, shape)


def test_recomputation_ends_at_the_lowest_trained_layer():
    """A method that takes turns runs only the layers above the active one again: half of them on average."""
    start = setup("checkpointing+badam", kwargs={"badam": {"switch_every": 2}})
    model, shape = start.facts.model, planned_shape(start.facts)
    parts = trainable_blocks(model)
    steps = [training_flops(model, shape, part) + recompute_flops(model, shape, part) for part in parts]
    assert start.forecast().step_flops == pytest.approx(sum(steps) / len(steps), rel=0.01)
    everything = recompute_flops(model, shape, everything_trains(model))
    assert start.forecast().step_flops < setup("badam").forecast().step_flops + 0.7 * everything


def test_nothing_is_recomputed_without_a_backward():
    assert setup("mezo", checkpointing=True).forecast().step_flops == setup("mezo").forecast().step_flops


def test_every_second_layer_costs_half_the_recomputation():
    whole, half = setup("checkpointing"), setup("checkpointing", kwargs={"checkpointing": {"every_n_layers": 2}})
    plain = setup().forecast().step_flops
    assert half.forecast().step_flops - plain == pytest.approx((whole.forecast().step_flops - plain) / 2)


def test_accumulation_multiplies_recomputation():
    once, twice = setup("checkpointing"), setup("checkpointing", accumulation=2)
    assert twice.forecast().step_flops == pytest.approx(2 * once.forecast().step_flops)


def test_the_rest_of_a_setup_stays():
    start = setup("badam", batch_size=3)
    longer = start.resized(length=40)
    assert (longer.memory, longer.facts.run.batch_size, longer.facts.pool.max_tokens) == ("badam", 3, 40)
    assert dataclasses.replace(longer, facts=start.facts) == start
