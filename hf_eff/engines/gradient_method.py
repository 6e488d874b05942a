"""What methods that compare the gradients of a pool with those of a target share: options, trace, cost, ranking."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, cast

import torch

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.memory import BatchShape
from hf_eff.contracts.selection import Picks, Pool, SelectionContext
from hf_eff.contracts.spec import knob
from hf_eff.engines.adapter import LoraShape
from hf_eff.engines.gradient_features import PROJECTIONS
from hf_eff.engines.gradient_trace import GradientTrace, TraceSettings, trace_gradients, with_hashes
from hf_eff.engines.influence import Influence
from hf_eff.engines.pool_size import SizedConfig
from hf_eff.engines.warmup import WarmupSettings
from hf_eff.errors import DataError
from hf_eff.numerics.adam_direction import ADAM_VARIANTS, AdamScaling
from hf_eff.numerics.example_loss import REDUCTIONS, Reduction
from hf_eff.numerics.flops import forward_flops
from hf_eff.numerics.ranking import rank

# N pool rows, V target rows, E checkpoints, A adapter parameters, D numbers of a feature

_SMALL = 1e9
"""Parameters up to which 4,096 dims are the default."""
TINY_WARMUP: Mapping[str, Any] = {
    "lora_r": 4,
    "warmup_fraction": 0.25,
    "warmup_epochs": 2,
    "warmup_batch_size": 4,
    "learning_rate": 1e-2,
}
"""A warm-up that suits a toy model."""
TINY_TRACE: Mapping[str, Any] = {"dims": 256, **TINY_WARMUP}
"""A trace that suits a toy model."""
_NORM_AND_FLAG = 5
"""Bytes of a stored row beside its feature."""
_VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {"adam_variant": "paper", "include_momentum": True, "val_agg": "cos_of_mean"},
    "official": {"adam_variant": "official", "include_momentum": True, "val_agg": "mean_cos"},
    "fixed": {"adam_variant": "damped", "include_momentum": False, "val_agg": "mean_cos"},
}


@dataclass(frozen=True, kw_only=True)
class WarmupConfig(SizedConfig):
    """Options of a method that trains a small adapter first and then takes gradients of single examples."""

    reduction: str = knob("mean", "An example's loss per token, in all, or between.", choices=REDUCTIONS)
    warmup_fraction: float = knob(0.05, "Share of the pool to warm up on; 0: none.", low=0.0, high=1.0, paper="0.05")
    warmup_epochs: int = knob(4, "Epochs of warm-up, each a checkpoint.", low=0, unit="epochs", paper="4")
    warmup_batch_size: int = knob(16, "Rows of a warm-up step.", low=1, unit="rows", paper="128")
    learning_rate: float | None = knob(2e-5, "Peak rate of the warm-up; None: the run's.", low=0.0, paper="2e-5")
    lora_r: int = knob(8, "Rank of the adapter; a model's own adapter keeps its rank.", low=1, paper="128")
    lora_alpha: int = knob(32, "Scale of the adapter: alpha / r.", low=1, paper="512")
    lora_dropout: float = knob(0.1, "Dropout of the adapter, in the warm-up only.", low=0.0, high=0.99, paper="0.1")
    target_modules: tuple[str, ...] | None = knob(
        None, "Modules to adapt; None: attention projections.", paper="q, k, v, o"
    )
    dtype: str = knob(
        "auto", "Type of the forward: that of the weights, or autocast.", choices=("auto", "bfloat16"), paper="bfloat16"
    )
    gradient_tokens: int = knob(
        2048,
        "Tokens, padding included, of a batch with gradients; never above the scoring batch.",
        low=1,
        unit="tokens",
    )

    @property
    def num_checkpoints(self) -> int:
        """E; without a warm-up the adapter as it is makes one."""
        return self.warmup_epochs if self.warmup_epochs and self.warmup_fraction else 1

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """Autocast type, or None."""
        return torch.bfloat16 if self.dtype == "bfloat16" else None

    @property
    def lora_shape(self) -> LoraShape:
        """A fresh adapter."""
        return LoraShape(self.lora_r, self.lora_alpha, self.target_modules)

    def warmup_settings(self, context: SelectionContext, seed: int) -> WarmupSettings:
        """How the adapter is trained."""
        return WarmupSettings(
            epochs=self.warmup_epochs,
            batch_size=self.warmup_batch_size,
            learning_rate=context.learning_rate if self.learning_rate is None else self.learning_rate,
            dropout=self.lora_dropout,
            seed=seed,
            compute_dtype=self.compute_dtype,
        )

    def warmup_rows(self, rows: int) -> int:
        """Rows that pass through the warm-up, all epochs together, of a pool of ``rows``."""
        if not (rows and self.warmup_epochs and self.warmup_fraction):
            return 0
        return self.warmup_epochs * max(1, round(self.warmup_fraction * rows))


@dataclass(frozen=True, kw_only=True)
class GradientConfig(WarmupConfig):
    """Options of a method that traces gradients along a short warm-up."""

    default_fraction: ClassVar[float] = 0.05
    by_variant: ClassVar[tuple[str, ...]] = ("adam_variant", "include_momentum")

    variant: str = knob("fixed", "Whose formulas: see the card of less.", choices=tuple(_VARIANTS))
    adam_variant: str | None = knob(None, "Scaling of pool gradients; None: by variant.", choices=ADAM_VARIANTS)
    include_momentum: bool | None = knob(None, "Add Adam's running mean to each gradient; None: by variant.")
    similarity: str = knob("cosine", "Compare directions, or also lengths.", choices=("cosine", "dot"), paper="cosine")
    dims: int | None = knob(
        None, "Width of the projection; None: 4096 up to 1e9 parameters, else 8192.", low=1, paper="8192"
    )
    projection: str = knob(
        "sparse", "Dense signs, one sign a row, or each matrix from both sides.", choices=PROJECTIONS, paper="dense"
    )
    proj_seed: int = knob(0, "Names the projection.", low=0)

    @property
    def resolved(self) -> dict[str, Any]:
        """The options that the variant decides unless they are given."""
        given = {name: getattr(self, name) for name in self.by_variant}
        return {name: _VARIANTS[self.variant][name] if given[name] is None else given[name] for name in self.by_variant}

    def width(self, model_params: int) -> int:
        """Dims asked for, for a model of that size."""
        return self.dims or (4096 if model_params <= _SMALL else 8192)

    def trace_settings(self, context: SelectionContext, storage: Mapping[str, str]) -> TraceSettings:
        """How the trace is made; ``storage`` holds further fields of the settings."""
        return TraceSettings(
            shape=self.lora_shape,
            warmup=self.warmup_settings(context, context.seed),
            warmup_fraction=self.warmup_fraction,
            scaling=AdamScaling(self.resolved["adam_variant"], self.resolved["include_momentum"]),
            dims=self.width(sum(parameter.numel() for parameter in context.model.parameters())),
            projection=self.projection,
            proj_seed=self.proj_seed,
            reduction=cast("Reduction", self.reduction),
            gradient_tokens=self.gradient_tokens,
            **storage,
        )


@dataclass(frozen=True, kw_only=True)
class GroupedGradientConfig(GradientConfig):
    """Options of a method that scores a row by its agreement with groups of target rows."""

    by_variant: ClassVar[tuple[str, ...]] = (*GradientConfig.by_variant, "val_agg")

    val_agg: str | None = knob(
        None, "Average cosines, or target gradients; None: by variant.", choices=("mean_cos", "cos_of_mean")
    )
    group_reduce: str = knob("max", "How groups make one score.", choices=("max", "mean"), paper="max")
    group_column: str | None = knob(None, "Column of the target that names each row's group.")


class Traced(NamedTuple):
    """A trace, and the rows it was made of.

    Attributes:
        pool: Candidates, with content hashes.
        target: Target rows, with content hashes.
        trace: Their gradients.
        notes: What was done, JSON-able.
    """

    pool: Pool
    target: Pool
    trace: GradientTrace
    notes: dict[str, Any]


def trace_pool(context: SelectionContext, config: GradientConfig, name: str, **storage: str) -> Traced:
    """Check size and target, and trace the gradients of both.

    Args:
        context: The selection.
        config: Options.
        name: Of the method, for messages.
        **storage: ``store_dtype``, ``target_dtype`` and ``checkpoint_weights`` of ``TraceSettings``.

    Raises:
        BudgetExceededError: The next batch would pass a limit; it was not computed.
        DataError: There is no target or no valid row, or the size is impossible.
        ManifestError: ``context.store_dir`` holds features of other rows, options or another model.
        ScoringStoppedError: A stop was requested.
    """
    context = context.by_proxy()
    if context.reference is None or not (context.reference.loss_lengths > 0).any():
        raise DataError(
            f"selection={name!r} needs target rows with tokens that carry loss; "
            "pass target= (eval_dataset in a trainer)."
        )
    target, pool = with_hashes(context.reference), with_hashes(context.pool)
    config.limit(pool)  # refuses an impossible size before anything is computed
    column = getattr(config, "group_column", None)
    if column is not None and target.groups is None:
        raise DataError(
            f"group_column={column!r} was given and the target has no groups; "
            "in a trainer, pass eval_dataset as a dict with one set a group."
        )
    trace = trace_gradients(replace(context, pool=pool), target, config.trace_settings(context, storage))
    notes = {"variant": config.variant, **config.resolved, "checkpoint_weights": list(trace.weights)}
    return Traced(pool, target, trace, {**notes, **trace.facts})


def picks_by_group(traced: Traced, config: GroupedGradientConfig) -> Picks:
    """Rank the pool by its agreement with the target's groups, and take the best.

    Raises:
        DataError: No gradient of the pool or of the target is finite.
    """
    pool, trace = traced.pool, traced.trace
    members: Sequence[str] = traced.target.groups or ["the target"] * len(traced.target)
    influence = Influence(config.similarity, config.resolved["val_agg"], config.group_reduce)
    queries = [influence.queries(target, members) for target in trace.targets]
    groups = sorted(set.intersection(*map(set, queries)))
    stacked = [torch.stack([query[group] for group in groups]) for query in queries]
    scores, closest = influence.scores(trace.pools, stacked, trace.weights)
    order = rank(scores, descending=True, ties=pool.row_hash)
    if not len(order):
        raise DataError("no row of the pool has a finite gradient; check the model's weights and dtype.")
    positions = config.take(order, pool)
    word = "cos" if config.similarity == "cosine" else "influence"
    return Picks(
        positions=positions,
        scores=scores,
        reasons=[f"{word} {scores[row]:.3g} to {groups[closest[row]]}" for row in positions],
        notes={**traced.notes, "groups": groups, "num_scored": len(order)},
    )


def trace_cost(config: GradientConfig, facts: Facts, *, bits: float, target_bits: float = 32.0) -> Cost:
    """Forecast of a trace, with the adapter's size estimated from the widths of attention.

    Args:
        config: Options.
        facts: Model and pool.
        bits: Stored bits of a number of a pool row's feature.
        target_bits: The same of a target row's.
    """
    pool, passes = facts.pool, config.num_checkpoints
    rows, length = pool.num_rows or 0, max(1, math.ceil(pool.mean_tokens))
    adapter = adapter_size(facts, config.lora_r)
    width = min(config.width(facts.model.params), max(1, adapter))
    warmup = config.warmup_rows(rows)
    featured = passes * (rows + pool.num_reference)
    row_flops = 2 * forward_flops(facts.model, BatchShape(1, length)) + 6.0 * adapter * length
    per_entry = {"rademacher": 2.0 * width, "sparse": 2.0, "two_sided": 2.0 * max(1.0, width / config.lora_r)}
    projected = per_entry[config.projection] * adapter if width < adapter else 0.0
    stored = rows * (math.ceil(width * bits / 8) + _NORM_AND_FLAG)
    stored += pool.num_reference * (math.ceil(width * target_bits / 8) + _NORM_AND_FLAG)
    return Cost(
        flops=(warmup + featured) * row_flops + featured * projected,
        tokens=(warmup + featured) * float(length),
        disk_bytes=passes * (float(stored) + 12.0 * adapter),
    )


def adapter_size(facts: Facts, lora_r: int) -> int:
    """Entries of a fresh adapter on attention, from above, or of the model's own."""
    model = facts.model
    if model.is_peft and model.trainable is not None:
        return model.trainable.params
    # Query and output projections are [h, W]; key and value are no larger.
    return sum(4 * lora_r * (model.hidden_size + block.attention_width) for block in model.blocks)
