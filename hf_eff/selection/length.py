"""length: Keep the rows with the longest (or shortest) completions.

Idea
    Rank rows by the number of tokens that carry loss and keep the top. Long answers tend to be
    detailed ones, and this ranking, which reads no content, is a strong baseline for instruction
    tuning:

        score[n] = tokens of row n that carry loss

Cost
    None.

Use when
    As a baseline beside ``random``: a selector that does not beat it has learnt length.

Avoid when
    The task wants short answers, or length marks noise (logs, boilerplate).

Differs
    Lengths are counted after truncation to ``max_length``, so that rows at the limit tie; content
    hashes break ties.

Paper
    Long Is More for Alignment: A Simple but Tough-to-Beat Baseline for Instruction Fine-Tuning
    (2024), arXiv:2402.04833
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.selection import Picks, SelectionContext
from hf_eff.contracts.spec import MethodSpec, Paper, knob
from hf_eff.engines.pool_size import SizedConfig
from hf_eff.numerics.ranking import rank


@dataclass(frozen=True, kw_only=True)
class LengthConfig(SizedConfig):
    """Options of ``selection="length"``."""

    order: str = knob("longest", "Which end to keep.", choices=("longest", "shortest"), paper="longest")


class Length:
    """Ranks by loss tokens."""

    def __init__(self, config: LengthConfig) -> None:
        self.config = config

    def select(self, context: SelectionContext) -> Picks:
        """The rows at one end of the length distribution."""
        pool, longest = context.pool, self.config.order == "longest"
        scores = np.where(pool.loss_lengths > 0, pool.loss_lengths, np.nan).astype(np.float64)
        positions = self.config.take(rank(scores, descending=longest, ties=pool.row_hash), pool)
        return Picks(
            positions=positions,
            scores=scores,
            reasons=[f"{int(scores[position])} loss tokens" for position in positions],
            higher_is_better=longest,
        )


def cost(config: LengthConfig, facts: Facts) -> Cost:  # noqa: ARG001 - the signature every method shares
    """Nothing beyond tokenising the pool, which training does too."""
    return Cost()


SPEC = MethodSpec(
    name="length",
    kind="selection",
    slot="pool",
    summary="Keep the rows with the longest (or shortest) completions.",
    config=LengthConfig,
    build=Length,
    cost=cost,
    paper=Paper(
        title="Long Is More for Alignment: A Simple but Tough-to-Beat Baseline for Instruction Fine-Tuning",
        year=2024,
        arxiv="2402.04833",
    ),
    tiny={"fraction": 0.5},
)
