"""How long the next optimizer step may take, for limits whose cost is known only afterwards."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from hf_eff.errors import OptionError


class StepReserve:
    """Upper quantile of the durations of past steps.

    A limit in seconds, kWh or money is kept by starting a step only while this much is left. That is a probable bound,
    not a certain one: one step in a hundred may take longer, and the run then ends past the limit by part of that step.
    While fewer than ``1 / (1 - quantile)`` steps were seen the quantile is their maximum; before the first one it is 0.

    Args:
        quantile: Share of steps that take no longer, in (0, 1].
        window: Latest steps that count.

    Raises:
        OptionError: ``quantile`` or ``window`` lies outside its range.

    >>> reserve = StepReserve()
    >>> for seconds in (1.0, 3.0, 2.0):
    ...     reserve.observe(seconds)
    >>> reserve.reserve()
    3.0
    """

    def __init__(self, quantile: float = 0.99, window: int = 512) -> None:
        if not 0.0 < quantile <= 1.0 or window < 1:
            raise OptionError(f"quantile must be in (0, 1] and window at least 1, got {quantile!r} and {window!r}.")
        self._quantile = quantile
        self._seconds: deque[float] = deque(maxlen=window)

    def observe(self, seconds: float) -> None:
        """Add the duration of one step."""
        self._seconds.append(float(seconds))

    def reserve(self) -> float:
        """Seconds to keep for the next step."""
        if not self._seconds:
            return 0.0
        ordered = sorted(self._seconds)
        return ordered[max(0, math.ceil(self._quantile * len(ordered)) - 1)]

    def state_dict(self) -> dict[str, Any]:
        """JSON-able durations of the latest steps."""
        return {"seconds": list(self._seconds)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self._seconds = deque(state["seconds"], maxlen=self._seconds.maxlen)
