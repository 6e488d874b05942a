"""all: Keep every row that can be trained on, in order.

Idea
    The baseline: no selection. Rows without a single token that carries loss are left out, because
    there is nothing to learn from them.

Cost
    None.

Use when
    The budget pays for the whole pool, or to compare with.

Avoid when
    The pool is larger than the budget: then training sees a prefix of a shuffle, which is
    ``random`` by accident.

Differs
    Not from any paper; it is a baseline.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.selection import Picks, SelectionContext
from hf_eff.contracts.spec import MethodConfig, MethodSpec, Traits


@dataclass(frozen=True, kw_only=True)
class AllConfig(MethodConfig):
    """No options."""


class All:
    """Keeps every valid row."""

    def __init__(self, config: AllConfig) -> None:
        self.config = config

    def select(self, context: SelectionContext) -> Picks:
        """All valid rows, in their order."""
        return Picks(positions=np.flatnonzero(context.pool.loss_lengths > 0), reasons="whole pool")


def cost(config: AllConfig, facts: Facts) -> Cost:  # noqa: ARG001 - the signature every method shares
    """Nothing is computed."""
    return Cost()


SPEC = MethodSpec(
    name="all",
    kind="selection",
    slot="pool",
    summary="Keep every row that can be trained on, in order.",
    config=AllConfig,
    build=All,
    cost=cost,
    traits=Traits(baseline=True, fsdp2=True, streaming=True),
)
