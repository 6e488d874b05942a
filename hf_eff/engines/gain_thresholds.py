"""What an expected gain is held against: four laws, each in nats over a stretch of compute.

B budget, C spent, z = C / B, h stretch looked at, L loss, g gain per unit of compute

- tail         gain of all that remains against ``epsilon`` of the gain so far
- price        gain of the next h against ``price * h``
- reservation  gain of the next h against ``tau(z) * h``, with ``tau(z) = (u e / l)^z l / e``, u the best g of the
               beginning and l = epsilon u. It rises from epsilon u / e to u as the budget is used, and is the threshold
               of the on-line knapsack problem (Zhou, Chakrabarty and Lukose 2008)
- target       gain of all that remains against the distance to a loss that is to be reached
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_eff.contracts.governor import Telemetry
from hf_eff.engines.probe_history import Outlook

BEGINNING = 0.05
"""Share of the budget in which the best rate of gain is looked for."""


@dataclass(frozen=True)
class Bar:
    """What is asked of the run at one probe.

    Attributes:
        stretch: Compute looked at.
        needed: Gain that it must bring, nats.
        chance: Stop when the probability of that gain is lower.
        facts: Numbers for the record.
    """

    stretch: float
    needed: float
    chance: float
    facts: Mapping[str, float] = field(default_factory=dict)


class Threshold:
    """One law. ``telemetry.compute_limit`` is where the run ends if it is not stopped."""

    def bar(self, telemetry: Telemetry, outlook: Outlook) -> Bar:
        """What the present probe asks for."""
        raise NotImplementedError

    def reached(self, loss: float) -> str:
        """Why the run is done at this held-out loss, or nothing."""
        return ""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able memory of the law."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""


class TailThreshold(Threshold):
    """All that remains must add a share of what the run has gained.

    Args:
        epsilon: That share.
        delta: Stop when the chance is lower.
    """

    def __init__(self, epsilon: float, delta: float) -> None:
        self._epsilon = epsilon
        self._delta = delta

    def bar(self, telemetry: Telemetry, outlook: Outlook) -> Bar:
        """``epsilon`` of the realised gain, over all that is left."""
        return Bar(telemetry.compute_limit - telemetry.compute, self._epsilon * outlook.realised, self._delta)


class PriceThreshold(Threshold):
    """The next stretch must earn its price.

    Args:
        price: Nats per unit of the governing currency.
        horizon: Stretch, a share of the budget.
        delta: Stop when the chance is lower.
    """

    def __init__(self, price: float, horizon: float, delta: float) -> None:
        self._price = price
        self._horizon = horizon
        self._delta = delta

    def bar(self, telemetry: Telemetry, outlook: Outlook) -> Bar:
        """``price`` times the stretch."""
        stretch = next_stretch(telemetry, self._horizon)
        return Bar(stretch, self._price * stretch, self._delta)


class ReservationThreshold(Threshold):
    """The next stretch must be worth more than what the rest of the budget is kept for.

    Args:
        epsilon: Least value worth spending on, a share of the best one.
        horizon: Stretch, a share of the budget.
        delta: Stop when the chance is lower.
    """

    def __init__(self, epsilon: float, horizon: float, delta: float) -> None:
        self._epsilon = epsilon
        self._horizon = horizon
        self._delta = delta
        self._best: float | None = None

    def bar(self, telemetry: Telemetry, outlook: Outlook) -> Bar:
        """``tau(z)`` times the stretch. Where the beginning had too few probes, the first forecast counts as best."""
        stretch = next_stretch(telemetry, self._horizon)
        if self._best is None or telemetry.compute - outlook.start <= BEGINNING * (
            telemetry.compute_limit - outlook.start
        ):
            self._best = max(self._best or 0.0, outlook.forecast(stretch, 0.0).gain / stretch)
        rate = reservation_rate(telemetry.compute / telemetry.compute_limit, self._best, self._epsilon)
        return Bar(stretch, rate * stretch, self._delta, {"best_rate": self._best})

    def state_dict(self) -> dict[str, Any]:
        """The best rate of gain so far, or None."""
        return {"best": self._best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self._best = state["best"]


class TargetThreshold(Threshold):
    """The run is done at a loss, and given up when the rest of the budget will not reach it.

    Args:
        target: Held-out loss to reach.
        futility: Give up when the chance is lower.
    """

    def __init__(self, target: float, futility: float) -> None:
        self._target = target
        self._futility = futility

    def bar(self, telemetry: Telemetry, outlook: Outlook) -> Bar:
        """The smoothed distance to the target, over all that is left."""
        distance = outlook.loss - self._target
        return Bar(telemetry.compute_limit - telemetry.compute, distance, self._futility, {"target": self._target})

    def reached(self, loss: float) -> str:
        """Whether a probe reads the target or less."""
        return f"the target {self._target:g} is reached: {loss:.6g}" if loss <= self._target else ""


def next_stretch(telemetry: Telemetry, horizon: float) -> float:
    """A share of the budget, or what is left of it."""
    limit = telemetry.compute_limit
    return min(horizon * limit, limit - telemetry.compute)


def reservation_rate(share: float, best: float, epsilon: float) -> float:
    """tau(z) of the module's head.

    Args:
        share: z, spent share of the budget, in [0, 1].
        best: u, best value per unit of compute.
        epsilon: l / u, least value worth spending on, above 0.

    >>> round(reservation_rate(1.0, best=2.0, epsilon=0.02), 9)
    2.0
    """
    return best * (math.e / epsilon) ** share * epsilon / math.e
