"""facility_location: Choose rows that stand for the pool: every row has a similar one among them.

Idea
    Embed every row (mean of the model's last hidden states, length one) and choose greedily

        argmax over S of  sum over rows n of  w[n] * max over j in S of s[n, j],      s >= 0

    which reaches at least 1 - 1/e of the best value. s is max(0, cosine), or max D^2 - D^2
    (``similarity="euclidean"``). Above 20,000 rows only the 64 nearest neighbours of each row count,
    found by an inverted file. With ``quality_weight`` the scores of an earlier stage of a pipeline
    say which rows it matters to stand for: w = 1 - q + q * (share of rows that score no higher).

Cost      N pool rows, T mean tokens, P parameters without the head, h width
    flops  2*P*T*N + 2*h*N^2      (forward without the head; all pairs), up to 20,000 rows
           2*P*T*N + ~36*h*N^1.5  (neighbours in sqrt(N) cells), above
    disk   4*h*N bytes            (embeddings, to resume)
    peak   4*N^2 bytes            up to 20,000 rows; above, 4*h*N + ~40*N*neighbours bytes

Use when
    A small part should stand for a large pool with many near-copies; after a filter by quality, as
    the second stage of a pipeline.

Avoid when
    Most of the pool is off the task: what stands for the pool then is off the task as well.

Differs
    Superfiltering's diversity step embeds with a sentence encoder and compares by max D^2 - D^2, all
    pairs; bring such vectors in a column, with ``similarity="euclidean"``, for the same.

Paper
    Superfiltering: Weak-to-Strong Data Filtering for Fast Instruction-Tuning (2024), arXiv:2402.00530
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.selection import Picks, SelectionContext
from hf_eff.contracts.spec import MethodSpec, Paper, Traits, knob
from hf_eff.engines.embeddings import POOLINGS, embedding_flops, embeddings, rows_by_content
from hf_eff.engines.greedy_take import take_greedily
from hf_eff.engines.pool_size import SizedConfig
from hf_eff.errors import DataError, ScoringStoppedError
from hf_eff.numerics.facility_location import (
    SIMILARITIES,
    DenseSimilarity,
    Similarity,
    SparseSimilarity,
    facility_location,
)
from hf_eff.numerics.nearest import EXACT_BELOW, nearest_neighbours, neighbour_flops


@dataclass(frozen=True, kw_only=True)
class FacilityLocationConfig(SizedConfig):
    """Options of ``selection="facility_location"``."""

    similarity: str = knob("cosine", "max(0, cosine), or max D^2 - D^2.", choices=SIMILARITIES, paper="euclidean")
    neighbours: int = knob(64, "Similar rows that count for a row, in pools above 20,000 rows.", low=1, unit="rows")
    pooling: str = knob("mean", "How hidden states become one vector.", choices=POOLINGS)
    embedding_column: str | None = knob(None, "Column with a vector a row, used instead of the model.")
    quality_weight: float = knob(
        0.0, "How much rows that an earlier stage scored high count more; 0: all alike.", low=0.0, high=1.0
    )


class FacilityLocation:
    """Greedy cover of the pool by its own rows."""

    def __init__(self, config: FacilityLocationConfig) -> None:
        self.config = config

    def select(self, context: SelectionContext) -> Picks:
        """Embed the pool, compare its rows and choose."""
        context = context.by_proxy()
        config = self.config
        config.limit(context.pool)  # refuses an impossible size before anything is computed
        if config.quality_weight and context.prior is None:
            raise DataError("quality_weight needs scores of an earlier stage of a pipeline; leave it 0 without one.")
        vectors = embeddings(context, context.pool, column=config.embedding_column, pooling=config.pooling)
        rows = rows_by_content(context.pool, vectors)
        weights = self._weights(context, rows)
        similarity = self._similarity(context, vectors[rows])
        positions, gains = take_greedily(
            context, config, rows, facility_location(similarity, weights), description="Facility location"
        )
        total = float(weights.sum())
        return Picks(
            positions=positions,
            reasons=[f"adds {gain:.4g} to what is covered" for gain in gains],
            notes={
                "num_embedded": len(rows),
                "pairs": "all" if len(rows) <= EXACT_BELOW else f"{config.neighbours} nearest",
                "mean_similarity": float(gains.sum()) / total if total else 0.0,
            },
        )

    def _similarity(self, context: SelectionContext, vectors: np.ndarray) -> Similarity:
        """All pairs, or those of nearest neighbours; paid for first."""

        def look() -> None:
            if context.stop_requested():
                raise ScoringStoppedError("Facility location: stopped on request while rows were compared.")

        look()
        context.spend(neighbour_flops(*vectors.shape), 0.0)
        if len(vectors) <= EXACT_BELOW:
            return DenseSimilarity.of(vectors, self.config.similarity)
        # A seed of its own: the choice does not depend on the run's.
        generator = torch.Generator().manual_seed(0)
        near = nearest_neighbours(vectors, self.config.neighbours, generator=generator, between=look)
        return SparseSimilarity.of(*near, self.config.similarity)

    def _weights(self, context: SelectionContext, rows: np.ndarray) -> np.ndarray:
        """[M] How much each row counts; rows without a score count least."""
        share = self.config.quality_weight
        if context.prior is None or not share:
            return np.ones(len(rows))
        prior = np.asarray(context.prior, dtype=np.float64)[rows]
        known = np.sort(prior[np.isfinite(prior)])
        below = np.searchsorted(known, prior, side="right") / max(1, len(known))
        return 1.0 - share + share * np.where(np.isfinite(prior), below, 0.0)


def cost(config: FacilityLocationConfig, facts: Facts) -> Cost:
    """Closed form of the module's head; padding inside batches of similar length is neglected."""
    rows, width = facts.pool.num_rows or 0, facts.model.hidden_size
    compared = neighbour_flops(rows, width)
    if config.embedding_column is not None:
        return Cost(flops=compared)
    return Cost(
        flops=compared + embedding_flops(facts.model, rows, facts.pool.mean_tokens),
        tokens=rows * facts.pool.mean_tokens,
        disk_bytes=rows * (4.0 * width + 5),
    )


SPEC = MethodSpec(
    name="facility_location",
    kind="selection",
    slot="pool",
    summary="Choose rows that stand for the pool: every row has a similar one among them.",
    config=FacilityLocationConfig,
    build=FacilityLocation,
    cost=cost,
    paper=Paper(
        title="Superfiltering: Weak-to-Strong Data Filtering for Fast Instruction-Tuning",
        year=2024,
        arxiv="2402.00530",
    ),
    traits=Traits(needs_model=True, uses_proxy=True),
    tiny={"fraction": 0.25},
)
