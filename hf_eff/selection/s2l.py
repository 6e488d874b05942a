"""s2l: Cluster rows by how a small model learns them, and take evenly from every cluster.

Idea
    Train a small proxy on the whole pool and note each row's loss at E checkpoints. Rows whose losses
    move together have like gradients, so that a few stand for all:

        L[n] = (loss of row n at checkpoint 1, ..., at checkpoint E)
        per source: k-means of L with K clusters, by Euclidean distance
        the size is shared over sources, and each source's part over its clusters, by water-filling

    Inside a cluster rows are drawn at random; clusters of one or two rows come last.

Cost      N pool rows, T mean tokens, F_s forward FLOPs of the proxy, A adapter parameters, E checkpoints
    flops  epochs*N*(2*F_s + 6*A*T) + E*N*(F_s + 2*A*T)
    disk   9*E*N bytes and the proxy's checkpoints
    peak   one LoRA step of ``gradient_tokens`` tokens of the proxy

Use when
    A model of a tenth of the size or less shares the tokenizer, and the pool repeats itself.

Avoid when
    There is no proxy: three epochs over the pool with the model itself cost more than training on it.

Differs
    The paper tunes all weights of the proxy; here a LoRA on it is trained, or the adapter it has.
    Checkpoints are spread evenly over the whole training; the official script keeps the last ones
    only, where losses are flat. Rows without a finite loss are left out instead of counting as
    learnt. Draws depend on content and seed, not on the order of the rows.

Paper
    SmallToLarge (S2L): Scalable Data Selection for Fine-tuning Large Language Models by Summarizing
    Training Trajectories of Small Models (2024), arXiv:2403.07384
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.selection import Picks, Pool, SelectionContext
from hf_eff.contracts.spec import MethodSpec, Paper, Traits, knob
from hf_eff.engines.adapter import LoraShape
from hf_eff.engines.gradient_trace import with_hashes
from hf_eff.engines.pool_size import SizedConfig
from hf_eff.engines.signal_pass import SignalTrace, trace_signal
from hf_eff.engines.warmup import WarmupSettings
from hf_eff.errors import DataError
from hf_eff.numerics.trajectory_clusters import NORMALIZATIONS, order_by_trajectory


@dataclass(frozen=True, kw_only=True)
class S2lConfig(SizedConfig):
    """Options of ``selection="s2l"``."""

    checkpoints: int = knob(8, "Points of a trajectory, spread evenly over the training.", low=1)
    clusters: int = knob(100, "Clusters of a source; a source of fewer rows has fewer.", low=1, paper="100")
    iterations: int = knob(20, "Most rounds of k-means.", low=1, paper="20")
    normalize: str = knob(
        "none", "Compare losses as they are, without their mean, or also scaled.", choices=NORMALIZATIONS, paper="none"
    )
    source_column: str | None = knob("source", "Column with the name of a row's source; None: one source.")
    epochs: int = knob(3, "Epochs of training the proxy.", low=1, unit="epochs", paper="3")
    train_fraction: float = knob(1.0, "Share of the pool that the proxy is trained on.", low=0.0, high=1.0, paper="1")
    batch_size: int = knob(32, "Rows of a training step.", low=1, unit="rows", paper="32")
    learning_rate: float = knob(1e-4, "Peak rate of training the proxy's adapter.", low=0.0, paper="2e-5, all weights")
    lora_r: int = knob(16, "Rank of the adapter; a proxy's own adapter keeps its rank.", low=1)
    lora_alpha: int = knob(32, "Scale of the adapter: alpha / r.", low=1)
    target_modules: tuple[str, ...] | None = knob(None, "Modules to adapt; None: attention projections.")
    gradient_tokens: int = knob(2048, "Tokens, padding included, of a training batch.", low=1, unit="tokens")

    default_fraction: ClassVar[float] = 0.11

    def trace(self, seed: int) -> SignalTrace:
        """The proxy's training and where it is looked at."""
        warmup = WarmupSettings(
            epochs=self.epochs, batch_size=self.batch_size, learning_rate=self.learning_rate, dropout=0.0, seed=seed
        )
        return SignalTrace(
            shape=LoraShape(self.lora_r, self.lora_alpha, self.target_modules),
            warmup=warmup,
            train_fraction=self.train_fraction,
            checkpoints=self.checkpoints,
            gradient_tokens=self.gradient_tokens,
        )


