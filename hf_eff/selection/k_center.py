"""k_center: Spread the choice: each next row is the one farthest from all chosen so far.

Idea
    Embed every row (mean of the model's last hidden states, length one) and walk the pool
    farthest-first, beginning with the row nearest the mean:

        next = argmax over rows n of  min over chosen j of |x[n] - x[j]|

    Every row of the pool is then within twice the smallest radius that k centres can reach.

Cost      N pool rows, T mean tokens, P parameters without the head, h width, k rows kept
    flops  2*P*T*N + 2*h*N*k     (forward without the head; distances to each choice)
    disk   4*h*N bytes           (embeddings, to resume)
    peak   4*h*N bytes           above the loaded model

Use when
    The pool is clean and full of near-copies, and every corner of it should be seen.

Avoid when
    The pool is noisy: what is far from everything is often broken, and it comes first. Filter
    before, or use facility_location, which asks for rows that stand for others.

Differs
    The paper chooses in rounds, from the features of a classifier trained on what was labelled so
    far, and begins with the labelled rows; here there is one round, on the model as given, and the
    traversal is the plain greedy one, without the paper's integer programme that drops outliers.

Paper
    Active Learning for Convolutional Neural Networks: A Core-Set Approach (2018), arXiv:1708.00489
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.selection import Picks, SelectionContext
from hf_eff.contracts.spec import MethodSpec, Paper, Traits, knob
from hf_eff.engines.embeddings import POOLINGS, embedding_flops, embeddings, rows_by_content
from hf_eff.engines.greedy_take import planned_rows, take_greedily
from hf_eff.engines.pool_size import SizedConfig
from hf_eff.numerics.k_center import farthest_first


@dataclass(frozen=True, kw_only=True)
class KCenterConfig(SizedConfig):
    """Options of ``selection="k_center"``."""

    pooling: str = knob("mean", "How hidden states become one vector.", choices=POOLINGS)
    embedding_column: str | None = knob(None, "Column with a vector a row, used instead of the model.")


class KCenter:
    """Farthest-first traversal of the pool's embeddings."""

    def __init__(self, config: KCenterConfig) -> None:
        self.config = config

    def select(self, context: SelectionContext) -> Picks:
        """Embed the pool and walk it."""
        context = context.by_proxy()
        config, pool = self.config, context.pool
        config.limit(pool)  # refuses an impossible size before anything is computed
        vectors = embeddings(context, pool, column=config.embedding_column, pooling=config.pooling)
        rows = rows_by_content(pool, vectors)
        positions, distances = take_greedily(
            context,
            config,
            rows,
            farthest_first(vectors[rows]),
            flops=2.0 * len(rows) * vectors.shape[1],
            description="Farthest-first",
        )
        reasons = [f"at distance {distance:.3g} from those before" for distance in distances]
        reasons[0] = "nearest the middle of the pool"
        return Picks(
            positions=positions,
            reasons=reasons,
            notes={"num_embedded": len(rows), "width": vectors.shape[1], "last_distance": float(distances[-1])},
        )


def cost(config: KCenterConfig, facts: Facts) -> Cost:
    """Closed form of the module's head; padding inside batches of similar length is neglected."""
    rows, tokens, width = facts.pool.num_rows or 0, facts.pool.mean_tokens, facts.model.hidden_size
    walk = 2.0 * width * rows * planned_rows(config, rows, tokens)
    if config.embedding_column is not None:
        return Cost(flops=walk)
    forward = embedding_flops(facts.model, rows, tokens)
    return Cost(flops=forward + walk, tokens=rows * tokens, disk_bytes=(4.0 * width + 5) * rows)


SPEC = MethodSpec(
    name="k_center",
    kind="selection",
    slot="pool",
    summary="Spread the choice: each next row is the one farthest from all chosen so far.",
    config=KCenterConfig,
    build=KCenter,
    cost=cost,
    paper=Paper(
        title="Active Learning for Convolutional Neural Networks: A Core-Set Approach", year=2018, arxiv="1708.00489"
    ),
    traits=Traits(needs_model=True, uses_proxy=True),
    tiny={"fraction": 0.25},
)
