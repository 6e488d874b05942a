"""match: keep the rows whose mean hidden state points where the target's does.

Idea
    One forward a row, mean over its tokens of the last hidden state, cosine with the target's mean:

        score[n] = cos(mean_t h[n, t], mean_{r, t} h[r, t])

Cost      N pool rows, R target rows, T mean tokens, F flops of one forward of T tokens
    flops  F*(N + R)

Use when  a test needs a small selector that scores with a model.
Avoid when anything real is at stake.
Differs   nothing to differ from: a toy.

Paper     none, a baseline for tests
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.memory import BatchShape
from hf_eff.contracts.selection import Picks, Pool, SelectionContext
from hf_eff.contracts.spec import MethodSpec, Traits, knob
from hf_eff.engines.pool_pass import pool_batches
from hf_eff.engines.pool_size import SizedConfig
from hf_eff.engines.scoring import scoring_mode
from hf_eff.errors import DataError
from hf_eff.numerics.flops import forward_flops
from hf_eff.numerics.ranking import rank


@dataclass(frozen=True, kw_only=True)
class MatchConfig(SizedConfig):
    """Options of ``selection="match"``."""

    pooling: str = knob("mean", "How token states become one vector.", choices=("mean", "last"))


class Match:
    """Scores rows by the direction of their hidden state."""

    def __init__(self, config: MatchConfig) -> None:
        self.config = config

    def select(self, context: SelectionContext) -> Picks:
        """Score every valid row and keep the best.

        Raises:
            DataError: There is no valid row, no target, or no finite score.
        """
        valid = np.flatnonzero(np.asarray(context.pool.loss_lengths) > 0)
        if not len(valid) or context.reference is None or not len(context.reference):
            raise DataError("selection='match' needs at least one row that carries loss, and a target set.")
        target = self._features(context, context.reference).nanmean(0)
        scores = torch.cosine_similarity(self._features(context, context.pool), target[None]).numpy()
        # Five digits: batches of another shape round the sixth differently.
        order = rank(scores.round(5), descending=True, ties=context.pool.row_hash)
        if not len(order):
            raise DataError("selection='match': the model gives no finite hidden state for any row.")
        return Picks(self.config.take(order, context.pool), scores, reasons="near the target")

    def _features(self, context: SelectionContext, pool: Pool) -> torch.Tensor:
        """[N, H] one vector a row, NaN for rows that carry no loss."""
        vectors: dict[int, torch.Tensor] = {}
        with scoring_mode(context.model), torch.no_grad():
            for positions, batch in pool_batches(context, pool, "Matching"):
                vectors.update(zip(positions.tolist(), self._vectors(context, batch), strict=True))
        hole = torch.full_like(next(iter(vectors.values())), math.nan)
        return torch.stack([vectors.get(row, hole) for row in range(len(pool))])

    def _vectors(self, context: SelectionContext, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        decoder = context.model.base_model
        states: torch.Tensor = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        if self.config.pooling == "last":
            return states[torch.arange(len(ids)), mask.sum(1) - 1].float()
        return ((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).float()


def cost(_config: MatchConfig, facts: Facts) -> Cost:
    """One forward a row of pool and target."""
    pool = facts.pool
    rows, length = (pool.num_rows or 0) + pool.num_reference, math.ceil(pool.mean_tokens)
    return Cost(
        flops=rows * forward_flops(facts.model, BatchShape(1, length)),
        tokens=rows * pool.mean_tokens,
    )


SPEC = MethodSpec(
    name="match",
    kind="selection",
    slot="pool",
    summary="keep the rows whose mean hidden state points where the target's does.",
    config=MatchConfig,
    build=Match,
    cost=cost,
    traits=Traits(baseline=True, needs_model=True, needs_reference_set=True),
    tiny={"fraction": 0.25},
)
