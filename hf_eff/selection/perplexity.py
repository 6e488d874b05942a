"""perplexity: Keep a band of the pool's perplexity distribution: low, middle or high.

Idea
    Score each row by its perplexity under the model and keep a band of the empirical distribution:

        ppl[n] = exp(mean over tokens t of row n of -log p(y_t | y_<t)),    u[n] = rank of ppl[n] in [0, 1]
        low: u < q        mid: |u - 1/2| <= q/2        high: u > 1 - q        q: share of the pool to keep

    Low rows are what the model already says; high rows are what it has never seen, noise included.

Cost      N pool rows, T mean tokens, P parameters
    flops  2*P*T*N        (one forward of every row)
    disk   0

Use when
    A cheap model can score for a much larger one: the gain pays for the scoring only when the
    trained model is several times (about 5x in the paper) the size of the scorer.

Avoid when
    The pool is noisy and ``high`` is wanted, or a target set exists: then match it instead.

Differs
    The paper's scorer is first tuned on a few target rows; here it is the model as given. Its
    windows of 2048 tokens are not needed, since rows are truncated to ``max_length``. Its
    "top" keeps the lowest third, which other papers call the reverse; here bands are named by
    what they hold. Inside a band its order is random; here the band's core comes first.

Paper
    Compute-Constrained Data Selection (2025), arXiv:2410.16208
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.memory import BatchShape
from hf_eff.contracts.selection import Picks, SelectionContext
from hf_eff.contracts.spec import MethodSpec, Paper, Traits, knob
from hf_eff.engines.pool_size import SizedConfig
from hf_eff.engines.scoring import pool_losses
from hf_eff.errors import DataError
from hf_eff.numerics.flops import forward_flops
from hf_eff.numerics.ranking import rank

_MAX_LOSS = 700.0
"""Nats whose exponential a float64 still holds."""


@dataclass(frozen=True, kw_only=True)
class PerplexityConfig(SizedConfig):
    """Options of ``selection="perplexity"``."""

    band: str = knob("mid", "Part of the distribution to keep.", choices=("low", "mid", "high"), paper="mid")
    tokens: str = knob(
        "loss", "Tokens that count: those that carry loss, or all.", choices=("loss", "all"), paper="all"
    )


class Perplexity:
    """Ranks by the model's surprise."""

    def __init__(self, config: PerplexityConfig) -> None:
        self.config = config

    def select(self, context: SelectionContext) -> Picks:
        """Score every row with one forward and keep the band."""
        context = context.by_proxy()
        pool, band = context.pool, self.config.band
        self.config.limit(pool)  # refuses an impossible size before anything is computed
        if self.config.tokens == "all" and not context.is_causal_lm:
            raise DataError("tokens='all' reads prompts as a decoder does; with other models use tokens='loss'.")
        losses = pool_losses(context, pool, all_tokens=self.config.tokens == "all", description="Perplexity")
        if not np.isfinite(losses).any():
            raise DataError("the model gives no finite loss for any row of the pool; check its weights and dtype.")
        losses[~np.isfinite(losses)] = np.nan
        scores = np.exp(np.minimum(losses, _MAX_LOSS))
        # Ranks are those of the loss, which the bound above does not touch.
        ascending = rank(losses, descending=False, ties=pool.row_hash)
        positions = self.config.take(_towards(ascending, band), pool)
        return Picks(
            positions=positions,
            scores=scores,
            reasons=[f"perplexity {scores[position]:.4g} ({band} band)" for position in positions],
            higher_is_better=band == "high",
            notes={"band": band},
        )


def _towards(ascending: np.ndarray, band: str) -> np.ndarray:
    """Positions from the core of the band outwards."""
    if band == "low":
        return ascending
    if band == "high":
        return ascending[::-1]
    places = np.arange(len(ascending))
    return ascending[np.lexsort((places, np.abs(2 * places - (len(ascending) - 1))))]


def cost(config: PerplexityConfig, facts: Facts) -> Cost:  # noqa: ARG001 - the signature every method shares
    """One forward of the pool; padding inside batches of similar length is neglected."""
    rows = facts.pool.num_rows or 0
    flops = forward_flops(facts.model, BatchShape(rows, round(facts.pool.mean_tokens)))
    return Cost(flops=flops, tokens=rows * facts.pool.mean_tokens)


SPEC = MethodSpec(
    name="perplexity",
    kind="selection",
    slot="pool",
    summary="Keep a band of the pool's perplexity distribution: low, middle or high.",
    config=PerplexityConfig,
    build=Perplexity,
    cost=cost,
    paper=Paper(title="Compute-Constrained Data Selection", year=2025, arxiv="2410.16208"),
    traits=Traits(needs_model=True, uses_proxy=True),
    tiny={"fraction": 0.5},
)
