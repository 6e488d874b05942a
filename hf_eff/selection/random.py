"""random: Draw rows at random: plainly, evenly over sources, or in proportion to them.

Idea
    Uniform draws without replacement. ``plain`` draws from the whole pool. ``balanced`` shares the
    size among the sources by water-filling: every source gives equally much, and what a small
    source cannot give the others do. ``proportional`` keeps each source's share of the pool
    exactly, up to rounding by largest remainder, which takes the luck out of small sources. With
    ``num_tokens`` all three count tokens instead of rows: rows are taken from the shuffle until
    the next one would pass the limit.

Cost
    None.

Use when
    Always, as the baseline of every other method: with three seeds and at equal tokens, not at
    equal rows, since a method that prefers long rows wins or loses on length alone.

Avoid when
    Most of the pool has nothing to do with the task.

Differs
    Not from any paper; balanced random is the baseline of Ivison et al. (2025), arXiv:2503.01807.
    Draws depend on the seed and on the rows' content, not on their order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.selection import Picks, Pool, SelectionContext
from hf_eff.contracts.spec import MethodSpec, Traits, knob
from hf_eff.engines.pool_size import SizedConfig
from hf_eff.errors import DataError
from hf_eff.numerics.water_filling import largest_remainder, water_fill


@dataclass(frozen=True, kw_only=True)
class RandomConfig(SizedConfig):
    """Options of ``selection="random"``."""

    mode: str = knob(
        "plain",
        "Draw from the whole pool, equally from every source, or from each in proportion.",
        choices=("plain", "balanced", "proportional"),
    )
    source_column: str = knob("source", "Column with the name of a row's source; not read by mode='plain'.")


class Random:
    """Uniform draws, whole or per source."""

    def __init__(self, config: RandomConfig) -> None:
        self.config = config

    def select(self, context: SelectionContext) -> Picks:
        """Draw without replacement; the generator is the only source of chance."""
        pool = context.pool
        shuffled = _shuffle(pool, context.generator)
        if self.config.mode == "plain":
            return Picks(positions=self.config.take(shuffled, pool), reasons="random draw")
        names, members = self._members(pool, shuffled)
        units, limit = self.config.units(pool), self.config.limit(pool)
        sizes = [int(units[rows].sum()) for rows in members]
        share = water_fill if self.config.mode == "balanced" else largest_remainder
        shares = share(sizes, min(limit, sum(sizes)))
        kept = [rows[np.cumsum(units[rows]) <= amount] for rows, amount in zip(members, shares, strict=True)]
        if not any(len(rows) for rows in kept):
            raise DataError(
                f"num_tokens={limit} shared among {len(names)} sources is less than one row each; raise it."
            )
        notes: dict[str, Any] = {"rows_by_source": {name: len(rows) for name, rows in zip(names, kept, strict=True)}}
        reasons = [f"random draw from {name}" for name, rows in zip(names, kept, strict=True) for _ in rows]
        return Picks(positions=np.concatenate(kept), reasons=reasons, notes=notes)

    def _members(self, pool: Pool, shuffled: np.ndarray) -> tuple[list[str], list[np.ndarray]]:
        """Names of the sources, sorted, and each one's rows in the order of the shuffle."""
        if pool.sources is None:
            raise DataError(
                f"mode={self.config.mode!r} needs the source of every row, but the dataset has no column "
                f"{self.config.source_column!r}; pass source_column= or mode='plain'."
            )
        sources = np.asarray(pool.sources)[shuffled]
        names = sorted(set(sources.tolist()))
        return names, [shuffled[sources == name] for name in names]


def _shuffle(pool: Pool, generator: torch.Generator) -> np.ndarray:
    """Valid positions in random order, which depends on the rows' content but not on their order."""
    valid = np.flatnonzero(pool.loss_lengths > 0)
    if pool.row_hash is not None:
        valid = valid[np.argsort(np.asarray(pool.row_hash)[valid], kind="stable")]
    return valid[torch.randperm(len(valid), generator=generator).numpy()]


def cost(config: RandomConfig, facts: Facts) -> Cost:  # noqa: ARG001 - the signature every method shares
    """Nothing is computed."""
    return Cost()


SPEC = MethodSpec(
    name="random",
    kind="selection",
    slot="pool",
    summary="Draw rows at random: plainly, evenly over sources, or in proportion to them.",
    config=RandomConfig,
    build=Random,
    cost=cost,
    traits=Traits(baseline=True, deterministic=False),
    tiny={"fraction": 0.5},
)
