"""What the probes say about reallocations: how old the rows are, how fast they age, what the last action did."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_eff.contracts.governor import DriftReading, Telemetry
from hf_eff.engines.damping import FEWEST_GAIN
from hf_eff.numerics.freshness import UPLIFTS, estimate_lifetime, mean_uplift, uplift_log_likelihood

PRIOR_LIFETIME = 0.2
"""Share of the budget in which scores are taken to fade to 1/e before a drift reading says otherwise."""
JUDGED_SPAN = 0.15
"""Largest share of the budget on either side of an action over which its effect is taken."""
FEWEST_PROBES = 4
"""Probes after an action before anything is said of its effect."""
CONFIDENCE = 0.84
"""An action failed only when that is at least this likely: one standard error."""
PATIENCE = 0.05
"""Share of the budget after which an action not seen to happen counts as refused by the run, unless all row changes
are infeasible: then it may wait for its moment."""
READINGS = 40
"""Drift readings kept, the latest ones: scores may age slower as the rate falls."""
MEMORY = "switch_memory"
FADING = "refresh"


@dataclass
class _Trial:
    """An action decided on and not judged yet. JSON-able.

    Attributes:
        name: Name of its offer.
        action: What it is.
        fades: Whether its effect wears off.
        uplift: What was predicted: rate of the loss afterwards over that before, less 1, for fresh rows.
        compute: Spent when it was decided.
        phase: Row choice in use then.
        before: Window of probes before it, as in ``_Record``.
        chosen_at: Training compute at which the scores in use before it were made.
        step_compute: Training compute of a step before it.
        is_done: Whether the run carried it out.
        changed_at: Training compute at the last probe before it was seen to be.
    """

    name: str
    action: str
    fades: bool
    uplift: float
    compute: float
    phase: int
    before: list[list[float]]
    chosen_at: float
    step_compute: float | None
    is_done: bool = False
    changed_at: float = 0.0


@dataclass
class _Record:
    """JSON-able.

    Attributes:
        budget: Compute limit at the last probe.
        clock: Training compute at the last probe: spent without probes and reallocations.
        level: Loss at the last probe, relative to the first.
        phase: Row choice in use.
        chosen_at: Training compute at which its scores were made.
        window: Clock, level, standard error and step of the last probes of this phase.
        lifetime: Share of the budget in which scores fade to 1/e.
        readings: Age, correlation and sample size of the last drift readings.
        learnt: By action, log-likelihood of each of ``UPLIFTS``, summed over its trials.
        best_rate: Largest rate at which the loss fell in this phase; None while it is unknown.
        trial: The action whose effect is awaited.
        refused: Names of offers that the run did not carry out when last decided on.
    """

    budget: float = 1.0
    clock: float = 0.0
    level: float = 0.0
    phase: int = 0
    chosen_at: float = 0.0
    window: list[list[float]] = field(default_factory=list)
    lifetime: float = PRIOR_LIFETIME
    readings: list[list[float]] = field(default_factory=list)
    learnt: dict[str, list[float]] = field(default_factory=dict)
    best_rate: float | None = None
    trial: _Trial | None = None
    refused: list[str] = field(default_factory=list)


class ReallocationEvidence:
    """Collects probes and drift readings, and measures each action by the slopes on its two sides."""

    def __init__(self) -> None:
        self._record = _Record()

    @property
    def age(self) -> float:
        """Training compute since the scores in use were made."""
        return self._record.clock - self._record.chosen_at

    @property
    def best_rate(self) -> float | None:
        """Largest rate at which the loss fell since these rows came into use."""
        return self._record.best_rate

    @property
    def correlation(self) -> float | None:
        """The last drift reading."""
        return self._record.readings[-1][1] if self._record.readings else None

    @property
    def is_waiting(self) -> bool:
        """Whether the last action's effect cannot be told yet."""
        trial = self._record.trial
        return trial is not None and not (trial.is_done and len(self._record.window) >= FEWEST_PROBES)

    @property
    def awaited(self) -> str:
        """Name of the offer whose effect cannot be told yet, or nothing."""
        trial = self._record.trial
        return trial.name if trial is not None and self.is_waiting else ""

    def was_refused(self, name: str) -> bool:
        """Whether the run did not carry out the offer when it was last decided on."""
        return name in self._record.refused

    @property
    def lifetime(self) -> float:
        """h: training compute in which the scores fade to 1/e."""
        return self._record.lifetime * self._record.budget

    def uplift(self, action: str) -> float:
        """u: posterior mean of how much faster rows teach just after an action."""
        record = self._record
        told = [record.learnt[action]] if action in record.learnt else []
        if record.trial is not None and record.trial.action == action and not self.is_waiting:
            told.append(self._told_by(record.trial))
        return mean_uplift(told)

    def take_in(self, telemetry: Telemetry, recent_rate: float) -> tuple[str, bool] | None:
        """Take one probe in; the name of an action and whether it failed, when it can be judged now."""
        record, probe = self._record, telemetry.probe
        record.budget = telemetry.compute_limit
        before, record.clock = record.clock, telemetry.compute - telemetry.overhead_spent
        self._follow_phase(telemetry, before)
        if telemetry.drift is not None:
            self._note_drift(telemetry.drift)
        if probe is None or not math.isfinite(probe.paired_delta or 0.0):
            return None
        record.level -= probe.paired_delta or 0.0
        if telemetry.in_warmup:
            record.window.clear()
            return None
        error = probe.paired_se if probe.paired_se is not None and math.isfinite(probe.paired_se) else 0.0
        record.window.append([record.clock, record.level, error, float(telemetry.step)])
        self._trim()
        if len(record.window) >= FEWEST_PROBES and math.isfinite(recent_rate):
            record.best_rate = max(recent_rate, record.best_rate or 0.0)
        is_long = record.clock - record.window[0][0] >= (1.0 - 1e-9) * self._span
        return self.close_trial() if record.trial is not None and not self.is_waiting and is_long else None

    def open_trial(self, name: str, action: str, fades: bool, uplift: float, compute: float) -> None:
        """An action was decided on; ``uplift`` is what it promises for fresh rows."""
        record = self._record
        before = [list(row) for row in record.window]
        record.trial = _Trial(
            name, action, fades, uplift, compute, record.phase, before, record.chosen_at, self._step_compute()
        )

    def close_trial(self) -> tuple[str, bool] | None:
        """Judge the last action by the probes so far; None when nothing can be said."""
        record, trial = self._record, self._record.trial
        if trial is None or self.is_waiting:
            return None
        if trial.action == MEMORY:
            record.trial, after = None, self._step_compute()
            if trial.step_compute is None or after is None:
                return None
            return trial.name, trial.step_compute / after - 1.0 < FEWEST_GAIN * trial.uplift
        told = self._told_by(trial)
        record.trial = None
        known = record.learnt.get(trial.action, [0.0] * len(UPLIFTS))
        record.learnt[trial.action] = [a + b for a, b in zip(known, told, strict=True)]
        weights = [math.exp(each) for each in told]
        low = sum(w for w, uplift in zip(weights, UPLIFTS, strict=True) if uplift < FEWEST_GAIN * trial.uplift)
        chance = low / sum(weights)
        return (trial.name, chance >= CONFIDENCE) if chance >= CONFIDENCE or chance < 0.5 else None

    def state_dict(self) -> dict[str, Any]:
        """All that was seen and is still of use."""
        return asdict(self._record)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        trial = state["trial"]
        self._record = _Record(
            **{
                **state,
                "window": [list(row) for row in state["window"]],
                "readings": [list(row) for row in state["readings"]],
                "learnt": {action: list(told) for action, told in state["learnt"].items()},
                "refused": list(state["refused"]),
                "trial": _Trial(**trial) if trial else None,
            }
        )

    @property
    def _span(self) -> float:
        return JUDGED_SPAN * self._record.budget

    def _follow_phase(self, telemetry: Telemetry, previous_clock: float) -> None:
        """See whether the rows or the memory strategy changed since the last probe, and how old the scores are."""
        record, trial = self._record, self._record.trial
        changed = telemetry.data_phase != record.phase
        if trial is not None and not trial.is_done:
            trial.is_done = _is_done(trial, telemetry)
            trial.changed_at = previous_clock
            changed = changed or trial.is_done
            others = [name for name in record.refused if name != trial.name]
            if trial.is_done:
                record.refused = others
            elif telemetry.compute - trial.compute >= PATIENCE * record.budget and _could_be_done(trial, telemetry):
                record.refused = [*others, trial.name]
                record.trial = None
        if changed:
            if telemetry.data_phase != record.phase and (trial is None or trial.action == FADING):
                record.chosen_at = previous_clock
            record.phase = telemetry.data_phase
            record.window.clear()
            record.best_rate = None

    def _note_drift(self, drift: DriftReading) -> None:
        record = self._record
        record.chosen_at = record.clock - drift.age
        if not math.isfinite(drift.correlation):
            return
        record.readings.append([drift.age, drift.correlation, float(drift.num_examples)])
        del record.readings[:-READINGS]
        ages, correlations, counts = ([row[i] for row in record.readings] for i in range(3))
        record.lifetime = estimate_lifetime(ages, correlations, counts, PRIOR_LIFETIME * record.budget) / record.budget

    def _trim(self) -> None:
        window = self._record.window
        start = self._record.clock - self._span
        while len(window) > FEWEST_PROBES and window[1][0] <= start:
            window.pop(0)

    def _told_by(self, trial: _Trial) -> list[float]:
        """Log-likelihood of each uplift from the probes on both sides of a trial."""
        record, lifetime = self._record, self.lifetime if trial.fades else None
        rows = trial.before + record.window
        if not trial.before or rows[-1][0] <= rows[0][0]:
            return [0.0] * len(UPLIFTS)
        changed_at = record.chosen_at if trial.fades else trial.changed_at
        fresh = [_fresh_compute(row[0], trial.chosen_at, changed_at, lifetime) for row in rows]
        # The error of a paired difference is that of two levels.
        noise = math.sqrt(sum(row[2] ** 2 for row in rows) / (2.0 * len(rows)))
        told = uplift_log_likelihood([row[0] for row in rows], [row[1] for row in rows], fresh, noise)
        return [float(each) for each in told]

    def _step_compute(self) -> float | None:
        window = self._record.window
        steps = window[-1][3] - window[0][3] if window else 0.0
        return (window[-1][0] - window[0][0]) / steps if steps > 0 else None


def _is_done(trial: _Trial, telemetry: Telemetry) -> bool:
    """Whether the run carried the action out: other rows are in use, or the switch is no longer on offer."""
    if trial.action == MEMORY:
        return all(offer.name != trial.name for offer in telemetry.offers)
    return telemetry.data_phase > trial.phase


def _could_be_done(trial: _Trial, telemetry: Telemetry) -> bool:
    """Whether nothing is in the way of the action, so that the run leaves it undone on purpose."""
    rows = (offer for offer in telemetry.offers if offer.action != MEMORY)
    return trial.action == MEMORY or any(offer.feasible for offer in rows)


def _fresh_compute(clock: float, chosen_at: float, changed_at: float, lifetime: float | None) -> float:
    """Integral of the freshness up to ``clock``; without a lifetime it is 0 before the change and 1 after it."""
    since = max(0.0, clock - changed_at)
    if lifetime is None:
        return since
    stale = -lifetime * math.expm1(-max(0.0, min(clock, changed_at) - chosen_at) / lifetime)
    return stale - lifetime * math.expm1(-since / lifetime)
