"""What a governor implements: telemetry in, a decision out. Decisions are functions of the tape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Action = Literal["continue", "stop"]


@dataclass(frozen=True)
class ProbeReading:
    """Losses of the fixed held-out examples at one moment.

    Attributes:
        mean: Mean per-example loss (nats per token).
        paired_delta: Mean of (previous - current) per-example loss; None at the first probe.
        paired_se: Standard error of ``paired_delta``; None at the first probe.
        num_examples: Examples probed.
    """

    mean: float
    paired_delta: float | None
    paired_se: float | None
    num_examples: int


@dataclass(frozen=True)
class Telemetry:
    """One look at the run, after optimizer step ``step``.

    Attributes:
        step: Optimizer steps done.
        max_steps: Planned optimizer steps.
        spent: By currency, cumulative since the first step of the run, resumes included; covers
            training, probes and selection.
        limits: The budget by currency; empty without one.
        compute: Spent amount of the governing currency; strictly increasing.
        compute_limit: Budget of that currency: the limit, or the plan's prediction for the full run.
        loss: Mean training loss of the last step, or None.
        probe: Reading, when one was taken at this step.
        learning_rate: Current learning rate.
        peak_learning_rate: Largest learning rate of the schedule so far.
        in_warmup: Whether the schedule is still rising.
        probe_spent: Governing currency spent on probes so far.
    """

    step: int
    max_steps: int
    spent: Mapping[str, float]
    limits: Mapping[str, float]
    compute: float
    compute_limit: float
    loss: float | None = None
    probe: ProbeReading | None = None
    learning_rate: float = 0.0
    peak_learning_rate: float = 0.0
    in_warmup: bool = False
    probe_spent: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able copy."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Telemetry:
        """Inverse of ``to_dict``."""
        probe = values.get("probe")
        return cls(**{**values, "probe": ProbeReading(**probe) if probe else None})


@dataclass(frozen=True)
class Decision:
    """What to do next and why. ``details`` are the numbers it rests on."""

    action: Action
    reason: str
    details: Mapping[str, Any] = field(default_factory=dict)


class Governor:
    """Base with neutral answers: never probes, always continues."""

    def next_probe(self, telemetry: Telemetry, probe_cost: float) -> bool:
        """Whether to probe now. ``telemetry.probe`` is None; cost is in the governing currency."""
        return False

    def observe(self, telemetry: Telemetry) -> Decision:
        """Take one look and decide. Called after each step; cheap when nothing is due."""
        return Decision("continue", "no rule applies")

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state; with it, the same tape gives the same decisions."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
