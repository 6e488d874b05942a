"""What the methods along U V^T share: options and directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_eff.contracts.memory import OptimizerContext
from hf_eff.contracts.spec import knob
from hf_eff.engines.zeroth_order_method import ZerothOrder, ZerothOrderConfig

if TYPE_CHECKING:
    from hf_eff.engines.directions import DirectionFamily


@dataclass(frozen=True, kw_only=True)
class LowRankConfig(ZerothOrderConfig):
    """Options of the methods that look along U V^T."""

    rank: int = knob(
        2,
        "Columns r of U and V; a matrix whose shorter side is no longer takes dense directions.",
        low=1,
        paper="1, 2 or 4",
    )
    refresh_every: int = knob(50, "Steps nu for which V stays.", low=1, unit="steps", paper="50 or 100")


class LowRankZerothOrder(ZerothOrder):
    """Zeroth-order SGD along U V^T.

    Args:
        config: Options.
    """

    config: LowRankConfig

    def family(self, context: OptimizerContext) -> DirectionFamily:
        """U V^T for matrices, normal entries for vectors."""
        from hf_eff.engines.low_rank_directions import LowRank

        return LowRank(context.seed, self.config.rank, self.config.refresh_every)
