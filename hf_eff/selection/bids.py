"""bids: Keep rows in turn for whichever target row has got least, by influences that are made comparable.

Idea
    A[n, r], the influence of pool row n on target row r, is the score of ``less`` before target rows are
    put together: the sum over checkpoints of weight times cosine. Some targets respond more strongly
    to everything, and by plain scores they take the whole budget. So standardise, then balance:

        Z[n, r] = (A[n, r] - mean of column r) / its standard deviation, within +-clip
        max_row       take the row with the largest lead Z[n, r] - s[r] for some r
        argmin_task   take the best row for the r whose s[r] is smallest

    where s[r] is the mean of column r over the rows taken so far.

Cost      N pool rows, V target rows, E checkpoints, A adapter parameters, D numbers of a feature, k rows to take
    flops  those of less; 2*E*N*V*D for the matrix and N*V*log k + k*V comparisons are not counted
    disk   that of less
    memory 8*N*V bytes, 4*k*V for the order of the columns

Use when
    The target holds several abilities, one or more rows each, and all of them should gain. Groups are
    not needed.

Avoid when
    The target is one task: ``less`` does the same for less. Above some hundred target rows the matrix
    becomes large.

Differs
    No code was published. The steps follow the description in the paper; that the lead is taken over the
    mean, and the bound ``clip``, against single odd target rows, are choices made here. Taking rows from
    the heads of sorted columns gives the same rows as looking through the whole matrix at every step.

Paper
    Improving Influence-based Instruction Tuning Data Selection for Balanced Learning of Diverse
    Capabilities (2025), arXiv:2501.12147
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.selection import Picks, Pool, SelectionContext
from hf_eff.contracts.spec import MethodSpec, Paper, Traits, knob
from hf_eff.engines.gradient_method import TINY_TRACE, GradientConfig, Traced, trace_cost, trace_pool
from hf_eff.engines.influence import Influence
from hf_eff.errors import DataError
from hf_eff.numerics.balanced_influence import MODES, balanced_order, standardise

# N pool rows, V target rows, k rows to take


@dataclass(frozen=True, kw_only=True)
class BidsConfig(GradientConfig):
    """Options of ``selection="bids"``."""

    default_fraction: ClassVar[float] = 0.15

    mode: str = knob("max_row", "What is served next: the largest lead, or the target behind.", choices=MODES)
    clip: float | None = knob(6.0, "Bound of a standardised influence; None: no bound.", low=0.1, unit="deviations")
    store_dtype: str = knob("float16", "Type of stored features.", choices=("float16", "float32"))


class Bids:
    """Serves the target rows in turn."""

    def __init__(self, config: BidsConfig) -> None:
        self.config = config

    def select(self, context: SelectionContext) -> Picks:
        """Choose rows of ``context.pool``, in the order in which they are taken.

        Raises:
            BudgetExceededError: The next batch would pass a limit; it was not computed.
            DataError: There is no target or no valid row, or gradients are not finite.
            ManifestError: ``context.store_dir`` holds features of other rows, options or another model.
        """
        traced = trace_pool(context, self.config, "bids", store_dtype=self.config.store_dtype)
        pool, trace = traced.pool, traced.trace
        influence, members = Influence(self.config.similarity).matrix(trace.pools, trace.targets, trace.weights)
        finite = np.flatnonzero(np.isfinite(influence).all(axis=1))
        if not len(finite):
            raise DataError("no row of the pool has a finite gradient; check the model's weights and dtype.")
        # In the order of their content, which then decides between equals.
        finite = finite[np.argsort(np.asarray(pool.row_hash)[finite], kind="stable")]
        standardised = standardise(influence[finite], self.config.clip)
        chosen, columns = balanced_order(standardised, self._count(pool, finite), self.config.mode)
        positions = self.config.take(finite[chosen], pool)
        taken = len(positions)
        scores = np.full(len(pool), np.nan)
        scores[finite] = standardised.max(axis=1)
        served = [_name(traced, int(members[column])) for column in columns[:taken]]
        values = standardised[chosen[:taken], columns[:taken]]
        return Picks(
            positions=positions,
            scores=scores,
            reasons=[f"{value:.2g} deviations for {name}" for value, name in zip(values, served, strict=True)],
            notes={
                **traced.notes,
                "mode": self.config.mode,
                "num_scored": len(finite),
                "rows_by_target": {name: served.count(name) for name in sorted(set(served))},
            },
        )

    def _count(self, pool: Pool, rows: np.ndarray) -> int:
        """Rows to order: as many as the size could hold at most."""
        used = np.cumsum(np.sort(self.config.units(pool)[rows]))
        return int(np.searchsorted(used, self.config.limit(pool), side="right"))


def _name(traced: Traced, row: int) -> str:
    """A target row, in words; its group where there is one."""
    return f"target row {row}" + (f" ({traced.target.groups[row]})" if traced.target.groups else "")


def cost(config: BidsConfig, facts: Facts) -> Cost:
    """Closed form of the module's head."""
    return trace_cost(config, facts, bits=16 if config.store_dtype == "float16" else 32)


SPEC = MethodSpec(
    name="bids",
    kind="selection",
    slot="pool",
    summary="Keep rows in turn for whichever target row has got least, by influences that are made comparable.",
    config=BidsConfig,
    build=Bids,
    cost=cost,
    paper=Paper(
        title="Improving Influence-based Instruction Tuning Data Selection for Balanced Learning of Diverse "
        "Capabilities",
        year=2025,
        arxiv="2501.12147",
    ),
    traits=Traits(deterministic=False, needs_model=True, uses_proxy=True, needs_reference_set=True),
    tiny={"fraction": 0.25, **TINY_TRACE},
    requires={"peft": "peft"},
)
