"""difficulty: Keep a band of the pool by difficulty, or share the size over queries by how often they fail.

Idea
    Every row has a place u in [0, 1] in the distribution of a signal of difficulty: its loss, EL2N,
    entropy or negative margin under the model, its length, or a column, such as a pass rate. Rows
    with ``low`` <= u <= ``high`` are kept from the core of the band outwards:

        easy  u near 0        mid  u near 1/2        hard  u near 1

    With ``quota`` the size is shared over queries instead, each of which has several rows. For query q
    with fail rate f[q] = 1 - pass rate and n[q] rows, of which at least one is kept:

        prop2diff  min(n[q], max(1, c * f[q])), with c such that the sum is the size
        uniform    equally many of each query, by water-filling

Cost      N rows, T mean tokens, F forward FLOPs of a row
    flops  N*F for a signal of the model, 0 for length and columns
    disk   0

Use when
    The pool spans a range of difficulty and one end of it is useless, or it holds many answers to each
    of many questions, most of them to easy ones.

Avoid when
    Difficulty is noise: the hard end of a pool with wrong labels is made of them.

Differs
    DART draws new answers until each query has its number of right ones; a selection can only share out
    the answers that exist. Bands are static; nothing is reordered during training.

Paper
    DART-Math: Difficulty-Aware Rejection Tuning for Mathematical Problem-Solving (2024), arXiv:2407.13690
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.memory import BatchShape
from hf_eff.contracts.selection import Picks, Pool, SelectionContext
from hf_eff.contracts.spec import MethodSpec, Paper, Traits, knob
from hf_eff.engines.gradient_trace import with_hashes
from hf_eff.engines.pool_size import SizedConfig
from hf_eff.engines.signal_pass import pool_signals
from hf_eff.errors import DataError, OptionError
from hf_eff.numerics.flops import forward_flops
from hf_eff.numerics.keyed_random import content_order
from hf_eff.numerics.output_signals import SIGNALS
from hf_eff.numerics.ranking import rank
from hf_eff.numerics.water_filling import water_fill

# N rows, Q queries

_COLUMN = "column:"


@dataclass(frozen=True, kw_only=True)
class DifficultyConfig(SizedConfig):
    """Options of ``selection="difficulty"``.

    Raises:
        OptionError: The signal is unknown, the band is empty, or quotas lack a column of pass rates.
    """

    signal: str = knob("loss", "loss, el2n, entropy, margin, length, or column:<name>.")
    column_means: str = knob("ease", "What a high value of the column says.", choices=("ease", "difficulty"))
    band: str = knob("mid", "End of the distribution to keep, or its middle.", choices=("easy", "mid", "hard"))
    low: float = knob(0.0, "Lowest place in the distribution that is kept.", low=0.0, high=1.0)
    high: float = knob(1.0, "Highest place in the distribution that is kept.", low=0.0, high=1.0)
    quota: str = knob(
        "none", "Share the size over queries: by fail rate, or equally.", choices=("none", "prop2diff", "uniform")
    )
    query_column: str | None = knob(None, "Column that names each row's query, for quota.")

    def __post_init__(self) -> None:
        """Check what the bounds of single options cannot say."""
        super().__post_init__()
        known = (*SIGNALS, "length")
        if self.signal not in known and not (self.signal.startswith(_COLUMN) and self.column):
            raise OptionError(
                f"DifficultyConfig.signal must be one of {list(known)} or 'column:<name>', got {self.signal!r}."
            )
        if self.low >= self.high:
            raise OptionError(f"DifficultyConfig.low={self.low} must lie below high={self.high}.")
        if self.quota != "none" and (self.query_column is None or self.num_tokens is not None):
            raise OptionError(
                f"quota={self.quota!r} shares rows over queries; pass query_column= and a size in rows, not tokens."
            )
        if self.quota == "prop2diff" and (self.column is None or self.column_means != "ease"):
            raise OptionError(
                "quota='prop2diff' shares by fail rate; pass signal='column:<pass rates between 0 and 1>'."
            )

    @property
    def column(self) -> str | None:
        """Name of the column that is the signal, or None."""
        return self.signal[len(_COLUMN) :] or None if self.signal.startswith(_COLUMN) else None


class Difficulty:
    """Keeps a band of difficulty, or a number of rows a query."""

    def __init__(self, config: DifficultyConfig) -> None:
        self.config = config

    def select(self, context: SelectionContext) -> Picks:
        """Choose rows of ``context.pool``, the core of the band first.

        Raises:
            BudgetExceededError: The next batch would pass a limit; it was not computed.
            DataError: A column is missing or holds no numbers, pass rates lie outside 0 to 1, or no row has a signal.
        """
        pool = with_hashes(context.pool)
        limit = self.config.limit(pool)  # refuses an impossible size before anything is computed
        queries = None if self.config.quota == "none" else _column(pool, str(self.config.query_column))
        signal = self._signal(context, pool)
        signal[(pool.loss_lengths == 0) | ~np.isfinite(signal)] = np.nan
        ascending = rank(-signal if self._high_is_easy else signal, descending=False, ties=pool.row_hash)
        if not len(ascending):
            raise DataError(f"no row of the pool has a finite {self.config.signal}; check the model, or the column.")
        ranked, notes = self._in_band(ascending), dict[str, Any]()
        if queries is not None:
            ranked, notes = self._by_query(pool, ranked, signal, queries, limit)
        return Picks(
            positions=self.config.take(ranked, pool),
            scores=signal,
            reasons=f"{self.config.band} by {self.config.signal}" if queries is None else f"{self.config.quota} quota",
            higher_is_better=(self.config.band == "hard") != self._high_is_easy,
            notes={"signal": self.config.signal, "band": self.config.band, "in_band": len(ranked), **notes},
        )

    @property
    def _high_is_easy(self) -> bool:
        return self.config.signal == "margin" or (bool(self.config.column) and self.config.column_means == "ease")

    def _signal(self, context: SelectionContext, pool: Pool) -> np.ndarray:
        """[N] float64."""
        if self.config.column is not None:
            values = _column(pool, self.config.column)
            try:
                return np.asarray(values, dtype=np.float64)
            except (TypeError, ValueError):
                raise DataError(f"column {self.config.column!r} must hold one number a row.") from None
        if self.config.signal == "length":
            return np.asarray(pool.loss_lengths, dtype=np.float64).copy()
        found = pool_signals(context.by_proxy(), pool, [self.config.signal], description="Difficulty")
        return found[self.config.signal]

    def _in_band(self, ascending: np.ndarray) -> np.ndarray:
        """Rows from the core of the band outwards; row i of n has the place u = (i + 1/2) / n."""
        last = len(ascending) - 1
        core = {"easy": 0, "mid": last, "hard": 2 * last}[self.config.band]
        places = np.arange(len(ascending))
        u = (places + 0.5) / len(ascending)
        inside = places[(u >= self.config.low) & (u <= self.config.high)]
        return ascending[inside[np.lexsort((inside, np.abs(2 * inside - core)))]]

    def _by_query(
        self, pool: Pool, rows: np.ndarray, signal: np.ndarray, queries: list[Any], limit: int
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Rows by quota: of a query a random few, in an order that content alone decides."""
        hashes = pool.row_hash or ()
        rows = rows[content_order([hashes[int(row)] for row in rows])]
        names, members = np.unique([str(queries[int(row)]) for row in rows], return_inverse=True)
        sizes = np.bincount(members)
        if self.config.quota == "uniform":
            shares = water_fill(sizes, limit)
        else:
            if signal[rows].min() < 0 or signal[rows].max() > 1:
                raise DataError(f"column {self.config.column!r} must hold pass rates between 0 and 1.")
            shares = fail_quotas(1 - np.bincount(members, weights=signal[rows]) / sizes, sizes, limit)
        grouped = np.argsort(members, kind="stable")
        turns = np.empty(len(rows), dtype=np.int64)
        turns[grouped] = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        kept = rows[turns < shares[members]]
        return kept, {"num_queries": len(names), "queries_kept": int(np.count_nonzero(shares))}


