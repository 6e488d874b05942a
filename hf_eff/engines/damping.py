"""What keeps a governor from acting too often: a dwell, a purse, and distrust of what did not work.

All spans are compute, so nothing depends on how often the run is looked at. Each rule bounds what a noisy signal can
cost: the dwell the number of reallocations, the purse their price, the backoff the repetition of what has failed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_eff.contracts.governor import Telemetry

HYSTERESIS = 0.2
"""eta: an action must promise this much more than going on."""
DWELL_SHARE = 0.02
"""Least share of the budget between two reallocations."""
DWELL_COSTS = 2.0
"""Least compute between two reallocations, in costs of the dearer one."""
PURSE_SHARE = 0.15
"""phi: probes and reallocations may take this share of the compute spent."""
PURSE_ADVANCE = 0.2
"""Share of the budget that the purse counts as spent from the start."""
FEWEST_GAIN = 0.5
"""An action failed when its uplift is surely below this share of the uplift predicted."""
FAILURES_TO_RETIRE = 2
"""Failures in a row after which an action is not taken again."""


@dataclass
class _Record:
    """JSON-able.

    Attributes:
        last_at: Compute at the last reallocation; the start of the run counts as one.
        last_cost: Its fixed cost.
        failures: By action, failures since its last success.
    """

    last_at: float = 0.0
    last_cost: float = 0.0
    failures: dict[str, int] = field(default_factory=dict)


class Damping:
    """Says when the next reallocation may happen and what it may cost.

    Args:
        probe_share: Part of the compute spent that the probes may take; the purse keeps it free for them.
    """

    def __init__(self, probe_share: float) -> None:
        self._reserve = min(probe_share, PURSE_SHARE)
        self._record = _Record()

    def dwell(self, name: str, cost: float, budget: float) -> float:
        """Compute that must lie between the last reallocation and this action; each failure of it doubles it."""
        least = max(DWELL_COSTS * max(cost, self._record.last_cost), DWELL_SHARE * budget)
        return least * 2.0 ** self.failures(name)

    def dwell_left(self, name: str, cost: float, telemetry: Telemetry) -> float:
        """Compute still to be spent before the action may be taken."""
        since = telemetry.compute - self._record.last_at
        return max(0.0, self.dwell(name, cost, telemetry.compute_limit) - since)

    def purse(self, telemetry: Telemetry) -> float:
        """Compute that reallocations may take now, what the probes may still need kept aside."""
        paid_for = telemetry.compute + PURSE_ADVANCE * telemetry.compute_limit
        probes = max(telemetry.probe_spent, self._reserve * paid_for)
        return PURSE_SHARE * paid_for - probes - (telemetry.overhead_spent - telemetry.probe_spent)

    def failures(self, name: str) -> int:
        """Failures of an action since it last worked."""
        return self._record.failures.get(name, 0)

    def is_retired(self, name: str) -> bool:
        """Whether an action has failed too often to be tried again."""
        return self.failures(name) >= FAILURES_TO_RETIRE

    def note_action(self, cost: float, telemetry: Telemetry) -> None:
        """An action was decided on: the dwell begins, whether or not the run carries it out."""
        self._record.last_at = telemetry.compute
        self._record.last_cost = cost

    def note_outcome(self, name: str, failed: bool) -> None:
        """What the probes after an action showed of it."""
        self._record.failures[name] = self.failures(name) + 1 if failed else 0

    def state_dict(self) -> dict[str, Any]:
        """When the last reallocation was, and what failed."""
        return asdict(self._record)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self._record = _Record(**{**state, "failures": dict(state["failures"])})
