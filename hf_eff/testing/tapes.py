"""Runs without a model: telemetry that a governor sees, made from a loss curve and a noise seed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from hf_eff.contracts.governor import Decision, Governor, ProbeReading, Telemetry

Curve = Callable[[float], float]


def falling(compute: float) -> float:
    """A power law that still falls: each further unit pays a little less."""
    return 1.5 + 3.0 * (1.0 + compute) ** -0.4


def steep(compute: float) -> float:
    """A loss that falls by the same amount with every unit."""
    return 40.0 - 0.04 * compute


def flat(compute: float) -> float:
    """A loss that dropped early and then stays."""
    return 2.0 + 2.0 * math.exp(-compute / 4.0)


def rising(compute: float) -> float:
    """Over-fitting: falls, then climbs."""
    return 2.0 + 2.0 * math.exp(-compute / 4.0) + 0.02 * max(0.0, compute - 20.0)


CURVES: tuple[Curve, ...] = (falling, flat, rising)


@dataclass(frozen=True)
class Tape:
    """Conditions of one simulated run.

    Attributes:
        curve: Held-out loss after some compute.
        steps: Planned steps, one unit of compute each.
        limit: Compute limit; infinite means no budget.
        noise: Standard deviation of a probe's mean.
        seed: Seed of the noise.
        probe_cost: Compute of one probe.
    """

    curve: Curve = falling
    steps: int = 120
    limit: float = math.inf
    noise: float = 0.005
    seed: int = 0
    probe_cost: float = 0.2


@dataclass
class Recording:
    """What a governor was asked, saw and said, one entry a step.

    Attributes:
        questions: Telemetry that ``next_probe`` was asked about.
        telemetry: Telemetry that ``observe`` was given.
        decisions: What it decided.
    """

    questions: list[Telemetry] = field(default_factory=list)
    telemetry: list[Telemetry] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)

    @property
    def probes(self) -> int:
        """Probes taken."""
        return sum(look.probe is not None for look in self.telemetry)

    @property
    def last_step(self) -> int:
        """The step after which the run ended."""
        return self.telemetry[-1].step if self.telemetry else 0

    @property
    def stopped(self) -> bool:
        """Whether the governor ended it."""
        return bool(self.decisions) and self.decisions[-1].action == "stop"


def play(governor: Governor, tape: Tape, until: int | None = None) -> Recording:
    """Let a fresh governor watch a tape until it stops the run, the limit or the last step is reached, or ``until``."""
    recording, previous = Recording(), None
    for step in range(1, (tape.steps if until is None else until) + 1):
        look = _look(tape, step, recording.probes)
        if look.compute > tape.limit:
            break  # The gate of the trainer: the step is never started.
        recording.questions.append(look)
        if governor.next_probe(look, tape.probe_cost):
            look = _with_probe(_look(tape, step, recording.probes + 1), tape, previous)
            previous = look.probe
        recording.telemetry.append(look)
        recording.decisions.append(governor.observe(look))
        if recording.stopped:
            break
    return recording


def replay(governor: Governor, tape: Tape, recording: Recording, start: int = 0) -> list[tuple[bool, Decision]]:
    """Ask a governor again what was asked after step ``start``: whether to probe, and the decision."""
    answers = []
    for question, look in zip(recording.questions[start:], recording.telemetry[start:], strict=True):
        answers.append((governor.next_probe(question, tape.probe_cost), governor.observe(look)))
    return answers


def answers_of(recording: Recording, start: int = 0) -> list[tuple[bool, Decision]]:
    """What ``replay`` must give."""
    pairs = zip(recording.telemetry[start:], recording.decisions[start:], strict=True)
    return [(look.probe is not None, decision) for look, decision in pairs]


def _look(tape: Tape, step: int, probes: int) -> Telemetry:
    probe_spent = probes * tape.probe_cost
    compute = step + probe_spent
    limited = math.isfinite(tape.limit)
    return Telemetry(
        step=step,
        max_steps=tape.steps,
        spent={"flops": compute, "steps": float(step)},
        limits={"flops": tape.limit} if limited else {},
        compute=compute,
        compute_limit=tape.limit if limited else tape.steps * 1.2,
        loss=tape.curve(float(step)),
        learning_rate=1e-3,
        peak_learning_rate=1e-3,
        probe_spent=probe_spent,
    )


def _with_probe(look: Telemetry, tape: Tape, previous: ProbeReading | None) -> Telemetry:
    noise = random.Random(tape.seed * 100_003 + look.step).gauss(0.0, tape.noise)
    mean = tape.curve(float(look.step)) + noise
    delta = None if previous is None else previous.mean - mean
    error = None if previous is None else math.sqrt(2.0) * tape.noise + 1e-9
    return replace(look, probe=ProbeReading(mean, delta, error, num_examples=32))
