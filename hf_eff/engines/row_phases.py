"""Which rows each optimizer step trains on when the choice of rows changes during a run.

A run is cut into windows of a fixed number of optimizer steps, and into phases, each of which begins at a window and
trains on rows of its own. Row k of a phase, counted from 0, is

    rows[permutation(seed, phase, k // n)[k % n]],     n rows in the phase

so that the order is a function of the step and the recorded phases, with no state of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hf_eff.errors import CheckpointError, OptionError
from hf_eff.numerics.keyed_random import make_key, random_words

FORMAT = "hf_eff.data_phases"
VERSION = 1


@dataclass(frozen=True, eq=False)
class RowPhase:
    """One choice of rows and since when it is in use.

    Attributes:
        from_step: First optimizer step that trains on it, from 0.
        action: How it came about: ``"selection"`` for the choice before training, else the governor's action.
        rows: [n] int64 numbers of the rows in the user's dataset, ascending.
        digest: Identity of the choice, ``Selection.digest``.
        manifest: Folder of its manifest, relative to the run's.
    """

    from_step: int
    action: str
    rows: np.ndarray
    digest: str
    manifest: str

    def __post_init__(self) -> None:
        """Sort the rows, so that the order of training depends on which rows they are only."""
        object.__setattr__(self, "rows", np.sort(np.asarray(self.rows, dtype=np.int64)))


@dataclass
class RowPhases:
    """The phases of a run so far.

    Attributes:
        seed: Seed of the data's order.
        rows_per_step: Rows of one optimizer step over all processes.
        window_steps: Optimizer steps of a window.
        phases: In order; the last one is in use.
    """

    seed: int
    rows_per_step: int
    window_steps: int
    phases: list[RowPhase] = field(default_factory=list)

    @property
    def number(self) -> int:
        """Number of the phase in use, from 0."""
        return len(self.phases) - 1

    def begin(self, phase: RowPhase) -> None:
        """Add a phase.

        Raises:
            OptionError: It does not begin at a window, or before the phase that it ends.
        """
        earliest = self.phases[-1].from_step if self.phases else 0
        if phase.from_step % self.window_steps or phase.from_step < earliest:
            raise OptionError(
                f"a data phase begins at a multiple of {self.window_steps} steps from {earliest} on, "
                f"got {phase.from_step}."
            )
        self.phases.append(phase)

    def of_step(self, step: int) -> int:
        """Number of the phase that an optimizer step trains on; the latest where several begin at once."""
        return max(number for number, phase in enumerate(self.phases) if phase.from_step <= step)

    def next_boundary(self, step: int) -> int:
        """First step from ``step`` on at which a phase may begin."""
        return -(-step // self.window_steps) * self.window_steps

    def record(self) -> dict[str, Any]:
        """JSON-able: with the manifests it names, everything that ``rows_of_steps`` needs."""
        named = ("from_step", "action", "digest", "manifest")
        return {
            "format": FORMAT,
            "format_version": VERSION,
            "seed": self.seed,
            "rows_per_step": self.rows_per_step,
            "window_steps": self.window_steps,
            "phases": [
                {"phase": number, "rows": len(phase.rows), **{name: getattr(phase, name) for name in named}}
                for number, phase in enumerate(self.phases)
            ],
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any], rows: Sequence[np.ndarray]) -> RowPhases:
        """Inverse of ``record``.

        Args:
            record: What ``record`` returned.
            rows: The rows of each phase.

        Raises:
            CheckpointError: It is no such record, or the rows are not those of its phases.
        """
        if record.get("format") != FORMAT or record.get("format_version") != VERSION:
            raise CheckpointError(f"this is no record of data phases of version {VERSION}: {record.get('format')!r}.")
        if [len(each) for each in rows] != [entry["rows"] for entry in record["phases"]]:
            raise CheckpointError("the manifests of the data phases hold other numbers of rows than were recorded.")
        made = cls(int(record["seed"]), int(record["rows_per_step"]), int(record["window_steps"]))
        for entry, numbers in zip(record["phases"], rows, strict=True):
            named = {name: entry[name] for name in ("from_step", "action", "digest", "manifest")}
            made.begin(RowPhase(rows=numbers, **named))
        return made


def rows_of_steps(phases: RowPhases, first: int, count: int = 1) -> np.ndarray:
    """[count * rows_per_step] rows of ``count`` optimizer steps of one phase, in the order they are trained on.

    Micro-batches follow each other; within one, the processes do, each with its rows.

    Args:
        phases: The phases of the run.
        first: First optimizer step, from 0.
        count: Number of steps.
    """
    number = phases.of_step(first)
    phase, size = phases.phases[number], phases.rows_per_step
    places = np.arange((first - phase.from_step) * size, (first - phase.from_step + count) * size)
    passes, within = np.divmod(places, len(phase.rows))
    taken = np.empty(len(places), dtype=np.int64)
    for each in np.unique(passes):
        order = _permutation(len(phase.rows), phases.seed, number, int(each))
        taken[passes == each] = order[within[passes == each]]
    return np.asarray(phase.rows[taken])


def _permutation(size: int, *key: int) -> np.ndarray:
    """[size] positions in an order that is a hash of the key."""
    words = random_words(torch.tensor([make_key(*key)]), size)[0]
    return np.argsort(words.numpy(), kind="stable")


@dataclass
class RowOrder:
    """All valid rows, best first, and the stretch of them that is in use.

    The rows that a method chose come first, in its order of preference, then the others by score: a method that does
    not simply take the best keeps its choice as the first band.

    Attributes:
        rows: [m] numbers of the rows in the user's dataset, distinct.
        scores: [m] their scores.
        start, stop: The stretch in use.
    """

    WIDENING = 1.5

    rows: np.ndarray
    scores: np.ndarray
    start: int
    stop: int

    @property
    def band(self) -> tuple[int, int] | None:
        """The next stretch of the same length, or None where too few rows are left."""
        size = self.stop - self.start
        return (self.stop, self.stop + size) if self.stop + size <= len(self.rows) else None

    @property
    def wider(self) -> tuple[int, int] | None:
        """The stretch made 1.5 times as long, as far as there are rows; None where there is none left."""
        wanted = self.start + int(np.ceil(self.WIDENING * (self.stop - self.start)))
        return (self.start, min(wanted, len(self.rows))) if self.stop < len(self.rows) else None

    def state_dict(self) -> dict[str, Any]:
        """The order and the stretch; tensors for the side-car."""
        return {
            "rows": torch.from_numpy(self.rows),
            "scores": torch.from_numpy(self.scores),
            "start": self.start,
            "stop": self.stop,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> RowOrder:
        """Inverse of ``state_dict``."""
        return cls(state["rows"].numpy(), state["scores"].numpy(), int(state["start"]), int(state["stop"]))
