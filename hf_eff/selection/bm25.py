"""bm25: Keep the rows whose prompts share the target's rare words.

Idea
    A row's prompt is a document (its whole text where it has no prompt), lower-cased and without
    punctuation. The prompts of each group of target rows are a query. Score each document with BM25
    against each query and average over the groups:

        score[n] = mean over groups g of (1 / rows of g) sum over words t of g of
                   idf[t] f[t, n] (k1 + 1) / (f[t, n] + k1 (1 - b + b |n| / mean length))
        idf[t]   = log(1 + (N - rows with t + 1/2) / (rows with t + 1/2))

Cost      N pool rows
    flops  0; one pass over the text, tens of microseconds a row
    memory some 70 bytes for each word of a row that the target has too

Use when
    The target has a vocabulary of its own. Costs next to nothing, so nothing that scores with a model
    should do worse.

Avoid when
    The target shares no words with the rows that would help: another language, or numbers.

Differs
    The queries of a group are averaged over its rows rather than added up, so that groups of any size
    count alike. The inverse document frequency is the one that is never negative. With
    ``terms="tokens"``, or where no text can be read, token ids take the place of words.

Paper
    Compute-Constrained Data Selection (2025), arXiv:2410.16208; the formula is Okapi BM25 (Robertson
    and Zaragoza, 2009)
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.selection import Picks, Pool, SelectionContext
from hf_eff.contracts.spec import MethodSpec, Paper, Traits, knob
from hf_eff.engines.pool_size import SizedConfig
from hf_eff.engines.row_text import has_text, id_text, joined, reading, turns_at
from hf_eff.errors import DataError
from hf_eff.numerics.bm25 import bm25, words
from hf_eff.numerics.ranking import rank


@dataclass(frozen=True, kw_only=True)
class Bm25Config(SizedConfig):
    """Options of ``selection="bm25"``."""

    k1: float = knob(1.5, "How slowly repeated words saturate; 0 counts presence alone.", low=0.0, high=100.0)
    b: float = knob(0.75, "How much long prompts are held back.", low=0.0, high=1.0)
    terms: str = knob(
        "words",
        "Words of the text, or token ids: for languages without spaces.",
        choices=("words", "tokens"),
        paper="words",
    )
    group_column: str | None = knob(None, "Column of the target that names each row's group.")


class Bm25:
    """Ranks by shared rare words."""

    def __init__(self, config: Bm25Config) -> None:
        self.config = config

    def select(self, context: SelectionContext) -> Picks:
        """Score every valid row in one pass over the text."""
        pool, target, config = context.pool, context.reference, self.config
        config.limit(pool)  # refuses an impossible size before anything is read
        if target is None or not (target.loss_lengths > 0).any():
            raise DataError("selection='bm25' needs target rows; pass target= (eval_dataset in a trainer).")
        if config.group_column is not None and target.groups is None:
            raise DataError(f"group_column={config.group_column!r} was given and the target has no groups.")
        in_words = config.terms == "words" and all(has_text(each, context.tokenizer) for each in (pool, target))
        terms = _reader(context.tokenizer, in_words=in_words)
        queries = _queries(target, terms)
        valid = np.flatnonzero(pool.loss_lengths > 0)
        mean, best = bm25(_documents(context, valid, terms), list(queries.values()), k1=config.k1, b=config.b)
        scores, closest = np.full(len(pool), np.nan), np.zeros(len(pool), dtype=np.int64)
        scores[valid], closest[valid] = mean, best
        positions = config.take(rank(scores, descending=True, ties=pool.row_hash), pool)
        names = list(queries)
        return Picks(
            positions=positions,
            scores=scores,
            reasons=[f"bm25 {scores[row]:.4g}, closest to {names[closest[row]]}" for row in positions.tolist()],
            notes={
                "groups": names,
                "terms": "words" if in_words else "token ids",
                "rows_without_a_match": int(np.count_nonzero(scores == 0)),
            },
        )


_Reader = Callable[[Pool, int], Sequence[Hashable]]


def _reader(tokenizer: object, *, in_words: bool) -> _Reader:
    """Terms of a row's prompt, or of the whole row where it has none."""

    def read(pool: Pool, place: int) -> Sequence[Hashable]:
        text = joined(turns_at(pool, place, tokenizer)) if in_words else id_text(pool.rows[place])
        found = words(text.prompt) if in_words else text.prompt.split()
        return found or (words(text.answer) if in_words else text.answer.split())

    return read


def _documents(context: SelectionContext, valid: np.ndarray, terms: _Reader) -> Iterator[Sequence[Hashable]]:
    for place in reading(context, valid.tolist(), "BM25"):
        yield terms(context.pool, place)


def _queries(target: Pool, terms: _Reader) -> dict[str, Mapping[Hashable, float]]:
    """Weight of each term in each group, by name: its count, as a mean over the group's rows."""
    counts: dict[str, Counter[Hashable]] = defaultdict(Counter)
    rows: Counter[str] = Counter()
    for place in np.flatnonzero(target.loss_lengths > 0).tolist():
        name = "the target" if target.groups is None else target.groups[place]
        counts[name].update(terms(target, place))
        rows[name] += 1
    return {
        name: {term: count / rows[name] for term, count in sorted(counts[name].items(), key=lambda item: str(item[0]))}
        for name in sorted(counts)
    }


def cost(config: Bm25Config, facts: Facts) -> Cost:  # noqa: ARG001 - the signature every method shares
    """No model is run."""
    return Cost()


SPEC = MethodSpec(
    name="bm25",
    kind="selection",
    slot="pool",
    summary="Keep the rows whose prompts share the target's rare words.",
    config=Bm25Config,
    build=Bm25,
    cost=cost,
    paper=Paper(title="Compute-Constrained Data Selection", year=2025, arxiv="2410.16208"),
    traits=Traits(needs_reference_set=True),
    tiny={"fraction": 0.25},
)
