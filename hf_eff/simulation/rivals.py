"""Estimators of the present gain per compute that are compared with the shipped governors, and not shipped as such.

All stop when their estimate falls below a price. They probe at even distances, about as often as ``marginal_gain``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from hf_eff.contracts.governor import Decision, Governor, Telemetry
from hf_eff.numerics.robust_slope import robust_slope

PROBES = 120
"""Probes over a whole budget."""
FEWEST_PROBES = 5
"""No stop before, as with ``marginal_gain``."""


class _SlopeRule(Governor):
    """Stops when the loss falls more slowly than the price.

    Args:
        price: Nats that a unit of compute must buy.
    """

    def __init__(self, price: float) -> None:
        self.price = price
        self.clock: list[float] = []
        self.level: list[float] = []

    def next_probe(self, telemetry: Telemetry, probe_cost: float) -> bool:
        """Even spacing in compute."""
        last = self.clock[-1] * telemetry.compute_limit if self.clock else -math.inf
        return telemetry.compute >= last + telemetry.compute_limit / PROBES

    def observe(self, telemetry: Telemetry) -> Decision:
        """Take in a probe and hold the slope against the price."""
        if telemetry.probe is None:
            return Decision("continue", "no probe at this step")
        self.clock.append(telemetry.compute / telemetry.compute_limit)
        self.level.append(telemetry.probe.mean)
        if len(self.level) == 1:
            return Decision("continue", "one probe has no slope")
        # A level carries half the variance of a difference of two.
        rate = self.follow((telemetry.probe.paired_se or 0.0) / math.sqrt(2.0)) / telemetry.compute_limit
        details = {"rate": rate, "threshold_rate": self.price}
        if rate < self.price and len(self.level) >= FEWEST_PROBES:
            return Decision("stop", "the loss falls too slowly", details)
        return Decision("continue", "the loss falls fast enough, or probes are too few", details)

    def follow(self, noise: float) -> float:
        """Take in the newest probe, which has this standard error; drop of the loss per budget as it is now."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Everything: the attributes are numbers and lists of them."""
        return copy.deepcopy(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        vars(self).update(copy.deepcopy(dict(state)))


class EwmaSlope(_SlopeRule):
    """Exponentially weighted mean of the slopes from probe to probe."""

    decay = 0.9

    def __init__(self, price: float) -> None:
        super().__init__(price)
        self.mean = 0.0

    def follow(self, noise: float) -> float:
        """Weight of a slope falls by ``decay`` with each probe; the first one starts the mean."""
        slope = (self.level[-2] - self.level[-1]) / (self.clock[-1] - self.clock[-2])
        self.mean = slope if len(self.level) == 2 else self.decay * self.mean + (1.0 - self.decay) * slope
        return self.mean


class TheilSenWindow(_SlopeRule):
    """Theil-Sen slope over the last probes."""

    window = 12

    def follow(self, noise: float) -> float:
        """Median of the pairwise slopes."""
        return -robust_slope(self.clock, self.level, self.window)


class KalmanTrend(_SlopeRule):
    """Kalman filter of a level whose slope wanders like a Brownian motion."""

    drift = 3.0
    """Variance that the slope gathers over a budget, squared nats."""

    def __init__(self, price: float) -> None:
        super().__init__(price)
        self.state = [0.0, 0.0]
        self.covariance = [[1.0, 0.0], [0.0, 1e4]]

    def follow(self, noise: float) -> float:
        """One step of the filter; the first level starts it."""
        if len(self.level) == 2:
            self.state, self.covariance[0][0] = [self.level[0], 0.0], noise**2
        step = self.clock[-1] - self.clock[-2]
        move = np.array([[1.0, step], [0.0, 1.0]])
        wander = self.drift * np.array([[step**3 / 3.0, step**2 / 2.0], [step**2 / 2.0, step]])
        state, covariance = move @ self.state, move @ self.covariance @ move.T + wander
        gain = covariance[:, 0] / (covariance[0, 0] + noise**2)
        self.state = (state + gain * (self.level[-1] - state[0])).tolist()
        self.covariance = (covariance - np.outer(gain, covariance[0])).tolist()
        return -self.state[1]


RIVALS: dict[str, type[_SlopeRule]] = {
    "EWMA slope": EwmaSlope,
    "Theil-Sen window": TheilSenWindow,
    "Kalman trend": KalmanTrend,
}
