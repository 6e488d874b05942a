"""How far the model's ranking of the pool has moved since the rows in use were chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from hf_eff.contracts.governor import DriftReading
from hf_eff.engines.gain_probe import GainProbe
from hf_eff.numerics.agreement import spearman


class DriftProbe(GainProbe):
    """Losses of a fixed sample of the pool, ranked then and now; read as ``GainProbe`` reads held-out examples.

    A reading costs ``cost_flops`` and ``cost_tokens``, and so does ``note``.
    """

    noted_at: float | None = None
    """Governing currency spent on training when the rows in use were chosen; None before ``note``."""

    def note(self, model: nn.Module, compute: float) -> None:
        """Take the present losses for those at the time of the choice.

        Args:
            model: As for ``GainProbe.read``.
            compute: Governing currency spent on training so far.
        """
        self._baseline = self._previous = self._values(model)
        self.noted_at = compute

    def drift(self, model: nn.Module, compute: float) -> DriftReading | None:
        """Rank correlation with the losses noted; None before ``note``.

        Args:
            model: As for ``GainProbe.read``.
            compute: Governing currency spent on training so far.
        """
        if self._baseline is None or self.noted_at is None:
            return None
        now = self._values(model)
        both = np.isfinite(now) & np.isfinite(self._baseline)
        correlation = spearman(self._baseline[both], now[both])
        return DriftReading(max(0.0, compute - self.noted_at), correlation, int(both.sum()))

    def state_dict(self) -> dict[str, Any]:
        """JSON-able losses and age."""
        return {**super().state_dict(), "noted_at": self.noted_at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        super().load_state_dict(state)
        self.noted_at = state["noted_at"]
