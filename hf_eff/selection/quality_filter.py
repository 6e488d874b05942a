"""quality_filter: Drop duplicates, near duplicates and damaged, evasive or repetitive rows; keep the rest.

Idea
    Ask each row a fixed sequence of rules and record the first one it fails: tokens that carry loss,
    an answer at all, bounds of length, refusals, boilerplate, damaged characters, language, repetition,
    a grade. Among the rows that are left, drop all but one of each group of equal texts (case and
    spaces aside) and of each group of near duplicates:

        J(a, b) = |A and B| / |A or B| >= near_duplicates     A, B: character 5-grams of prompt and answer

    found by MinHash with banding (128 hashes), so that not all pairs are compared. Of a group the row
    with the best grade stays, then the longest answer, then the smallest content hash.

Cost      N pool rows of c characters
    flops  0; about half a millisecond of one core for each thousand characters
    memory 0.2 kB a row

Use when
    Always, before a method that scores: duplicates and refusals cost as much to score as good rows.

Avoid when
    Rows differ by little on purpose, such as generated arithmetic or templates: raise
    ``near_duplicates`` or set it to None.

Differs
    The paper compares 5-grams of tokens with 9,000 hashes and then edit distance; here 5-grams of
    characters with 128 and the exact similarity of what they find. Its rows are documents, here they
    are a prompt and an answer.

Paper
    Deduplicating Training Data Makes Language Models Better (2022), arXiv:2107.06499
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.selection import Picks, SelectionContext
from hf_eff.contracts.spec import MethodSpec, Paper
from hf_eff.engines.quality_rules import QualityConfig, judge
from hf_eff.numerics.ranking import rank


@dataclass(frozen=True, kw_only=True)
class QualityFilterConfig(QualityConfig):
    """Options of ``selection="quality_filter"``."""


class QualityFilter:
    """Keeps what no rule objects to."""

    def __init__(self, config: QualityFilterConfig) -> None:
        self.config = config

    def select(self, context: SelectionContext) -> Picks:
        """Every sound row; a smaller size keeps the best grades, or a draw by content where there are none."""
        pool, config = context.pool, self.config
        config.limit(pool)  # refuses an impossible size before anything is read
        verdict = judge(context, config)
        grades = np.zeros(len(pool)) if verdict.grades is None else verdict.grades
        order = rank(np.where(verdict.failed < 0, grades, np.nan), descending=True, ties=pool.row_hash)
        positions = config.take_sound(order, pool, verdict)
        return Picks(
            positions=positions,
            scores=verdict.grades,
            reasons=[_reason(verdict.grades, position) for position in positions.tolist()],
            notes=verdict.counts(len(positions)),
        )


def _reason(grades: np.ndarray | None, position: int) -> str:
    return "passes every rule" if grades is None else f"passes every rule; grade {grades[position]:.4g}"


def cost(config: QualityFilterConfig, facts: Facts) -> Cost:  # noqa: ARG001 - the signature every method shares
    """No model is run."""
    return Cost()


SPEC = MethodSpec(
    name="quality_filter",
    kind="selection",
    slot="pool",
    summary="Drop duplicates, near duplicates and damaged, evasive or repetitive rows; keep the rest.",
    config=QualityFilterConfig,
    build=QualityFilter,
    cost=cost,
    paper=Paper(title="Deduplicating Training Data Makes Language Models Better", year=2022, arxiv="2107.06499"),
    tiny={"fraction": 0.5},
)
