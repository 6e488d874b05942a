"""The end of a run at a constant learning rate: the rate is lowered to zero over compute that was kept for it.

Over a share c of the compute C0 spent until then the rate is multiplied by ``1 - sqrt(progress)``, as in Hagele et al.
(2024, arXiv:2405.18392), with progress (C - C0) / (c C0).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_ROUNDING = 1e-9


class Cooldown:
    """When the rate is lowered, and how far.

    Args:
        share: Compute of the cooldown, as a share of what was spent before it.
        max_steps: Planned optimizer steps; 0 when unknown.

    Attributes:
        begun_at: Optimizer step at which it began, or None before.
        binding: The currency that ran short, where that began it.
        factor: What the rate of the next step is multiplied by, in [0, 1].
    """

    def __init__(self, share: float, max_steps: int = 0) -> None:
        self.share, self.max_steps = share, max_steps
        self.begun_at: int | None = None
        self.binding: str | None = None
        self.factor = 1.0
        self._compute = 0.0
        self._by_steps = False

    @property
    def active(self) -> bool:
        """Whether the rate is being lowered."""
        return self.begun_at is not None

    @property
    def end(self) -> float:
        """Governing currency spent at the end of the cooldown."""
        return self._compute * (1.0 + self.share)

    def with_reserve(self, need: Mapping[str, float], spent: Mapping[str, float]) -> dict[str, float]:
        """What has to be left so that a cooldown still fits after spending ``need``; ``need`` itself once it runs.

        Args:
            need: Amounts by currency of the work in question.
            spent: Amounts spent so far.
        """
        if self.active:
            return dict(need)
        names = {*need, *spent} - {"bytes"}
        kept = {name: need.get(name, 0.0) + self.share * (spent.get(name, 0.0) + need.get(name, 0.0)) for name in names}
        return {**need, **kept}

    def is_due(self, step: int) -> bool:
        """Whether the planned steps would not be enough for a cooldown after one more step.

        Args:
            step: Optimizer steps done.
        """
        after = (step + 1) * (1.0 + self.share)
        return not self.active and self.max_steps > 0 and after > self.max_steps * (1.0 + _ROUNDING)

    def begin(self, step: int, compute: float, *, binding: str | None = None, by_steps: bool = False) -> None:
        """Start lowering the rate.

        Args:
            step: Optimizer steps done.
            compute: Governing currency spent.
            binding: The currency of which no more than the reserve is left, if that is why.
            by_steps: Whether it ends with the planned steps instead of after its share of the compute.
        """
        self.begun_at, self._compute, self._by_steps, self.binding = step, compute, by_steps, binding

    def is_over(self, compute: float) -> bool:
        """Whether a step after which ``compute`` would be spent lies beyond the end."""
        return self.active and not self._by_steps and compute > self.end * (1.0 + _ROUNDING)

    def advance(self, step: int, compute: float) -> None:
        """Set the factor for the step after ``step`` steps, when ``compute`` will have been spent."""
        if self.begun_at is None:
            return
        parts = [0.0]
        if not self._by_steps:
            parts.append((compute - self._compute) / (self.share * self._compute) if self._compute else 1.0)
        if self.max_steps > self.begun_at:
            parts.append((step - self.begun_at) / (self.max_steps - self.begun_at))
        self.factor = 1.0 - math.sqrt(min(1.0, max(parts)))

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state."""
        return {
            "begun_at": self.begun_at,
            "compute": self._compute,
            "by_steps": self._by_steps,
            "binding": self.binding,
            "factor": self.factor,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self.begun_at, self._by_steps, self.binding = state["begun_at"], bool(state["by_steps"]), state["binding"]
        self._compute, self.factor = float(state["compute"]), float(state["factor"])