def fail_quotas(fails: np.ndarray, sizes: np.ndarray, total: int) -> np.ndarray:
    """[Q] rows of each query: c times its fail rate, at least 1 and at most its size, rounded to the total.

    With fewer rows than queries the hardest queries have one each. What queries that never fail could add beyond one
    row is used last.

    >>> fail_quotas(np.array([0.8, 0.2, 0.0]), np.array([10, 10, 10]), 11).tolist()
    [8, 2, 1]
    """
    if total <= len(sizes):
        shares = np.zeros(len(sizes), dtype=np.int64)
        shares[np.argsort(-fails, kind="stable")[:total]] = 1
        return shares
    full = np.where(fails > 0, sizes, 1)
    if total >= full.sum():
        return full + water_fill(sizes - full, total - int(full.sum()))
    low, high = 0.0, float(sizes.max()) / float(fails[fails > 0].min())
    for _ in range(200):  # the sum grows with c; halving finds the c that gives the total
        middle = (low + high) / 2
        enough = np.clip(middle * fails, 1, full).sum() >= total
        low, high = (low, middle) if enough else (middle, high)
    exact = np.clip(high * fails, 1, full)
    shares = np.minimum(np.floor(exact + 1e-9).astype(np.int64), full)
    room = np.flatnonzero(shares < full)
    shares[room[np.argsort(-(exact - shares)[room], kind="stable")][: total - int(shares.sum())]] += 1
    return shares


def _column(pool: Pool, name: str) -> list[Any]:
    """[N] values of a column of the user's rows."""
    rows = pool.rows if pool.examples is None else pool.examples
    try:
        return [rows[row][name] for row in range(len(pool))]
    except KeyError:
        raise DataError(f"the pool has no column {name!r}; name one of its own columns.") from None


def cost(config: DifficultyConfig, facts: Facts) -> Cost:
    """One forward of the pool for a signal of the model; padding inside batches is neglected."""
    if config.column is not None or config.signal == "length":
        return Cost()
    rows, length = facts.pool.num_rows or 0, facts.pool.mean_tokens
    return Cost(flops=forward_flops(facts.model, BatchShape(rows, round(length))), tokens=rows * length)


SPEC = MethodSpec(
    name="difficulty",
    kind="selection",
    slot="pool",
    summary="Keep a band of the pool by difficulty, or share the size over queries by how often they fail.",
    config=DifficultyConfig,
    build=Difficulty,
    cost=cost,
    paper=Paper(
        title="DART-Math: Difficulty-Aware Rejection Tuning for Mathematical Problem-Solving",
        year=2024,
        arxiv="2407.13690",
    ),
    traits=Traits(needs_model=True, uses_proxy=True),
    tiny={"fraction": 0.5, "signal": "el2n"},
)
