"""coin_flip: keep the rows whose content hash is smallest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_eff.contracts.cost import Cost
from hf_eff.contracts.selection import Picks, SelectionContext
from hf_eff.contracts.spec import MethodSpec, Traits
from hf_eff.engines.pool_size import SizedConfig


@dataclass(frozen=True, kw_only=True)
class CoinFlipConfig(SizedConfig):
    """Options of ``selection="coin_flip"``."""


class CoinFlip:
    """Ranks rows by their hash, which is as good as a coin and falls the same way every time."""

    def __init__(self, config: CoinFlipConfig) -> None:
        self.config = config

    def select(self, context: SelectionContext) -> Picks:
        """The valid rows with the smallest hashes."""
        hashes = context.pool.row_hash or []
        valid = np.flatnonzero(context.pool.loss_lengths > 0)
        ranked = np.array(sorted(valid.tolist(), key=lambda row: hashes[row]), dtype=np.int64)
        return Picks(self.config.take(ranked, context.pool), reasons="smallest hash")


def cost(config: Any, facts: Any) -> Cost:
    """Hashes are at hand."""
    return Cost()


SPEC = MethodSpec(
    name="coin_flip",
    kind="selection",
    slot="pool",
    summary="keep the rows whose content hash is smallest.",
    config=CoinFlipConfig,
    build=CoinFlip,
    cost=cost,
    traits=Traits(baseline=True),
    tiny={"fraction": 0.25},
)
