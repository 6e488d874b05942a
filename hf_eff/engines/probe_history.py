"""The probes of a run as one loss curve: its clock, its breaks, and what it promises next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from hf_eff.contracts.governor import ProbeReading, Telemetry
from hf_eff.numerics.curves import CurvePosterior, GainForecast, fit_curves
from hf_eff.numerics.robust_slope import robust_slope

FEWEST_PROBES = 5
"""Probes since the last break before a fit says anything."""
BREAK_DISCOUNT = 0.3
"""Factor on the weight of probes taken before the learning rate jumped, or before data or memory changed."""
JUMP_SPEED = 4.0
"""A learning rate that changes this many times faster than a linear decay over the budget has jumped."""
SMALLEST_JUMP = 0.05
"""Share of the peak learning rate that a change must exceed to be a jump."""
SURPRISE_SD = 4.0
"""Two probes in a row this far from their prediction mark a change point."""
RECENT_SPAN = 1 / 15
"""Share of the budget that the recent slope looks back over; a longer look lags behind the curve."""


@dataclass(frozen=True)
class Outlook:
    """What the curve says at the present probe.

    Attributes:
        posterior: Curves fitted to all probes.
        now: Present value of the clock that they are fitted on.
        per_compute: Advance of that clock per unit of compute, at the present learning rate.
        recent_rate: Theil-Sen drop of the loss per unit of compute over the last probes.
        first_loss: Held-out loss at the first probe.
        start: Spent compute at the first probe.
    """

    posterior: CurvePosterior
    now: float
    per_compute: float
    recent_rate: float
    first_loss: float
    start: float

    @property
    def level(self) -> float:
        """Smoothed loss now, relative to the first probe."""
        return self.posterior.predict(self.now)[0]

    @property
    def loss(self) -> float:
        """Smoothed loss now."""
        return self.first_loss + self.level

    @property
    def realised(self) -> float:
        """Smoothed gain since the first probe, at or above 0."""
        return max(0.0, -self.level)

    def forecast(self, compute: float, threshold: float) -> GainForecast:
        """Drop of the loss over the next ``compute``, held against ``threshold``."""
        return self.posterior.forecast(self.now, compute * self.per_compute, threshold)


@dataclass
class _Columns:
    """One entry a probe that had a finite loss, and the run at the last of them. JSON-able.

    Attributes:
        compute: Spent compute.
        clock: Training compute since the first probe, probes left out.
        rate_clock: Integral of the learning rate over that clock.
        level: Loss relative to the first probe, summed from paired differences.
        se: Standard error of each paired difference; the first probe has none.
        weight: Factor on the weight in the fit, lowered by breaks.
        first_step, last_step: Optimizer steps done at the first and at the last probe.
        first_loss: Held-out loss at the first probe.
        data_phase: Number of the row choice in use at the last probe.
        best_level, best_compute, best_step: The lowest level and where it was.
    """

    compute: list[float] = field(default_factory=list)
    clock: list[float] = field(default_factory=list)
    rate_clock: list[float] = field(default_factory=list)
    level: list[float] = field(default_factory=list)
    se: list[float] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)
    first_step: int = 0
    last_step: int = 0
    probe_spent: float = 0.0
    learning_rate: float = 0.0
    in_warmup: bool = False
    break_at: int = 0
    surprises: int = 0
    first_loss: float = 0.0
    data_phase: int = 0
    best_level: float | None = None
    best_compute: float = 0.0
    best_step: int = 0


class ProbeHistory:
    """Collects probes and fits curves to them.

    The learning rate between two probes counts as their mean, so that the record of the probes alone reproduces
    everything here.

    Args:
        discount: Weight of a probe relative to the next one.
        prior_scale: Prior standard deviation of a curve's height, nats.
        window: Probes in the recent slope and in the estimate of the noise.
    """

    def __init__(self, *, discount: float, prior_scale: float, window: int) -> None:
        self._discount = discount
        self._prior_scale = prior_scale
        self._window = window
        self._columns = _Columns()

    def __len__(self) -> int:
        return len(self._columns.level)

    @property
    def start(self) -> float:
        """Spent compute at the first probe."""
        return self._columns.compute[0]

    @property
    def step_compute(self) -> float | None:
        """Mean training compute of a step between the first probe and the last; None before the second."""
        steps = self._columns.last_step - self._columns.first_step
        return self._columns.clock[-1] / steps if steps > 0 else None

    @property
    def break_compute(self) -> float:
        """Spent compute at the first probe after the last break."""
        return self._columns.compute[self._columns.break_at]

    @property
    def since_break(self) -> int:
        """Probes since the last break of the curve, the end of the warm-up included."""
        return len(self) - self._columns.break_at

    @property
    def facts(self) -> dict[str, float | None]:
        """Numbers for the record of a probe."""
        columns = self._columns
        return {
            "level": columns.level[-1],
            "rate_clock": columns.rate_clock[-1],
            "probes": len(self),
            "probes_since_break": self.since_break,
            "best_level": columns.best_level,
            "best_compute": columns.best_compute,
            "best_step": columns.best_step,
        }

    def take_in(self, telemetry: Telemetry, *, changed: bool = False) -> bool:
        """Append a probe and look for a break of the curve; False when it has no finite paired loss.

        Args:
            telemetry: The look.
            changed: Whether data or memory was reallocated since the last probe; ``data_phase`` tells of data, too.
        """
        probe, columns = telemetry.probe, self._columns
        if probe is None or not _is_finite(probe, first=not columns.level):
            return False
        trained = 0.0
        if columns.level:
            probing = telemetry.probe_spent - columns.probe_spent
            trained = max(0.0, telemetry.compute - columns.compute[-1] - probing)
            columns.se.append(_finite_or_zero(probe.paired_se))
            changed = changed or telemetry.data_phase != columns.data_phase
            if changed or columns.in_warmup or self._jumped(telemetry, trained):
                self._break(len(self), BREAK_DISCOUNT)
        else:
            columns.first_loss = probe.mean
        self._append(telemetry, trained, probe.paired_delta if columns.level else 0.0)
        self._mark_surprise(telemetry)
        return True

    def outlook(self, telemetry: Telemetry) -> Outlook:
        """Fit all probes; there must be two or more."""
        x, per_compute = self._axis(telemetry)
        slope = _recent_slope(x, self._columns.level, self._window)
        columns = self._columns
        return Outlook(
            self._fit(x), float(x[-1]), per_compute, -slope * per_compute, columns.first_loss, columns.compute[0]
        )

    def chance_of_rise(self) -> float:
        """Lower bound on the chance that the loss has left its best since the last break, at both of the last probes.

        A curve that fell far and now rises fits no curve of one direction, so each level is held against the best
        earlier one by the errors of paired differences. Bonferroni's bound allows for the best being the luckiest.
        """
        levels, errors = self._columns.level[self._columns.break_at :], self._columns.se[-self._window :]
        earlier = levels[:-2]
        error = float(np.median(errors)) if errors else 0.0
        if not earlier or error <= 0.0:
            return 0.0
        rise = min(levels[-2:]) - min(earlier)
        return 1.0 - len(earlier) * NormalDist().cdf(-rise / error)

    def rate_since_break(self, telemetry: Telemetry) -> float | None:
        """Theil-Sen drop of the loss per unit of compute, of probes since the last break; None before the second."""
        since = min(self.since_break, self._window)
        x, per_compute = self._axis(telemetry)
        if since < 2 or x[-1] <= x[-since]:
            return None
        return -robust_slope(x, self._columns.level, since) * per_compute

    def state_dict(self) -> dict[str, Any]:
        """The probes and the breaks found in them."""
        return asdict(self._columns)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        copies: dict[str, Any] = {
            name: list(value) if isinstance(value, list) else value for name, value in state.items()
        }
        self._columns = replace(_Columns(), **copies)

    def _append(self, telemetry: Telemetry, trained: float, delta: float | None) -> None:
        columns = self._columns
        columns.first_step = columns.first_step if columns.level else telemetry.step
        columns.last_step = telemetry.step
        rate = 0.5 * (telemetry.learning_rate + columns.learning_rate)
        columns.compute.append(telemetry.compute)
        columns.clock.append(_last(columns.clock) + trained)
        columns.rate_clock.append(_last(columns.rate_clock) + rate * trained)
        columns.level.append(_last(columns.level) - (delta or 0.0))
        columns.weight.append(1.0)
        columns.probe_spent = telemetry.probe_spent
        columns.learning_rate = telemetry.learning_rate
        columns.in_warmup = telemetry.in_warmup
        columns.data_phase = telemetry.data_phase
        if columns.best_level is None or columns.level[-1] < columns.best_level:
            columns.best_level = columns.level[-1]
            columns.best_compute, columns.best_step = telemetry.compute, telemetry.step

    def _jumped(self, telemetry: Telemetry, trained: float) -> bool:
        """Whether the learning rate moved faster than a smooth schedule moves it."""
        peak, budget = telemetry.peak_learning_rate, telemetry.compute_limit - self.start
        if peak <= 0 or budget <= 0:
            return False
        change = abs(telemetry.learning_rate - self._columns.learning_rate) / peak
        return change > max(SMALLEST_JUMP, JUMP_SPEED * trained / budget)

    def _mark_surprise(self, telemetry: Telemetry) -> None:
        """Forget the past when two probes in a row lie far from what the probes before them predict."""
        columns = self._columns
        # A surprising probe must not inform the prediction that its successor is held against.
        known = len(self) - 1 - columns.surprises
        if known - columns.break_at < FEWEST_PROBES:
            return
        x, _ = self._axis(telemetry)
        mean, sd = self._fit(x[:known]).predict(float(x[-1]))
        columns.surprises = columns.surprises + 1 if abs(columns.level[-1] - mean) > SURPRISE_SD * sd else 0
        if columns.surprises == 2:
            self._break(len(self) - 2, 0.0)

    def _break(self, index: int, factor: float) -> None:
        """Start a new stretch of the curve at probe ``index``; probes before it lose weight."""
        columns = self._columns
        columns.weight[:index] = [factor * each for each in columns.weight[:index]]
        columns.break_at, columns.surprises = index, 0

    def _axis(self, telemetry: Telemetry) -> tuple[np.ndarray, float]:
        """Clock at each probe, [n] in shares of the budget, and its advance per unit of compute.

        A decaying learning rate bends the loss over compute whatever the data still offer. Over the integrated rate
        that bend is gone, and the present rate bounds what a falling schedule can still advance.
        """
        budget = max(telemetry.compute_limit - self.start, 1e-300)
        if not is_confounded(telemetry):
            return np.array(self._columns.clock) / budget, 1.0 / budget
        scale = telemetry.peak_learning_rate * budget
        return np.array(self._columns.rate_clock) / scale, telemetry.learning_rate / scale

    def _fit(self, x: np.ndarray) -> CurvePosterior:
        """Curves through the first ``len(x)`` probes."""
        count = len(x)
        weights = np.array(self._columns.weight[:count]) * self._discount ** np.arange(count)[::-1]
        # A level carries half the variance of a difference of two.
        noise = float(np.median(self._columns.se[: count - 1][-self._window :])) / math.sqrt(2.0)
        levels = self._columns.level[:count]
        return fit_curves(x, levels, weights, noise_sd=noise, prior_scale=self._prior_scale)


def is_confounded(telemetry: Telemetry) -> bool:
    """Whether the schedule has begun to lower the learning rate, so that the loss falls for a second reason."""
    return not telemetry.in_warmup and telemetry.learning_rate < telemetry.peak_learning_rate * (1.0 - 1e-9)


def _is_finite(probe: ProbeReading, *, first: bool) -> bool:
    delta = 0.0 if first else probe.paired_delta
    return delta is not None and math.isfinite(probe.mean + delta)


def _finite_or_zero(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0


def _recent_slope(x: np.ndarray, levels: list[float], window: int) -> float:
    """Theil-Sen slope over at most ``window`` probes inside ``RECENT_SPAN``, yet over three at least."""
    inside = int(np.count_nonzero(x >= x[-1] - RECENT_SPAN))
    count = min(max(window, 2), max(inside, 3))
    return robust_slope(x, levels, count) if x[-1] > x[-count:][0] else 0.0


def _last(values: list[float]) -> float:
    return values[-1] if values else 0.0
