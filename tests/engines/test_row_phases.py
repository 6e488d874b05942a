import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_eff.engines.row_phases import RowOrder, RowPhase, RowPhases, rows_of_steps
from hf_eff.errors import CheckpointError, OptionError
from hf_eff.numerics.keyed_random import make_key, random_words


def phases_of(*parts, rows_per_step=4, window_steps=2, seed=7):
    """Phases from (first step, rows)."""
    made = RowPhases(seed, rows_per_step, window_steps)
    for number, (step, rows) in enumerate(parts):
        made.begin(RowPhase(step, "widen", np.asarray(rows), f"digest {number}", f"selection/phase-{number}"))
    return made


def literal_order(rows, seed, phase, count):
    """The first rows of a phase, pass after pass."""
    import torch

    taken, number = [], 0
    while len(taken) < count:
        words = random_words(torch.tensor([make_key(seed, phase, number)]), len(rows))[0].tolist()
        taken += [sorted(rows)[place] for place in sorted(range(len(rows)), key=words.__getitem__)]
        number += 1
    return taken[:count]


def test_rows_follow_a_literal_reference():
    phases = phases_of((0, [3, 1, 2, 9, 5]), (4, [8, 4, 11]))
    whole = rows_of_steps(phases, 0, 4).tolist() + rows_of_steps(phases, 4, 3).tolist()
    assert whole == literal_order([3, 1, 2, 9, 5], 7, 0, 16) + literal_order([8, 4, 11], 7, 1, 12)
    assert literal_order([8, 4, 11], 7, 1, 3) != literal_order([8, 4, 11], 7, 0, 3)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 6), st.integers(0, 2**31))
def test_every_pass_takes_every_row_once_and_windows_join(rows, rows_per_step, steps, seed):
    phases = phases_of((0, range(rows)), rows_per_step=rows_per_step, seed=seed)
    whole = rows_of_steps(phases, 0, steps).tolist()
    assert whole == [row for step in range(steps) for row in rows_of_steps(phases, step).tolist()]
    for start in range(0, len(whole) - rows + 1, rows):
        assert sorted(whole[start : start + rows]) == list(range(rows))


def test_the_latest_phase_counts():
    phases = phases_of((0, [1, 2]), (2, [3, 4]), (2, [5, 6]))
    assert [phases.of_step(step) for step in range(4)] == [0, 0, 2, 2]
    assert phases.number == 2
    assert [phases.next_boundary(step) for step in (0, 1, 2, 3)] == [0, 2, 2, 4]


def test_a_record_makes_the_same_phases():
    phases = phases_of((0, [3, 1, 2]), (4, [8, 4, 11, 0]))
    record = json.loads(json.dumps(phases.record()))
    again = RowPhases.from_record(record, [phase.rows for phase in phases.phases])
    assert rows_of_steps(again, 0, 4).tolist() == rows_of_steps(phases, 0, 4).tolist()
    assert rows_of_steps(again, 5).tolist() == rows_of_steps(phases, 5).tolist()
    with pytest.raises(CheckpointError, match="other numbers of rows"):
        RowPhases.from_record(record, [np.arange(3), np.arange(5)])
    with pytest.raises(CheckpointError, match="no record of data phases"):
        RowPhases.from_record({**record, "format": "poem"}, [])


@pytest.mark.parametrize("step", [3, 2])
def test_a_phase_begins_at_a_window_and_after_the_one_before(step):
    phases = phases_of((0, [1]), (4, [2]))
    with pytest.raises(OptionError, match="begins at a multiple of 2 steps from 4 on"):
        phases.begin(RowPhase(step, "widen", np.array([1]), "", ""))


def test_bands_and_widening_walk_down_the_order():
    order = RowOrder(np.arange(10), np.zeros(10, dtype=np.float32), 0, 3)
    assert (order.band, order.wider) == ((3, 6), (0, 5))
    order.start, order.stop = 3, 6
    assert (order.band, order.wider) == ((6, 9), (3, 8))
    order.start, order.stop = 3, 8
    assert (order.band, order.wider) == (None, (3, 10))
    order.stop = 10
    assert (order.band, order.wider) == (None, None)
    again = RowOrder.from_state(order.state_dict())
    assert (again.rows.tolist(), again.start, again.stop) == (list(range(10)), 3, 10)
