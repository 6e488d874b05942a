"""LESS: keep the examples whose gradient points where the target's gradient points.

Idea
    Warm up a LoRA on a few rows. At each of E checkpoints take every example's LoRA gradient, scaled
    as Adam would scale it, project it to D dims and compare it with the gradients of the target:

        score[n] = max over groups s of the mean over r in s of sum_e w[e] cos(Gamma[e, n], g[e, r])

    with w[e] the learning rate of checkpoint e, normalised to sum 1.

Cost      N pool rows, V target rows, T mean tokens, F forward FLOPs of a row, A adapter parameters
    flops   E (N + V) (2 F + 6 A T + 2 A D) + the warm-up, E (2 F + 6 A T) for each of its rows
    disk    2 E N D bytes in half precision, and 12 E A for the checkpoints
    peak    a LoRA training step of 4,096 tokens, plus one factor's gradients of a batch

Use when   a small trusted target set exists and the pool is mixed.
Avoid when the pool is so large that E passes with gradients over it cost more than training on it.
Differs    per-example gradients are taken in batches, not one by one; groups are named, not equal
           contiguous blocks; ties are broken by content, so that the order of the rows plays no part;
           the warm-up keeps dropout of the base model off. ``variant`` says which formulas run:

    paper      Adam's step with bias correction and epsilon outside the root; target gradients are
               averaged within a group, then compared (sections 3 and 4.2 of the paper)
    official   as in the authors' code: no bias correction, epsilon inside the root; cosines with
               each target gradient are averaged within a group
    fixed      the paper's Adam scaling without the running mean, which adds one and the same
               direction to every row and most to rows of small gradient; cosines averaged within a
               group, so that one target row with a long gradient does not speak for its group

Paper      LESS: Selecting Influential Data for Targeted Instruction Tuning (2024), arXiv:2402.04333
Code       princeton-nlp/LESS
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import numpy as np
import torch

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.memory import BatchShape
from hf_eff.contracts.selection import Picks, Pool, SelectionContext
from hf_eff.contracts.spec import MethodSpec, Paper, Traits, knob
from hf_eff.engines.adapter import Adapter, LoraShape, temporary_adapter
from hf_eff.engines.datastore import FeatureStore, model_fingerprint, tensors_fingerprint
from hf_eff.engines.gradient_features import FeatureRecipe, backward_context, pool_features
from hf_eff.engines.influence import Influence
from hf_eff.engines.pool_size import SizedConfig
from hf_eff.engines.scoring import scoring_mode
from hf_eff.engines.warmup import WarmupCheckpoint, WarmupSettings, untrained, warm_up
from hf_eff.errors import DataError
from hf_eff.numerics.adam_direction import ADAM_VARIANTS, AdamScaling
from hf_eff.numerics.example_loss import Reduction
from hf_eff.numerics.flops import forward_flops
from hf_eff.numerics.keyed_random import content_order
from hf_eff.numerics.projection import RademacherProjector
from hf_eff.numerics.ranking import rank
from hf_eff.numerics.row_hash import row_hashes

# N pool rows, V target rows, E checkpoints, A adapter parameters, D numbers of a feature

_SMALL = 1e9
"""Parameters up to which 4,096 dims are the default."""
_VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {"adam_variant": "paper", "include_momentum": True, "val_agg": "cos_of_mean"},
    "official": {"adam_variant": "official", "include_momentum": True, "val_agg": "mean_cos"},
    "fixed": {"adam_variant": "damped", "include_momentum": False, "val_agg": "mean_cos"},
}


@dataclass(frozen=True, kw_only=True)
class LessConfig(SizedConfig):
    """Options of ``selection="less"``."""

    default_fraction: ClassVar[float] = 0.05

    variant: str = knob("fixed", "Whose formulas: see the method's card.", choices=tuple(_VARIANTS))
    adam_variant: str | None = knob(None, "Scaling of pool gradients; None: by variant.", choices=ADAM_VARIANTS)
    include_momentum: bool | None = knob(None, "Add Adam's running mean to each gradient; None: by variant.")
    val_agg: str | None = knob(
        None, "Average cosines, or target gradients; None: by variant.", choices=("mean_cos", "cos_of_mean")
    )
    group_reduce: str = knob("max", "How groups make one score.", choices=("max", "mean"), paper="max")
    group_column: str | None = knob(None, "Column of the target that names each row's group.")
    similarity: str = knob("cosine", "Compare directions, or also lengths.", choices=("cosine", "dot"), paper="cosine")
    reduction: str = knob("mean", "An example's loss per token, in all, or between.", choices=("mean", "sum", "sqrt"))
    dims: int | None = knob(
        None, "Width of the projection; None: 4096 up to 1e9 parameters, else 8192.", low=1, paper="8192"
    )
    proj_seed: int = knob(0, "Names the projection.", low=0)
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
    store_dtype: str = knob("float16", "Type of stored features.", choices=("float16", "float32"), paper="float16")
    dtype: str = knob(
        "auto", "Type of the forward: that of the weights, or autocast.", choices=("auto", "bfloat16"), paper="bfloat16"
    )
    gradient_tokens: int = knob(
        4096,
        "Tokens, padding included, of a batch with gradients; never above the scoring batch.",
        low=1,
        unit="tokens",
    )

    @property
    def resolved(self) -> dict[str, Any]:
        """The options that the variant decides unless they are given."""
        given = {name: getattr(self, name) for name in _VARIANTS[self.variant]}
        return {**_VARIANTS[self.variant], **{name: value for name, value in given.items() if value is not None}}

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """Type for mixed precision."""
        return torch.bfloat16 if self.dtype == "bfloat16" else None

    @property
    def num_checkpoints(self) -> int:
        """E; without a warm-up the adapter as it is makes one."""
        return self.warmup_epochs if self.warmup_epochs and self.warmup_fraction else 1

    def width(self, model_params: int) -> int:
        """Dims asked for, for a model of that size."""
        return self.dims or (4096 if model_params <= _SMALL else 8192)


class Less:
    """Ranks the pool by how well each row's gradient agrees with those of the target."""

    def __init__(self, config: LessConfig) -> None:
        self.config = config

    def select(self, context: SelectionContext) -> Picks:
        """Choose rows of ``context.pool``, best first.

        Raises:
            BudgetExceededError: The next batch would pass a limit; it was not computed.
            DataError: There is no target or no valid row, or gradients are not finite.
            ManifestError: ``context.store_dir`` holds features of other rows, options or another model.
        """
        config, target = self.config, _with_hashes(_target(context))
        context = replace(context, pool=_with_hashes(context.pool))
        config.limit(context.pool)  # refuses an impossible size before anything is computed
        shape = LoraShape(config.lora_r, config.lora_alpha, config.target_modules)
        with scoring_mode(context.model):
            known = {"model": model_fingerprint(context.model)}
            with temporary_adapter(context.model, shape, context.seed) as adapter:
                checkpoints = self._warm_up(context, adapter, known)
                recipe = self._recipe(context, adapter)
                features = [
                    self._features(context, target, recipe, checkpoint, {**known, "checkpoint": number})
                    for number, checkpoint in enumerate(checkpoints)
                ]
        facts = {
            "adapter": "fresh" if adapter.is_new else "the model's own",
            "adapter_params": adapter.num_params,
            "dims": recipe.projector.width,
            "projected": not recipe.projector.is_identity,
            "warmup_rows": len(self._warmup_rows(context.pool, context.seed)),
            "warmup_steps": checkpoints[-1].step,
        }
        return self._picks(context.pool, features, [checkpoint.learning_rate for checkpoint in checkpoints], facts)

    def _warm_up(self, context: SelectionContext, adapter: Adapter, known: Mapping[str, Any]) -> list[WarmupCheckpoint]:
        config, rows = self.config, self._warmup_rows(context.pool, context.seed)
        if not len(rows):
            return [untrained(adapter)]
        settings = WarmupSettings(
            epochs=config.warmup_epochs,
            batch_size=config.warmup_batch_size,
            learning_rate=context.learning_rate if config.learning_rate is None else config.learning_rate,
            dropout=config.lora_dropout,
            seed=context.seed,
            compute_dtype=config.compute_dtype,
        )
        paid = backward_context(context, adapter, config.gradient_tokens)
        folder = context.store_dir / "warmup" if context.store_dir else None
        return warm_up(paid, adapter, rows, settings, folder=folder, header=known)

    def _warmup_rows(self, pool: Pool, seed: int) -> np.ndarray:
        """A random share of the valid rows, drawn by content."""
        valid = np.flatnonzero(pool.loss_lengths > 0)
        if not self.config.warmup_epochs or not self.config.warmup_fraction:
            return valid[:0]
        hashes = pool.row_hash or ()
        order = content_order([hashes[int(row)] for row in valid], seed)
        return valid[order][: max(1, round(self.config.warmup_fraction * len(valid)))]

    def _recipe(self, context: SelectionContext, adapter: Adapter) -> FeatureRecipe:
        params = sum(parameter.numel() for parameter in context.model.parameters())
        sizes = tuple(math.prod(shape) for shape in adapter.shapes.values())
        return FeatureRecipe(
            adapter=adapter,
            projector=RademacherProjector(sizes, self.config.width(params), self.config.proj_seed),
            reduction=cast("Reduction", self.config.reduction),
            compute_dtype=self.config.compute_dtype,
        )

    def _features(
        self,
        context: SelectionContext,
        target: Pool,
        recipe: FeatureRecipe,
        checkpoint: WarmupCheckpoint,
        known: Mapping[str, Any],
    ) -> _Features:
        """Scaled gradients of the pool and plain ones of the target, at one checkpoint."""
        recipe.adapter.load(checkpoint.weights)
        scaling = AdamScaling(self.config.resolved["adam_variant"], self.config.resolved["include_momentum"])
        first, second = (
            [moment[name].to(context.device).flatten() for name in recipe.adapter.factors]
            for moment in (checkpoint.first_moment, checkpoint.second_moment)
        )
        paid = backward_context(context, recipe.adapter, self.config.gradient_tokens, recipe.projector)
        folder = context.store_dir / f"checkpoint-{known['checkpoint']}" if context.store_dir else None
        header = {**known, "weights": tensors_fingerprint(checkpoint.weights)}
        goal = pool_features(paid, target, recipe, folder=folder and folder / "target", header=header)
        pool = pool_features(
            paid,
            context.pool,
            recipe,
            dtype=self.config.store_dtype,
            folder=folder and folder / "pool",
            header={**header, "scaling": vars(scaling)},
            direction=scaling.at(first, second, checkpoint.step),
        )
        return _Features(pool, goal, target.groups or ["the target"] * len(target))

    def _picks(
        self, pool: Pool, features: Sequence[_Features], rates: Sequence[float], facts: Mapping[str, Any]
    ) -> Picks:
        """Compare, rank and take; checkpoints count by their learning rate."""
        config = self.config
        influence = Influence(config.similarity, config.resolved["val_agg"], config.group_reduce)
        weights = [rate / sum(rates) if sum(rates) else 1 / len(rates) for rate in rates]
        queries = [influence.queries(each.target, each.groups) for each in features]
        groups = sorted(set.intersection(*map(set, queries)))
        stacked = [torch.stack([query[group] for group in groups]) for query in queries]
        scores, closest = influence.scores([each.pool for each in features], stacked, weights)
        order = rank(scores, descending=True, ties=pool.row_hash)
        if not len(order):
            raise DataError("no row of the pool has a finite gradient; check the model's weights and dtype.")
        positions = config.take(order, pool)
        word = "cos" if config.similarity == "cosine" else "influence"
        notes = {"variant": config.variant, **config.resolved, "checkpoint_weights": weights, "groups": groups}
        return Picks(
            positions=positions,
            scores=scores,
            reasons=[f"{word} {scores[row]:.3g} to {groups[closest[row]]}" for row in positions],
            notes={**notes, **facts, "num_scored": len(order)},
        )