class S2l:
    """Takes evenly from clusters of loss trajectories."""

    def __init__(self, config: S2lConfig) -> None:
        self.config = config

    def select(self, context: SelectionContext) -> Picks:
        """Choose rows of ``context.pool``, dealt out over sources and clusters.

        Raises:
            BudgetExceededError: The next batch would pass a limit; it was not computed.
            DataError: No row has a finite loss at every checkpoint.
            ManifestError: ``context.store_dir`` holds trajectories of other rows, options or another model.
        """
        pool = with_hashes(context.pool)
        self.config.limit(pool)  # refuses an impossible size before anything is computed
        proxy = replace(context.by_proxy(), pool=pool)
        trajectories, facts = trace_signal(proxy, self.config.trace(context.seed))
        usable = np.flatnonzero(np.isfinite(trajectories).all(axis=1))
        if not len(usable):
            raise DataError("the proxy gives no finite loss for any row of the pool; check its weights and dtype.")
        rows = usable[np.argsort(np.asarray(pool.row_hash)[usable], kind="stable")]
        sources = self._sources(pool, rows)
        order = order_by_trajectory(
            trajectories[rows],
            sources,
            context.generator,
            clusters=self.config.clusters,
            iterations=self.config.iterations,
            normalize=self.config.normalize,
        )
        positions = self.config.take(rows[order.positions], pool)
        scores = np.where(np.isfinite(trajectories).all(axis=1), trajectories.mean(axis=1, dtype=np.float64), np.nan)
        clusters = np.full(len(pool), -1, dtype=np.int64)
        clusters[rows] = order.clusters
        sizes = np.bincount(order.clusters)
        return Picks(
            positions=positions,
            scores=scores,
            reasons=[f"one of {sizes[clusters[row]]} rows learnt alike" for row in positions],
            notes={**facts, **self._about(pool, positions, sizes), "trained": "a proxy" if context.proxy else "model"},
        )

    def _sources(self, pool: Pool, rows: np.ndarray) -> np.ndarray | None:
        if self.config.source_column is None or pool.sources is None:
            return None
        return np.asarray(pool.sources)[rows]

    def _about(self, pool: Pool, positions: np.ndarray, sizes: np.ndarray) -> dict[str, Any]:
        """Clusters and sources of the choice, JSON-able."""
        about: dict[str, Any] = {"num_clusters": int(np.count_nonzero(sizes)), "normalize": self.config.normalize}
        if self.config.source_column is not None and pool.sources is not None:
            names, counts = np.unique(np.asarray(pool.sources)[positions], return_counts=True)
            about["rows_by_source"] = dict(zip(names.tolist(), counts.tolist(), strict=True))
        return about


def cost(config: S2lConfig, facts: Facts) -> Cost:
    """Training and one forward of the pool a checkpoint, priced as if the model itself were the proxy."""
    flops, tokens, disk = config.trace(0).cost(facts)
    return Cost(flops=flops, tokens=tokens, disk_bytes=disk)


SPEC = MethodSpec(
    name="s2l",
    kind="selection",
    slot="pool",
    summary="Cluster rows by how a small model learns them, and take evenly from every cluster.",
    config=S2lConfig,
    build=S2l,
    cost=cost,
    paper=Paper(
        title="SmallToLarge (S2L): Scalable Data Selection for Fine-tuning Large Language Models by Summarizing "
        "Training Trajectories of Small Models",
        year=2024,
        arxiv="2403.07384",
    ),
    traits=Traits(deterministic=False, needs_model=True, uses_proxy=True),
    tiny={
        "fraction": 0.5,
        "checkpoints": 3,
        "clusters": 3,
        "epochs": 2,
        "batch_size": 8,
        "lora_r": 2,
        "learning_rate": 1e-2,
    },
    requires={"peft": "peft"},
)
