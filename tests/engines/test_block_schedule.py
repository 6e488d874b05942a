"""Which blocks train at which step, against orders written out and counted."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_eff.engines.block_schedule import BlockSchedule, block_list, recommended_interval


def test_ascending_descending_and_fixed_orders():
    def blocks(**options):
        return [BlockSchedule(3, 2, **options).active_at(step)[0] for step in range(10)]

    assert blocks(mode="ascending") == [0, 0, 1, 1, 2, 2, 0, 0, 1, 1]
    assert blocks(mode="descending") == [2, 2, 1, 1, 0, 0, 2, 2, 1, 1]
    assert blocks(mode="fixed") == [2] * 10
    assert blocks(mode="ascending", start=2) == [2, 2, 0, 0, 1, 1, 2, 2, 0, 0]
    assert blocks(mode="descending", start=0) == [0, 0, 2, 2, 1, 1, 0, 0, 2, 2]
    assert blocks(mode="fixed", start=1) == [1] * 10


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("mode", ["ascending", "descending", "random"])
def test_every_block_gets_exactly_k_steps_a_cycle_the_first_included(mode, every):
    schedule = BlockSchedule(5, every, mode, seed=3)
    for cycle in range(6):
        visits = [schedule.active_at(cycle * 5 * every + step)[0] for step in range(5 * every)]
        runs = [visits[i * every : (i + 1) * every] for i in range(5)]
        assert all(len(set(run)) == 1 for run in runs)
        assert sorted(run[0] for run in runs) == list(range(5))


def test_random_orders_are_reshuffled_keyed_by_seed_and_uniform():
    orders = [
        tuple(BlockSchedule(3, 1, "random", seed=0).active_at(3 * c + s)[0] for s in range(3)) for c in range(600)
    ]
    assert orders == [
        tuple(BlockSchedule(3, 1, "random", seed=0).active_at(3 * c + s)[0] for s in range(3)) for c in range(600)
    ]
    other = [tuple(BlockSchedule(3, 1, "random", seed=1).active_at(3 * c + s)[0] for s in range(3)) for c in range(600)]
    assert orders != other
    # 600 draws over 6 permutations: mean 100, standard deviation 9.1; four of them are 36.
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6
    assert max(abs(count - 100) for count in counts) < 37


def test_shuffled_once_repeats_its_first_order():
    schedule = BlockSchedule(6, 1, "shuffled", seed=4)
    sweeps = [[schedule.active_at(6 * sweep + slot) for slot in range(6)] for sweep in range(5)]
    assert all(sweep == sweeps[0] for sweep in sweeps)
    assert sorted(sweeps[0]) == [(block,) for block in range(6)]
    assert sweeps[0] == [BlockSchedule(6, 1, "random", seed=4).active_at(step) for step in range(6)]


@pytest.mark.parametrize("active", [1, 2, 5])
def test_layers_are_drawn_uniformly_without_replacement(active):
    blocks, draws = 8, 10_000
    schedule = BlockSchedule(blocks, 3, "sample", seed=1, num_active=active)
    found = [schedule.active_at(3 * draw) for draw in range(draws)]
    assert all(len(set(each)) == active and list(each) == sorted(each) for each in found)
    counts = [sum(block in each for each in found) for block in range(blocks)]
    mean = draws * active / blocks
    # Without replacement the counts vary less: the factor makes the sum a chi-square of blocks - 1 degrees.
    statistic = sum((count - mean) ** 2 / mean for count in counts) * (blocks - 1) / (blocks - active)
    assert statistic < 24.3  # 0.1 % point for 7 degrees of freedom
    pairs = {each for each in found if active == 2}
    assert len(pairs) == (math.comb(blocks, 2) if active == 2 else 0)


def test_a_draw_lasts_exactly_k_steps_from_the_first_on():
    schedule = BlockSchedule(50, 4, "sample", seed=0, num_active=3)
    draws = [schedule.active_at(step) for step in range(40)]
    # The callbacks in use draw at step 0 and again at step 1.
    assert [draws[i] != draws[i - 1] for i in range(1, 40)] == [i % 4 == 0 for i in range(1, 40)]


@given(
    mode=st.sampled_from(["ascending", "descending", "random", "shuffled", "sample"]),
    blocks=st.integers(1, 12),
    every=st.integers(1, 5),
    seed=st.integers(0, 9),
    step=st.integers(0, 10_000),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_what_is_active_is_a_pure_function_of_the_step(mode, blocks, every, seed, step, data):
    active = data.draw(st.integers(1, blocks)) if mode == "sample" else 1
    schedule = BlockSchedule(blocks, every, mode, seed, num_active=active)
    found = schedule.active_at(step)
    assert found == BlockSchedule(**schedule.to_dict()).active_at(step) == schedule.active_at(step - step % every)
    assert len(found) == active
    assert set(found) <= set(range(blocks))
    if mode != "sample":
        start = step - step % schedule.cycle_steps
        assert schedule.visited(schedule.cycle_steps) == set(range(blocks))
        cycle = [schedule.active_at(start + each * every)[0] for each in range(blocks)]
        assert sorted(cycle) == list(range(blocks))


def test_visited_names_the_blocks_of_a_short_run():
    assert BlockSchedule(5, 3, "ascending").visited(7) == {0, 1, 2}
    assert BlockSchedule(5, 3, "fixed", start=2).visited(100) == {2}
    schedule = BlockSchedule(9, 2, "sample", num_active=2)
    assert schedule.visited(7) == {block for step in range(7) for block in schedule.active_at(step)}
    assert schedule.cycle_steps == 10
    assert block_list([2, 1], limit=1) == "1 and 1 more"


def test_schedule_draws_nothing_from_global_generators():
    states = random.getstate(), torch.get_rng_state()
    BlockSchedule(7, 2, "random", seed=5).active_at(123)[0]
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


def test_recommended_interval_is_the_published_rule():
    # n = 51,200 examples, B = 16, D = 32: n / (B D) = 100; a tenth and ten times of it are clipped.
    assert [recommended_interval(n // 16, 32) for n in (51_200, 5_120, 512_000, 40_960)] == [100, 50, 100, 80]
    assert recommended_interval(0, 32) == 50


def test_schedule_round_trips_through_plain_values():
    schedule = BlockSchedule(4, 7, "descending", seed=9, start=2)
    assert BlockSchedule(**schedule.to_dict()) == schedule
