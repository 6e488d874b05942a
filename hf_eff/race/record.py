"""What a race knows: one file, replaced as a whole after every slice, from which it goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_eff.engines.decision_log import plain
from hf_eff.errors import CheckpointError
from hf_eff.files import write_json

RACE = "race.json"
_FORMAT, _VERSION = "hf_eff.race", 1
_ROUNDING = 1e-12
"""Share of a limit that is left alone, so that adding up amounts of several runs cannot pass it by rounding."""
_WHOLE = ("tokens", "steps")
"""Currencies that add up exactly."""


@dataclass(frozen=True)
class Reading:
    """Held-out loss of one run at one moment.

    Attributes:
        step: Optimizer steps done.
        position: Share of the shared budget that the run has spent, readings left out.
        mean: Mean per-example loss, or None when it is not finite.
        paired_delta, paired_se: Against the run's reading before, as in ``ProbeReading``.
        learning_rate: Of the last step, or None before the first.
    """

    step: int
    position: float
    mean: float | None
    paired_delta: float | None
    paired_se: float | None
    learning_rate: float | None


@dataclass(frozen=True)
class Advance:
    """What became of one slice.

    Attributes:
        steps: Optimizer steps done, all slices together.
        spent: Amounts by currency, all slices together, readings left out.
        reading_spent: What the readings of this slice cost.
        readings: The new ones, oldest first; none when no step was done.
        probe: State of the held-out examples' losses.
        checkpoint: Name of the checkpoint to go on from, or None.
        ended: Why the run cannot go on, else empty.
        failed: Whether it broke, so that it cannot win.
    """

    steps: int
    spent: Mapping[str, float]
    reading_spent: Mapping[str, float] = field(default_factory=dict)
    readings: tuple[Reading, ...] = ()
    probe: Mapping[str, Any] | None = None
    checkpoint: str | None = None
    ended: str = ""
    failed: bool = False


@dataclass
class RunRecord:
    """One run so far; the attributes are those of ``Advance``, added up."""

    name: str
    steps: int = 0
    spent: dict[str, float] = field(default_factory=dict)
    reading_spent: dict[str, float] = field(default_factory=dict)
    readings: list[Reading] = field(default_factory=list)
    probe: dict[str, Any] | None = None
    checkpoint: str | None = None
    ended: str = ""
    failed: bool = False

    @property
    def loss(self) -> float:
        """Held-out loss now; infinite where it is unknown or not finite."""
        mean = self.readings[-1].mean if self.readings else None
        return math.inf if mean is None else mean

    @property
    def position(self) -> float:
        """Share of the shared budget at the last reading."""
        return self.readings[-1].position if self.readings else 0.0

    def take(self, step: Advance) -> None:
        """Add a slice."""
        self.steps, self.spent = step.steps, dict(step.spent)
        for name, amount in step.reading_spent.items():
            self.reading_spent[name] = self.reading_spent.get(name, 0.0) + amount
        self.readings += step.readings
        self.probe = dict(step.probe) if step.probe is not None else self.probe
        self.checkpoint = step.checkpoint or self.checkpoint
        self.ended, self.failed = step.ended, step.failed


@dataclass
class RaceRecord:
    """The whole race so far.

    Attributes:
        digest: Of its plan.
        limits: The shared limits that add up.
        runs: By name; the turns follow this order.
        round: Rounds begun.
        level: Share of the budget that each live run may reach in this round.
        waiting: Runs that are still to advance in it.
        moved: Whether a run has done a step in it.
        idle: Rounds in a row before it in which none did.
        best_rate: Best gain rate seen early, nats per whole budget.
        judged: What each round found and decided.
        ended: Why the race is over, else empty.
    """

    digest: str
    limits: dict[str, float]
    runs: dict[str, RunRecord]
    round: int = 0
    level: float = 0.0
    waiting: list[str] = field(default_factory=list)
    moved: bool = False
    idle: int = 0
    best_rate: float = 0.0
    judged: list[dict[str, Any]] = field(default_factory=list)
    ended: str = ""

    @property
    def live(self) -> list[RunRecord]:
        """Runs that may go on."""
        return [run for run in self.runs.values() if not run.ended]

    @property
    def winner(self) -> RunRecord | None:
        """The run with the lowest held-out loss, stopped or not; None while there is none."""
        known = [run for run in self.runs.values() if not run.failed and math.isfinite(run.loss)]
        return min(known, key=lambda run: run.loss, default=None)

    def total(self) -> dict[str, float]:
        """Amounts spent by all runs and on all readings."""
        return {
            name: math.fsum(
                part.get(name, 0.0) for run in self.runs.values() for part in (run.spent, run.reading_spent)
            )
            for name in self.limits
        }

    def left(self) -> dict[str, float]:
        """What nobody has spent, by currency; never below zero."""
        total = self.total()
        safe = {name: limit * (1.0 - (0.0 if name in _WHOLE else _ROUNDING)) for name, limit in self.limits.items()}
        return {name: max(0.0, limit - total[name]) for name, limit in safe.items()}

    def until(self) -> dict[str, float]:
        """What a live run may spend in all by the end of this round; rounding costs it no step."""
        return {name: self.level * limit * (1.0 + _ROUNDING) for name, limit in self.limits.items()}

    def share(self, spent: Mapping[str, float]) -> float:
        """An amount as a share of the scarcest shared limit."""
        return max(spent.get(name, 0.0) / limit for name, limit in self.limits.items())

    def left_share(self) -> float:
        """What is left of the scarcest limit, in [0, 1]."""
        left = self.left()
        return min(left[name] / limit for name, limit in self.limits.items())

    def write(self, folder: Path) -> None:
        """Write ``race.json``."""
        runs = {name: asdict(run) for name, run in self.runs.items()}
        write_json(folder / RACE, plain({"format": _FORMAT, "format_version": _VERSION, **vars(self), "runs": runs}))

    @classmethod
    def read(cls, folder: Path) -> RaceRecord | None:
        """What ``write`` wrote, or None where no race has begun.

        Raises:
            CheckpointError: The file is no record of a race.
        """
        path = folder / RACE
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if (values.pop("format"), values.pop("format_version")) != (_FORMAT, _VERSION):
                raise ValueError
            runs = {
                name: RunRecord(**{**run, "readings": [Reading(**each) for each in run["readings"]]})
                for name, run in values.pop("runs").items()
            }
            return cls(**values, runs=runs)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise CheckpointError(
                f"{str(path)!r} is no record of a race; restore it, or begin in an empty folder."
            ) from None
