"""How recorded coefficients move the weights: by this step alone, or with momentum.

A rule is a function of the records and the directions, so a replay log that names it can be replayed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from hf_eff.engines.directions import DirectionFamily
from hf_eff.engines.replay_log import StepRecord
from hf_eff.engines.zeroth_order import Term, update

Groups = Sequence[Mapping[str, Tensor]]
State = MutableMapping[Any, dict[str, Any]]


class UpdateRule:
    """w <- (1 - lr decay) w - lr mean_i c_i z_i; nothing is remembered."""

    def apply(self, record: StepRecord, groups: Groups, family: DirectionFamily, state: State) -> None:
        """Do one recorded step; a run and its replay both come through here.

        Args:
            record: The step.
            groups: Parameters by name, one mapping a parameter group.
            family: Makes the directions.
            state: What is remembered per parameter, as an optimizer keeps it.
        """
        if record.skipped:
            return
        terms = self.terms(record)
        for group, lr, weight_decay in zip(groups, record.lr, record.weight_decay, strict=True):
            update(group.items(), family, terms, step=record.step, lr=lr, weight_decay=weight_decay)

    def terms(self, record: StepRecord) -> list[Term]:
        """Directions and coefficients of a step that is not skipped."""
        return record.terms

    def restore(self, records: Iterable[StepRecord]) -> None:
        """Continue after these steps."""

    def describe(self) -> dict[str, Any]:
        """JSON-able description for the log; empty for this rule."""
        return {}


class RecentMomentum(UpdateRule):
    """w <- (1 - lr decay) w - lr m with m <- beta m + (1 - beta) mean_i c_i z_i, without a copy of m.

    m is a sum over earlier steps, whose directions are drawn again; only the last ``window`` are taken. A step costs
    as many passes of random numbers as there are steps in the sum.

    Args:
        beta: Decay of the mean, above 0 and below 1.
        window: Steps in the sum; see ``momentum_window``.
    """

    def __init__(self, beta: float, window: int) -> None:
        self.beta = beta
        self.window = window
        self._recent: deque[StepRecord] = deque(maxlen=self.window)

    def terms(self, record: StepRecord) -> list[Term]:
        """This step's directions and those of the window, latest first."""
        self._recent.append(record)
        weights = ((1.0 - self.beta) * self.beta**age for age in range(len(self._recent)))
        return [
            Term(term.step, term.draw, weight * term.coefficient)
            for weight, each in zip(weights, reversed(self._recent), strict=True)
            for term in each.terms
        ]

    def restore(self, records: Iterable[StepRecord]) -> None:
        """Take the last steps that moved the weights."""
        self._recent = deque((record for record in records if not record.skipped), maxlen=self.window)

    def describe(self) -> dict[str, Any]:
        """Decay and number of steps."""
        return {"name": "recent_momentum", "beta": self.beta, "window": self.window}


def momentum_window(beta: float, tolerance: float) -> int:
    """Steps J after which beta^J has fallen to the tolerance.

    >>> momentum_window(0.9, 0.01)
    44
    """
    return max(1, math.ceil(math.log(tolerance) / math.log(beta)))
