"""Which rows of a pool are sound: a fixed sequence of rules, and the first one that a row fails."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from hf_eff.contracts.selection import Pool, SelectionContext
from hf_eff.contracts.spec import knob
from hf_eff.engines.pool_size import SizedConfig
from hf_eff.engines.row_text import RowText, has_text, id_text, joined, reading, turns_at
from hf_eff.errors import DataError, OptionError, ScoringStoppedError
from hf_eff.numerics import text_quality
from hf_eff.numerics.near_duplicates import MinHash, greedy_duplicates, jaccard, shingles

REASONS = (
    "no loss",
    "empty",
    "length",
    "refusal",
    "boilerplate",
    "charset",
    "language",
    "repetition",
    "score",
    "exact duplicate",
    "near duplicate",
)
"""Why a row may be dropped, in the order in which the rules are asked."""
_CACHED = 4096


@dataclass(frozen=True, kw_only=True)
class QualityConfig(SizedConfig):
    """Options of a method that drops unsound rows before it chooses.

    Raises:
        OptionError: Options contradict each other, or a pattern or script does not exist.
    """

    default_fraction: ClassVar[float] = 1.0

    fraction: float | None = knob(None, "Share to keep of the rows that pass every rule.", low=0.0, high=1.0)
    min_answer_tokens: int = knob(1, "Fewest tokens that carry loss.", low=1, unit="tokens")
    max_answer_tokens: int | None = knob(None, "Most tokens that carry loss; None: any number.", low=1, unit="tokens")
    max_tokens: int | None = knob(None, "Most tokens of the whole row; None: any number.", low=1, unit="tokens")
    refusals: bool = knob(True, "Drop answers that begin by declining.")
    boilerplate: bool = knob(True, "Drop answers in which a machine speaks about itself.")
    patterns: tuple[str, ...] = knob((), "Regular expressions that drop an answer they are found in.")
    max_symbols: float = knob(0.6, "Largest share of symbols among visible characters.", low=0.0, high=1.0)
    max_broken: float = knob(0.05, "Largest share of broken characters, such as U+FFFD.", low=0.0, high=1.0)
    scripts: tuple[str, ...] = knob((), "Scripts to keep, such as latin or cjk; none: all.")
    min_script_share: float = knob(0.8, "Smallest share of letters in those scripts.", low=0.0, high=1.0)
    language_column: str | None = knob(None, "Column that names each row's language.")
    languages: tuple[str, ...] = knob((), "Values of language_column to keep; none: all.")
    max_repeated_ngrams: float = knob(0.5, "Largest share of word 4-grams that repeat.", low=0.0, high=1.0)
    max_repeated_lines: float = knob(0.5, "Largest share of lines that repeat.", low=0.0, high=1.0)
    score_column: str | None = knob(None, "Column with a grade of each row; rows without one are dropped.")
    min_score: float | None = knob(None, "Smallest grade to keep.", low=-1e30, high=1e30)
    near_duplicates: float | None = knob(
        0.8, "Similarity (Jaccard, character 5-grams) from which rows count as the same; None: off.", low=0.05, high=1.0
    )

    def __post_init__(self) -> None:
        """Check what the bounds of single options cannot."""
        super().__post_init__()
        name = type(self).__name__
        if self.languages and self.language_column is None:
            raise OptionError(f"{name}.languages={list(self.languages)} needs language_column=, the column to look in.")
        if self.min_score is not None and self.score_column is None:
            raise OptionError(f"{name}.min_score={self.min_score} needs score_column=, the column with the grades.")
        unknown = sorted(set(self.scripts) - set(text_quality.SCRIPTS))
        if unknown:
            raise OptionError(f"{name}.scripts has {unknown}; allowed are {list(text_quality.SCRIPTS)}.")
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise OptionError(
                    f"{name}.patterns has {pattern!r}, which is no regular expression ({error}); correct it."
                ) from None

    def accepts(self, grade: float) -> bool:
        """Whether a grade exists and is high enough."""
        return math.isfinite(grade) and (self.min_score is None or grade >= self.min_score)

    def take_sound(self, ranked: np.ndarray, pool: Pool, verdict: Verdict) -> np.ndarray:
        """The longest beginning of a ranking of sound rows that stays within the size.

        Args:
            ranked: Positions in ``pool`` of all rows of ``verdict.sound``, in order of preference.
            pool: The pool that was judged.
            verdict: What the rules said.

        Raises:
            DataError: More rows were asked for than are sound.
        """
        if self.num_examples is not None and self.num_examples > len(ranked):
            raise DataError(
                f"num_examples={self.num_examples} is more than the {len(ranked)} rows that pass the quality rules "
                f"(of {len(pool)}); ask for fewer, or loosen the rules."
            )
        sound = pool.take(verdict.sound)
        return verdict.sound[self.take(np.searchsorted(verdict.sound, ranked), sound)]


@dataclass(frozen=True)
class Verdict:
    """What the rules say about a pool.

    Attributes:
        sound: [M] positions of the rows that pass, in pool order.
        failed: [N] place in ``REASONS`` of the first rule that a row fails; -1 where it passes.
        grades: [N] float64 values of ``score_column``, NaN where missing; None without the column.
        reads_text: False where token ids stood in for text.
    """

    sound: np.ndarray
    failed: np.ndarray
    grades: np.ndarray | None
    reads_text: bool

    def counts(self, chosen: int) -> dict[str, Any]:
        """Numbers for a report; dropped rows by reason and the chosen ones add up to the pool."""
        found = Counter(self.failed.tolist())
        dropped = {reason: found[place] for place, reason in enumerate(REASONS)}
        dropped["size"] = len(self.sound) - chosen  # sound, and more than was asked for
        read = "text" if self.reads_text else "token ids"
        return {"rows": len(self.failed), "kept": chosen, "dropped": dropped, "read": read}


def judge(context: SelectionContext, config: QualityConfig) -> Verdict:
    """Ask every row every rule.

    Rules about single rows come first, so that of a group of duplicates a sound row survives if there
    is one. Of these the one with the best grade stays, then the one with the longest answer, then the
    one with the smallest content hash.

    Args:
        context: Pool, tokenizer, progress bar and stop. Without text or tokenizer, token ids are read
            as words.
        config: The rules.

    Raises:
        DataError: A column does not exist, or no row passes.
        ScoringStoppedError: A stop was requested.
    """
    pool = context.pool
    readable = has_text(pool, context.tokenizer)
    read = _reader(pool, context.tokenizer if readable else None, readable=readable)
    minhash = None if config.near_duplicates is None else MinHash(config.near_duplicates)
    size = len(pool)
    failed = np.where(np.asarray(pool.loss_lengths) > 0, -1, 0)
    digests: list[bytes] = [b""] * size
    answer_sizes, grades = np.zeros(size, dtype=np.int64), np.full(size, np.nan)
    keys = np.zeros((size, minhash.bands if minhash else 0), dtype=np.uint64)
    for place in reading(context, np.flatnonzero(failed < 0).tolist(), "Quality rules"):
        text, columns = read(place), _Columns(pool, place)
        grades[place] = columns.number(config.score_column)
        row = _Row(text, columns, int(pool.lengths[place]), int(pool.loss_lengths[place]), float(grades[place]))
        failed[place] = next((REASONS.index(name) for name, fails in _RULES.items() if fails(config, row)), -1)
        if failed[place] < 0:
            whole = _normal(text)
            digests[place] = hashlib.blake2b(whole.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            answer_sizes[place] = len(text.answer)
            if minhash is not None:
                keys[place] = minhash.band_keys(shingles(whole))
    ranking = _ranking(pool, np.flatnonzero(failed < 0), grades, answer_sizes)
    _mark_exact(failed, ranking, digests)
    if minhash is not None:
        _mark_near(context, failed, ranking[failed[ranking] < 0], keys, _comparison(read, config.near_duplicates))
    sound = np.flatnonzero(failed < 0)
    if not len(sound):
        rule, count = Counter(failed.tolist()).most_common(1)[0] if size else (0, 0)
        raise DataError(
            f"none of the {size} rows passes the quality rules: {count} of them fail {REASONS[rule]!r}; loosen that."
        )
    return Verdict(sound, failed, None if config.score_column is None else grades, readable)


@dataclass(frozen=True)
class _Columns:
    """The columns of one row as the user has them."""

    pool: Pool
    place: int

    def value(self, column: str) -> Any:
        if self.pool.examples is None:
            raise DataError(f"column {column!r} was asked for and the pool came without its columns; pass a dataset.")
        row: Mapping[str, Any] = self.pool.examples[self.place]
        if column not in row:
            raise DataError(f"the pool has no column {column!r}; its columns are {sorted(row)}.")
        return row[column]

    def number(self, column: str | None) -> float:
        """Value as a number; NaN for none."""
        value = None if column is None else self.value(column)
        if value is None:
            return float("nan")
        try:
            return float(value)
        except (TypeError, ValueError):
            raise DataError(f"column {column!r} must hold numbers, got {value!r} in one row.") from None


@dataclass(frozen=True)
class _Row:
    text: RowText
    columns: _Columns
    tokens: int
    answer_tokens: int
    grade: float


def _wrong_length(config: QualityConfig, row: _Row) -> bool:
    too_long = config.max_answer_tokens is not None and row.answer_tokens > config.max_answer_tokens
    too_long |= config.max_tokens is not None and row.tokens > config.max_tokens
    return too_long or row.answer_tokens < config.min_answer_tokens


def _is_stock(config: QualityConfig, row: _Row) -> bool:
    answer = row.text.answer
    return (config.boilerplate and text_quality.is_boilerplate(answer)) or any(
        re.search(pattern, answer) for pattern in config.patterns
    )


def _wrong_characters(config: QualityConfig, row: _Row) -> bool:
    whole = row.text.whole
    return text_quality.symbol_share(whole) > config.max_symbols or text_quality.broken_share(whole) > config.max_broken


def _wrong_language(config: QualityConfig, row: _Row) -> bool:
    if config.scripts and text_quality.script_share(row.text.whole, config.scripts) < config.min_script_share:
        return True
    return bool(config.languages) and str(row.columns.value(str(config.language_column))) not in config.languages


def _repeats(config: QualityConfig, row: _Row) -> bool:
    answer = row.text.answer
    return (
        text_quality.repeated_ngrams(answer) > config.max_repeated_ngrams
        or text_quality.repeated_lines(answer) > config.max_repeated_lines
    )


_RULES: Mapping[str, Callable[[QualityConfig, _Row], bool]] = {
    "empty": lambda _, row: not row.text.answer.strip(),
    "length": _wrong_length,
    "refusal": lambda config, row: config.refusals and text_quality.is_refusal(row.text.answer),
    "boilerplate": _is_stock,
    "charset": _wrong_characters,
    "language": _wrong_language,
    "repetition": _repeats,
    "score": lambda config, row: config.score_column is not None and not config.accepts(row.grade),
}


def _reader(pool: Pool, tokenizer: Any, *, readable: bool) -> Callable[[int], RowText]:
    if readable:
        return lambda place: joined(turns_at(pool, place, tokenizer))
    return lambda place: id_text(pool.rows[place])


def _normal(text: RowText) -> str:
    return f"{text_quality.normalised(text.prompt)}\n{text_quality.normalised(text.answer)}"


def _ranking(pool: Pool, places: np.ndarray, grades: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Rows in the order in which they claim a place among their duplicates."""
    ties = np.arange(len(pool)) if pool.row_hash is None else np.asarray(pool.row_hash)
    graded = np.nan_to_num(grades[places], nan=0.0)  # all or none of the rows that got here have a grade
    return places[np.lexsort((ties[places], -sizes[places], -graded))]


def _mark_exact(failed: np.ndarray, ranking: np.ndarray, digests: list[bytes]) -> None:
    seen: set[bytes] = set()
    for place in ranking.tolist():
        if digests[place] in seen:
            failed[place] = REASONS.index("exact duplicate")
        seen.add(digests[place])


def _comparison(read: Callable[[int], RowText], threshold: float | None) -> Callable[[int, int], bool]:
    """Exact comparison of two rows, which are read again: keeping every text would take as much room as the pool."""

    @lru_cache(maxsize=_CACHED)
    def grams(place: int) -> np.ndarray:
        return shingles(_normal(read(place)))

    return lambda first, second: jaccard(grams(first), grams(second)) >= (threshold or 1.0)


def _mark_near(
    context: SelectionContext,
    failed: np.ndarray,
    ranking: np.ndarray,
    keys: np.ndarray,
    similar: Callable[[int, int], bool],
) -> None:
    def watched(first: int, second: int) -> bool:
        if context.stop_requested():
            raise ScoringStoppedError("Near duplicates: stopped on request before all rows were compared.")
        return similar(first, second)

    twins = greedy_duplicates(ranking, keys, watched)
    failed[twins >= 0] = REASONS.index("near duplicate")
