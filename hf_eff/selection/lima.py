"""lima: A thousand sound rows that differ as much as possible, the best of every kind.

Idea
    Drop unsound rows (the rules of ``quality_filter``), divide the rest into kinds, and let the kinds
    take turns, so that each gives equally many rows and what small kinds cannot give comes from the
    others (water-filling). Inside a kind the best grade comes first, or without grades the longest
    answer:

        order = best of kind 1, best of kind 2, ..., second best of kind 1, ...        keep its first k

    Kinds are the sources of the rows. A pool of one source is divided by what a prompt begins with (its
    32 most common first words, and a rest) and by its length (powers of two, in words).

Cost
    flops  0; see ``quality_filter``

Use when
    A strong base model is to be taught a style of answering rather than facts, and the pool is large
    enough that a thousand good rows are in it.

Avoid when
    The base model is weak, or the task is narrow: then rows like the task teach more than variety.

Differs
    The paper's rows were collected and written by hand; these rules only approximate that. How to
    train on them is the business of training arguments, not of a selection: the paper's recipe is in
    the notes of the selection.

Paper
    LIMA: Less Is More for Alignment (2023), arXiv:2305.11206
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.selection import Picks, Pool, SelectionContext
from hf_eff.contracts.spec import MethodSpec, Paper, knob
from hf_eff.engines.quality_rules import QualityConfig, Verdict, judge
from hf_eff.engines.row_text import has_text, id_text, joined, reading, turns_at
from hf_eff.errors import DataError
from hf_eff.numerics.bm25 import words
from hf_eff.numerics.ranking import rank
from hf_eff.numerics.round_robin import round_robin

_OPENINGS = 32
"""First words that make a kind of their own."""
_RECIPE = {
    "optimizer": "AdamW, betas 0.9 and 0.95, weight decay 0.1",
    "learning_rate": "1e-5 falling linearly to 1e-6",
    "epochs": 15,
    "batch_size": 32,
    "dropout": "on residual connections, from 0 at the bottom layer to 0.3 at the top",
    "early_stop": "by reading generated answers to 50 held-out prompts, not by perplexity",
}
"""How the paper trained a model of 65B parameters on its thousand rows."""


@dataclass(frozen=True, kw_only=True)
class LimaConfig(QualityConfig):
    """Options of ``selection="lima"``. Without a size it keeps 1,000 rows, or all sound ones if they are fewer."""

    default_rows: ClassVar[int] = 1000

    kinds: str = knob(
        "auto",
        "What divides the pool: sources, or the wording of prompts; auto: sources where there are several.",
        choices=("auto", "source", "prompt"),
    )
    source_column: str = knob("source", "Column with the name of a row's source.")

    @property
    def size(self) -> dict[str, Any]:
        """The size in force."""
        given = (self.fraction, self.num_examples, self.num_tokens) != (None, None, None)
        return super().size if given else {"kind": "num_examples", "value": self.default_rows}

    def limit(self, pool: Pool) -> int:
        """Rows (tokens) that may be kept; the default size never exceeds the pool."""
        if self.fraction is None and self.num_examples is None and self.num_tokens is None:
            valid = int(np.count_nonzero(pool.loss_lengths > 0))
            return min(self.default_rows, valid) or super().limit(pool)
        return super().limit(pool)


class Lima:
    """Lets the kinds of a pool take turns."""

    def __init__(self, config: LimaConfig) -> None:
        self.config = config

    def select(self, context: SelectionContext) -> Picks:
        """The best sound rows of every kind."""
        pool, config = context.pool, self.config
        config.limit(pool)  # refuses an impossible size before anything is read
        by_source = self._divides_by_source(pool)
        verdict = judge(context, config)
        kinds = self._sources(pool, verdict) if by_source else _prompt_kinds(context, verdict)
        scores = np.full(len(pool), np.nan)
        scores[verdict.sound] = (pool.loss_lengths if verdict.grades is None else verdict.grades)[verdict.sound]
        order = rank(scores, descending=True, ties=pool.row_hash)
        groups: dict[str, list[int]] = {kind: [] for kind in sorted(set(kinds.values()))}
        for row in order.tolist():
            groups[kinds[row]].append(row)
        positions = config.take_sound(round_robin([np.asarray(rows) for rows in groups.values()]), pool, verdict)
        shown = "grade" if verdict.grades is not None else "answer tokens"
        taken = Counter(kinds[row] for row in positions.tolist())
        return Picks(
            positions=positions,
            scores=scores,
            reasons=[f"{shown} {scores[row]:.4g} in {kinds[row]}" for row in positions.tolist()],
            notes={
                **verdict.counts(len(positions)),
                "kinds": "source" if by_source else "prompt",
                "kept_by_kind": dict(sorted(taken.items())),
                "paper_recipe": _RECIPE,
            },
        )

    def _divides_by_source(self, pool: Pool) -> bool:
        if self.config.kinds == "source" and pool.sources is None:
            raise DataError(
                f"kinds='source' needs the source of every row, but the dataset has no column "
                f"{self.config.source_column!r}; pass source_column= or kinds='prompt'."
            )
        several = pool.sources is not None and len(set(pool.sources)) > 1
        return self.config.kinds == "source" or (self.config.kinds == "auto" and several)

    @staticmethod
    def _sources(pool: Pool, verdict: Verdict) -> dict[int, str]:
        return {row: f"source {(pool.sources or [])[row]}" for row in verdict.sound.tolist()}


def _prompt_kinds(context: SelectionContext, verdict: Verdict) -> dict[int, str]:
    """Kind of each sound row by the first word and the length of its prompt, or of its text without a prompt."""
    pool, found = context.pool, {}
    readable = has_text(pool, context.tokenizer)
    for row in reading(context, verdict.sound.tolist(), "Kinds of prompts"):
        text = joined(turns_at(pool, row, context.tokenizer)) if readable else id_text(pool.rows[row])
        terms = words(text.prompt or text.answer)
        found[row] = (terms[0] if terms else "", len(terms).bit_length())
    counts = Counter(opening for opening, _ in found.values())
    common = {word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_OPENINGS]}
    return {
        row: f"prompts in {repr(opening) if opening in common else 'other words'} of under {2**size} words"
        for row, (opening, size) in found.items()
    }


def cost(config: LimaConfig, facts: Facts) -> Cost:  # noqa: ARG001 - the signature every method shares
    """No model is run."""
    return Cost()


SPEC = MethodSpec(
    name="lima",
    kind="selection",
    slot="pool",
    summary="A thousand sound rows that differ as much as possible, the best of every kind.",
    config=LimaConfig,
    build=Lima,
    cost=cost,
    paper=Paper(title="LIMA: Less Is More for Alignment", year=2023, arxiv="2305.11206"),
    tiny={"fraction": 0.5},
)
