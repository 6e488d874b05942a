import numpy as np
from torch.utils.data import DataLoader

from hf_eff.engines.row_phases import RowPhase, RowPhases, rows_of_steps
from hf_eff.engines.window_sampler import WindowSampler


def scene(rows=(0, 2, 4, 6, 8), window_steps=3, rows_per_step=4):
    phases = RowPhases(1, rows_per_step, window_steps)
    phases.begin(RowPhase(0, "selection", np.array(rows), "", "selection"))
    step = {"now": 0}
    places = np.full(10, -1)
    places[::2] = [10, 20, 30, 40, 50]
    return phases, step, WindowSampler(phases, places, lambda: step["now"])


def test_a_window_is_drawn_from_its_first_step_wherever_the_run_is_in_it():
    phases, step, sampler = scene()
    place = {0: 10, 2: 20, 4: 30, 6: 40, 8: 50}
    expected = [place[row] for row in rows_of_steps(phases, 3, 3).tolist()]
    for now in (3, 4, 5):
        step["now"] = now
        assert list(sampler) == expected
    assert len(sampler) == 12
    step["now"] = 6
    assert list(sampler) != expected


def test_a_window_that_has_begun_keeps_its_rows():
    phases, _step, sampler = scene()
    before, begun = list(sampler), iter(sampler)
    first = next(begun)
    phases.begin(RowPhase(0, "refresh", np.array([0, 2]), "", "selection/phase-1"))
    assert [first, *begun] == before
    assert set(sampler) == {10, 20}


def test_workers_fetch_the_same_rows():
    _phases, _, sampler = scene()
    data = list(range(100))
    alone = [batch.tolist() for batch in DataLoader(data, batch_size=4, sampler=sampler)]
    workers = DataLoader(data, batch_size=4, sampler=sampler, num_workers=2)
    assert [batch.tolist() for batch in workers] == alone
