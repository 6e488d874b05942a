"""embedding: Keep the rows whose embedding is close to the target's on average.

Idea
    Embed pool and target (mean of the model's last hidden states), subtract the pool's mean, scale to
    length one, and rank by

        score[n] = max over groups g of  mean over target rows v in g of  cos(x[n], x[v])

    ``group_reduce="mean"`` averages over groups instead. Vectors of any encoder can be brought along
    in a column of pool and target.

Cost      N pool rows, V target rows, G groups, T mean tokens, P parameters without the head, h width
    flops  2*P*T*(N + V) + 2*h*N*G    (forward without the head; similarities)
    disk   4*h*(N + V) bytes          (embeddings, to resume)

Use when
    A few rows stand for the task and the pool is mixed by topic: one forward is the whole price.

Avoid when
    Pool and task share the topic and differ in something finer, such as the kind of reasoning; or the
    target is so varied that its average stands for nothing: rds gives each target row its turn.

Differs
    The paper embeds with a sentence encoder (GTR-T5-base); here it is the model as given, or a column.
    Hidden states of language models share a large common part, so the pool's mean is subtracted.

Paper
    Compute-Constrained Data Selection (2025), arXiv:2410.16208
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.selection import Picks, SelectionContext
from hf_eff.contracts.spec import MethodSpec, Paper, Traits, knob
from hf_eff.engines.embeddings import (
    POOLINGS,
    centred,
    embedding_flops,
    embeddings,
    mean_vector,
    members_of,
    rows_by_content,
    target_of,
)
from hf_eff.engines.pool_size import SizedConfig
from hf_eff.numerics.ranking import rank


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig(SizedConfig):
    """Options of ``selection="embedding"``."""

    group_reduce: str = knob("max", "How groups make one score.", choices=("max", "mean"), paper="mean")
    pooling: str = knob("mean", "How hidden states become one vector.", choices=POOLINGS)
    center: bool = knob(True, "Subtract the pool's mean from every vector.")
    embedding_column: str | None = knob(None, "Column with a vector a row in pool and target, instead of the model.")


class Embedding:
    """Ranks by mean cosine to the target."""

    def __init__(self, config: EmbeddingConfig) -> None:
        self.config = config

    def select(self, context: SelectionContext) -> Picks:
        """Embed, compare, rank and take."""
        context = context.by_proxy()
        config, pool, target = self.config, context.pool, target_of(context, "embedding")
        config.limit(pool)  # refuses an impossible size before anything is computed
        column, pooling = config.embedding_column, config.pooling
        goals = embeddings(context, target, column=column, pooling=pooling, description="Embeddings of the target")
        vectors = embeddings(context, pool, column=column, pooling=pooling)
        usable = rows_by_content(target, goals)
        rows = rows_by_content(pool, vectors)
        goals, vectors = goals[usable], vectors[rows]
        if config.center:
            mean = mean_vector(vectors)
            goals, vectors = centred(goals, mean), centred(vectors, mean)
        groups = members_of(target, usable)
        # A mean of cosines is the inner product with the mean of unit vectors.
        queries = np.stack([goals[members].mean(axis=0, dtype=np.float64) for members in groups.values()])
        context.spend(2.0 * vectors.size * len(groups), 0.0)
        by_group = (vectors @ queries.T.astype(np.float32)).astype(np.float64)
        scores, closest = np.full(len(pool), np.nan), np.zeros(len(pool), dtype=np.int64)
        scores[rows] = by_group.max(axis=1) if config.group_reduce == "max" else by_group.mean(axis=1)
        closest[rows] = by_group.argmax(axis=1)
        positions = config.take(rank(scores, descending=True, ties=pool.row_hash), pool)
        names = list(groups)
        return Picks(
            positions=positions,
            scores=scores,
            reasons=[f"cos {scores[row]:.3g} to {names[closest[row]]}" for row in positions],
            notes={"groups": names, "num_scored": len(rows), "width": vectors.shape[1], "centred": config.center},
        )


def cost(config: EmbeddingConfig, facts: Facts) -> Cost:
    """Closed form of the module's head for one group; padding inside batches of similar length is neglected."""
    pool, width = facts.pool, facts.model.hidden_size
    rows, goals = pool.num_rows or 0, pool.num_reference
    compared = 2.0 * width * rows
    if config.embedding_column is not None:
        return Cost(flops=compared)
    forward = embedding_flops(facts.model, rows, pool.mean_tokens)
    forward += embedding_flops(facts.model, goals, pool.mean_reference_tokens)
    tokens = rows * pool.mean_tokens + goals * pool.mean_reference_tokens
    return Cost(flops=forward + compared, tokens=tokens, disk_bytes=(4.0 * width + 5) * (rows + goals))


SPEC = MethodSpec(
    name="embedding",
    kind="selection",
    slot="pool",
    summary="Keep the rows whose embedding is close to the target's on average.",
    config=EmbeddingConfig,
    build=Embedding,
    cost=cost,
    paper=Paper(title="Compute-Constrained Data Selection", year=2025, arxiv="2410.16208"),
    traits=Traits(needs_model=True, uses_proxy=True, needs_reference_set=True),
    tiny={"fraction": 0.25},
)
