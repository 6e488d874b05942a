"""The order of the rows in windows, so that which rows are trained on may change between two of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from hf_eff.engines.row_phases import RowPhases, rows_of_steps


class WindowSampler(torch.utils.data.Sampler[int]):
    """Rows of the window that the current optimizer step lies in, a constant number of them.

    The stock loop takes a window for an epoch. Each time it starts one, the whole window is drawn up from the phases
    as they are then, so that rows fetched ahead, by workers or by the loader, are those of the window they belong to.

    Args:
        phases: The phases of the run; read, never changed.
        places: [N] position in the loader's dataset of each row of the user's dataset, -1 where there is none.
        step: Optimizer steps done.
    """

    def __init__(self, phases: RowPhases, places: np.ndarray, step: Callable[[], int]) -> None:
        self._phases, self._places, self._step = phases, places, step

    def __len__(self) -> int:
        """Rows of a window."""
        return self._phases.window_steps * self._phases.rows_per_step

    def __iter__(self) -> Iterator[int]:
        """Positions of the window's rows, from its start also where a run is resumed inside it."""
        window = self._phases.window_steps
        rows = rows_of_steps(self._phases, self._step() // window * window, window)
        return iter(self._places[rows].tolist())
