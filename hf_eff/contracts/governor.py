"""What a governor implements: telemetry in, a decision out. Decisions are functions of the tape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Action = Literal["continue", "stop", "refresh", "next_band", "widen", "switch_memory", "cooldown"]
"""``refresh`` scores the pool again, ``next_band`` takes the next rows by score, ``widen`` adds them; ``switch_memory``
changes how the update fits; ``cooldown`` lowers the learning rate to zero and then stops."""
Phase = Literal["main", "cooldown"]


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
class DriftReading:
    """How far the pool's ranking has moved since the rows in use were chosen.

    Attributes:
        age: Governing currency spent on training since then.
        correlation: Spearman's rank correlation of a fixed sample's losses, then and now.
        num_examples: Rows of that sample.
    """

    age: float
    correlation: float
    num_examples: int


@dataclass(frozen=True)
class Offer:
    """Something the run could do at this look instead of going on unchanged.

    Attributes:
        action: What it is.
        target: Which one, where there are several, such as ``"checkpointing off"``; empty otherwise.
        fixed_cost: Governing currency that it takes before training goes on.
        cost_factor: Cost of a training token afterwards, relative to now; below 1 is cheaper.
        fades: Whether its effect wears off as training goes on (scores age; a wider subset does not).
        feasible: Whether it can be done now.
        why_not: Why it cannot, else empty.
    """

    action: Action
    target: str = ""
    fixed_cost: float = 0.0
    cost_factor: float = 1.0
    fades: bool = False
    feasible: bool = True
    why_not: str = ""

    @property
    def name(self) -> str:
        """``action`` or ``action:target``: how tables and logs call it."""
        return f"{self.action}:{self.target}" if self.target else self.action


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
        overhead_spent: Governing currency spent on probes and on reallocations so far; the choice before the first
            step is not among them.
        phase: ``cooldown`` once the learning rate is being lowered for the end.
        offers: What could be done at this look, feasible or not; empty where the governor may only stop.
        drift: Reading, when one was taken at this step.
        data_phase: Number of the row choice in use, from 0; each refresh, band or widening begins a new one.
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
    overhead_spent: float = 0.0
    phase: Phase = "main"
    offers: tuple[Offer, ...] = ()
    drift: DriftReading | None = None
    data_phase: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able copy."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Telemetry:
        """Inverse of ``to_dict``."""
        probe, drift = values.get("probe"), values.get("drift")
        parts = {
            "probe": ProbeReading(**probe) if probe else None,
            "drift": DriftReading(**drift) if drift else None,
            "offers": tuple(Offer(**offer) for offer in values.get("offers", ())),
        }
        return cls(**{**values, **parts})


@dataclass(frozen=True)
class Decision:
    """What to do next and why. ``details`` are the numbers it rests on; ``target`` is that of the offer taken."""

    action: Action
    reason: str
    details: Mapping[str, Any] = field(default_factory=dict)
    target: str = ""


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
