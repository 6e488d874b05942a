"""deita: Keep rows of high complexity times quality that are unlike every better row.

Idea
    Ask a model how complex each instruction is and how good its answer, each as one digit from 1 to 6,
    and read the mark off the six digits' logits z at the place where the digit would be written:

        mark = sum over d of d exp(z[d]) / sum over d of exp(z[d])
        s[n] = sum over turns t of row n of complexity[n, t] * quality[n, t]

    Then walk down the ranking by s and keep a row when its embedding's cosine to every row kept so far
    is at most ``tau``, until the size is reached.

Cost      N pool rows of T tokens, C tokens of a question, F(T) forward FLOPs of T tokens, h its width
    flops  N*(F(C + T/2) + F(C + T) + F(T) without the head), and 2*N*k*h for comparing
    memory 4*N*h bytes of embeddings

Use when
    A chat model that follows instructions can judge, and a small, good and varied set is wanted.

Avoid when
    The only model at hand is a small base model: its marks say little. Grades that exist already are
    better; name their columns.

Differs
    The paper trains its two judges from a stronger model's rankings; here the model itself is asked, in
    our own words, or ``complexity_column`` and ``quality_column`` hold the marks. Embeddings are means
    over tokens and centred, since raw hidden states of language models all look alike. Where fewer rows
    than asked for are unlike each other, the best of the others fill up (``fill``).

Paper
    What Makes Good Data for Alignment? A Comprehensive Study of Automatic Data Selection in Instruction
    Tuning (2024), arXiv:2312.15685
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.memory import BatchShape
from hf_eff.contracts.selection import Picks, Pool, SelectionContext
from hf_eff.contracts.spec import MethodSpec, Paper, Traits, knob
from hf_eff.engines.digit_scores import NO_MARK, digit_tokens, expected_digits, prompt_tokens
from hf_eff.engines.embeddings import (
    POOLINGS,
    centred,
    embedding_flops,
    embeddings,
    mean_vector,
)
from hf_eff.engines.pool_size import SizedConfig
from hf_eff.engines.row_text import reading, turns_at
from hf_eff.errors import DataError, OptionError, OutsideIntendedUseWarning
from hf_eff.numerics.flops import forward_flops
from hf_eff.numerics.novelty import greedy_novel
from hf_eff.numerics.ranking import rank

_COMPLEXITY = (
    "Someone asked an assistant this:\n\n<<<\n{instruction}\n>>>\n\n"
    "How demanding is it to answer well? Think of the knowledge, the steps of reasoning and the conditions involved. "
    "Reply with a single digit from 1 (trivial) to 6 (very demanding)."
)
_QUALITY = (
    "Someone asked an assistant this:\n\n<<<\n{instruction}\n>>>\n\nThe assistant answered:\n\n<<<\n{answer}\n>>>\n\n"
    "How good is the answer? Think of its correctness, helpfulness, depth and clarity. "
    "Reply with a single digit from 1 (useless) to 6 (excellent)."
)

_Marks = dict[str, dict[int, np.ndarray]]
"""[turns] marks by row, by what they are about."""
_Notes = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class DeitaConfig(SizedConfig):
    """Options of ``selection="deita"``."""

    tau: float = knob(0.9, "Largest cosine to a row kept before.", low=-1.0, high=1.0, paper="0.9")
    turns: str = knob("sum", "How the turns of a chat make one score.", choices=("sum", "mean"), paper="sum")
    complexity_prompt: str = knob(_COMPLEXITY, "Question about {instruction}, to be answered by a digit from 1 to 6.")
    quality_prompt: str = knob(_QUALITY, "Question about {instruction} and {answer}, to be answered by such a digit.")
    complexity_column: str | None = knob(None, "Column with marks to use instead: a number, or one a turn.")
    quality_column: str | None = knob(None, "The same for quality.")
    scorer_tokens: int = knob(1024, "Longest question; longer rows are cut in it.", low=1, unit="tokens")
    pooling: str = knob("mean", "How token states make one vector.", choices=POOLINGS, paper="last")
    embedding_column: str | None = knob(None, "Column with vectors to compare instead of the model's states.")
    center: bool = knob(True, "Subtract the mean vector before comparing.", paper="False")
    fill: bool = knob(True, "Fill up with rows that are too alike when too few are not.", paper="False")

    def __post_init__(self) -> None:
        """Check that the questions are about something."""
        super().__post_init__()
        for name, pieces in (("complexity_prompt", ("instruction",)), ("quality_prompt", ("instruction", "answer"))):
            missing = [f"{{{piece}}}" for piece in pieces if f"{{{piece}}}" not in getattr(self, name)]
            if missing:
                raise OptionError(f"{type(self).__name__}.{name} must hold {' and '.join(missing)}; put it in.")

    def asks(self) -> dict[str, str]:
        """Questions to ask, by what they are about; none where a column answers."""
        asked = {"complexity": self.complexity_prompt, "quality": self.quality_prompt}
        return {name: prompt for name, prompt in asked.items() if getattr(self, f"{name}_column") is None}


class Deita:
    """Ranks by complexity times quality and skips what is too alike."""

    def __init__(self, config: DeitaConfig) -> None:
        self.config = config

    def select(self, context: SelectionContext) -> Picks:
        """Score, embed, and walk down the ranking."""
        context = context.by_proxy()
        pool, config = context.pool, self.config
        limit = config.limit(pool)  # refuses an impossible size before anything is computed
        scores, notes = self._scores(context)
        vectors = embeddings(context, pool, column=config.embedding_column, pooling=config.pooling)
        scores[~np.isfinite(vectors).all(axis=1)] = np.nan
        order = rank(scores, descending=True, ties=pool.row_hash)
        if not len(order):
            raise DataError("no row of the pool has a finite mark and embedding; check the model's weights and dtype.")
        if config.center:
            vectors = centred(vectors, mean_vector(vectors))
        smallest = np.cumsum(np.sort(config.units(pool)[order]))
        most = int(np.searchsorted(smallest, limit, side="right"))  # no more rows than this fit
        novel = greedy_novel(order, vectors, config.tau, most)
        alike = order[~np.isin(order, novel.kept)] if config.fill else order[:0]
        positions = config.take(np.concatenate([novel.kept, alike]), pool)
        kept = set(novel.kept.tolist())
        return Picks(
            positions=positions,
            scores=scores,
            reasons=[
                f"complexity x quality {scores[row]:.4g}" + ("" if row in kept else ", fills up: like a better row")
                for row in positions.tolist()
            ],
            notes={**notes, "tau": config.tau, "unlike": sum(row in kept for row in positions.tolist())},
        )

    def _scores(self, context: SelectionContext) -> tuple[np.ndarray, _Notes]:
        """[N] product of the two marks over turns, NaN for invalid rows, and facts about how it was found."""
        pool, asks = context.pool, self.config.asks()
        rows = np.flatnonzero(pool.loss_lengths > 0)
        if pool.row_hash is not None:
            rows = rows[np.argsort(np.asarray(pool.row_hash)[rows], kind="stable")]
        marks, notes = self._asked(context, rows.tolist(), asks) if asks else ({}, {})
        for name in [name for name in ("complexity", "quality") if name not in asks]:
            column = str(getattr(self.config, f"{name}_column"))
            marks[name] = {row: _given(pool, row, column) for row in rows.tolist()}
        scores = np.full(len(pool), np.nan)
        for row in rows.tolist():
            scores[row] = self._product(row, marks["complexity"][row], marks["quality"][row])
        return np.where(np.isfinite(scores), scores, np.nan), notes

    def _product(self, row: int, complexity: np.ndarray, quality: np.ndarray) -> float:
        if len(complexity) != len(quality) and 1 not in (len(complexity), len(quality)):
            raise DataError(
                f"row {row} has {len(complexity)} marks of complexity and {len(quality)} of quality; give one a turn."
            )
        products = complexity * quality
        return float(products.sum() if self.config.turns == "sum" else products.mean())

    def _asked(self, context: SelectionContext, rows: Sequence[int], asks: Mapping[str, str]) -> tuple[_Marks, _Notes]:
        """Marks of each turn by the model, and the tokens that it was given to choose from."""
        pool, tokenizer, most = context.pool, context.tokenizer, self.config.scorer_tokens
        if tokenizer is None:
            raise DataError(
                "selection='deita' asks the model in words and has no tokenizer; pass processing_class=, or name "
                "complexity_column and quality_column."
            )
        digits = digit_tokens(tokenizer)
        if digits is None:
            text = f"the tokenizer has no single tokens for the digits 1 to 6, so that every mark is {NO_MARK}"
            warnings.warn(OutsideIntendedUseWarning(f"selection='deita': {text}; name columns of marks."), stacklevel=2)
        counts = [len(turns_at(pool, row, tokenizer)) for row in reading(context, rows, "Turns")]
        items = [(row, turn) for row, count in zip(rows, counts, strict=True) for turn in range(count)]
        marks: _Marks = {}
        for name, prompt in asks.items():

            def encode(item: tuple[int, int], prompt: str = prompt) -> list[int]:
                return prompt_tokens(tokenizer, prompt, turns_at(pool, item[0], tokenizer)[item[1]], most)

            found = expected_digits(context, items, encode, digits, name.capitalize())
            marks[name] = dict(zip(rows, np.split(found, np.cumsum(counts)[:-1]), strict=True))
        return marks, {"digit_tokens": digits}


def _given(pool: Pool, row: int, column: str) -> np.ndarray:
    """Marks that the user brings: one, or one a turn."""
    if pool.examples is None or column not in pool.examples[row]:
        raise DataError(f"the pool has no column {column!r}; add it, or let the model judge.")
    value = pool.examples[row][column]
    try:
        return np.atleast_1d(np.asarray(np.nan if value is None else value, dtype=np.float64))
    except (TypeError, ValueError):
        raise DataError(f"column {column!r} must hold numbers, or lists of them, got {value!r}.") from None


def cost(config: DeitaConfig, facts: Facts) -> Cost:
    """Two questions and an embedding a row, each with one turn, half of it the instruction."""
    rows, length = facts.pool.num_rows or 0, facts.pool.mean_tokens
    # A vocabulary of V tokens, 256 of them bytes, packs about this many characters of English into a token.
    packed = max(1.0, math.log2(max(2, facts.model.vocab_size) / 256) / 2)
    flops, tokens = 0.0, 0.0
    for name, prompt in config.asks().items():
        own = len(prompt.replace("{instruction}", "").replace("{answer}", "")) / packed
        asked = round(min(config.scorer_tokens, own + (length / 2 if name == "complexity" else length)))
        flops += forward_flops(facts.model, BatchShape(rows, max(1, asked)))
        tokens += rows * float(max(1, asked))
    if config.embedding_column is None:
        flops += embedding_flops(facts.model, rows, length)
        tokens += rows * length
    return Cost(flops=flops, tokens=tokens)


SPEC = MethodSpec(
    name="deita",
    kind="selection",
    slot="pool",
    summary="Keep rows of high complexity times quality that are unlike every better row.",
    config=DeitaConfig,
    build=Deita,
    cost=cost,
    paper=Paper(
        title="What Makes Good Data for Alignment? A Comprehensive Study of Automatic Data Selection in Instruction "
        "Tuning",
        year=2024,
        arxiv="2312.15685",
    ),
    traits=Traits(needs_model=True, uses_proxy=True, needs_causal_lm=True),
    tiny={"fraction": 0.5},
)