@dataclass(frozen=True)
class _Features:
    """Features of pool and target at one checkpoint, and the group of each target row."""

    pool: FeatureStore
    target: FeatureStore
    groups: Sequence[str]


def _target(context: SelectionContext) -> Pool:
    if context.reference is None or not (context.reference.loss_lengths > 0).any():
        raise DataError(
            "selection='less' needs target rows with tokens that carry loss; pass target= (eval_dataset in a trainer)."
        )
    return context.reference


def _with_hashes(pool: Pool) -> Pool:
    if pool.row_hash is not None:
        return pool
    return replace(pool, row_hash=row_hashes([pool.rows[row] for row in range(len(pool))]))


def cost(config: LessConfig, facts: Facts) -> Cost:
    """Closed form of the module's head, with the adapter's size estimated from the widths of attention."""
    model, pool, passes = facts.model, facts.pool, config.num_checkpoints
    rows, length = pool.num_rows or 0, max(1, math.ceil(pool.mean_tokens))
    # Query and output projections are [h, W]; key and value are no larger.
    adapter = sum(4 * config.lora_r * (model.hidden_size + block.attention_width) for block in model.blocks)
    if model.is_peft and model.trainable is not None:
        adapter = model.trainable.params
    width = min(config.width(model.params), max(1, adapter))
    warms_up = rows and config.warmup_epochs and config.warmup_fraction
    warmup = passes * max(1, round(config.warmup_fraction * rows)) if warms_up else 0
    featured = passes * (rows + pool.num_reference)
    row_flops = 2 * forward_flops(model, BatchShape(1, length)) + 6.0 * adapter * length
    item = 2 if config.store_dtype == "float16" else 4
    return Cost(
        flops=(warmup + featured) * row_flops + featured * 2.0 * adapter * width,
        tokens=(warmup + featured) * float(length),
        disk_bytes=passes * (float(width) * (item * rows + 4 * pool.num_reference) + 12.0 * adapter),
    )


SPEC = MethodSpec(
    name="less",
    kind="selection",
    slot="pool",
    summary="keep the examples whose gradient points where the target's gradient points.",
    config=LessConfig,
    build=Less,
    cost=cost,
    paper=Paper(
        title="LESS: Selecting Influential Data for Targeted Instruction Tuning", year=2024, arxiv="2402.04333"
    ),
    traits=Traits(deterministic=False, needs_model=True, needs_reference_set=True, packing=False),
    tiny={
        "fraction": 0.25,
        "dims": 256,
        "lora_r": 4,
        "warmup_fraction": 0.25,
        "warmup_epochs": 2,
        "warmup_batch_size": 4,
        "learning_rate": 1e-2,
    },
    requires={"peft": "peft"},
)
