"""Energy where nothing counts it: a wattage that the user states, times utilisation, times time. Always an estimate."""

from __future__ import annotations

import math
import time

from hf_eff.errors import OptionError
from hf_eff.hardware.probe import device_name, usable_cores


class EstimatedPower:
    """Joules since it was made, from the machine's power at full load.

    On a CPU utilisation is the CPU time of this process over that of all its cores: what data loader processes and
    an idle machine draw is left out. On an accelerator utilisation is taken as 1, which is an upper bound.

    Args:
        watts: Power at full load, such as the thermal design power that the maker states.

    Raises:
        OptionError: ``watts`` is not above zero and finite.
    """

    def __init__(self, watts: float) -> None:
        if not 0.0 < watts < math.inf:
            raise OptionError(f"power_watts must be above zero and finite, got {watts!r}.")
        self._watts = float(watts)
        self._cores = usable_cores() if device_name() == "cpu" else None
        self._start = self._busy_seconds()

    def joules(self) -> float:
        """Energy since it was made."""
        return self._watts * (self._busy_seconds() - self._start)

    def _busy_seconds(self) -> float:
        """Seconds at full load that what was done so far amounts to."""
        if self._cores is None:
            return time.perf_counter()
        return time.process_time() / self._cores
