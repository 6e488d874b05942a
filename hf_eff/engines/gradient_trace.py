"""Gradients of a pool and of a target along a short training: what gradient matching works with.

A LoRA is trained on a few rows of the pool. At each checkpoint every row of the pool leaves the
projected step that Adam would take on it, every row of the target its projected gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hf_eff.contracts.selection import Pool, SelectionContext
from hf_eff.engines.adapter import Adapter, LoraShape, temporary_adapter
from hf_eff.engines.datastore import FeatureStore, model_fingerprint, tensors_fingerprint
from hf_eff.engines.gradient_features import FeatureRecipe, backward_context, pool_features
from hf_eff.engines.scoring import scoring_mode
from hf_eff.engines.warmup import WarmupCheckpoint, WarmupSettings, untrained, warm_up
from hf_eff.numerics.adam_direction import AdamScaling
from hf_eff.numerics.example_loss import Reduction
from hf_eff.numerics.keyed_random import content_order
from hf_eff.numerics.projection import RademacherProjector
from hf_eff.numerics.row_hash import row_hashes


@dataclass(frozen=True, kw_only=True)
class TraceSettings:
    """How a trace is made.

    Attributes:
        shape: Adapter for models that have none.
        warmup: Training of the adapter; its ``compute_dtype`` also holds for the features.
        warmup_fraction: Share of the pool to train on; without any, or without epochs, the
            adapter is taken as it is.
        scaling: What becomes of the pool's gradients.
        dims: Width of the projection; at or above the adapter's size nothing is projected.
        proj_seed: Names the projection.
        reduction: What an example's summed loss is divided by.
        store_dtype: Type of the pool's stored features; the target's are float32.
        gradient_tokens: Tokens, padding included, of a batch with gradients.
    """

    shape: LoraShape
    warmup: WarmupSettings
    warmup_fraction: float
    scaling: AdamScaling
    dims: int
    proj_seed: int = 0
    reduction: Reduction = "mean"
    store_dtype: str = "float16"
    gradient_tokens: int = 2048


@dataclass(frozen=True)
class GradientTrace:
    """Features along the training.

    Attributes:
        pools: Features of the pool, one store a checkpoint.
        targets: Features of the target, one store a checkpoint.
        weights: Weight of each checkpoint: its mean learning rate, as a share of their sum.
        facts: What was done, JSON-able.
    """

    pools: Sequence[FeatureStore]
    targets: Sequence[FeatureStore]
    weights: Sequence[float]
    facts: Mapping[str, Any]


def trace_gradients(context: SelectionContext, target: Pool, settings: TraceSettings) -> GradientTrace:
    """Train, and take the gradients of pool and target at each checkpoint.

    With ``context.store_dir`` finished epochs and batches are kept there; called again after an
    interruption, the result is that of an uninterrupted call, bit for bit. The model is left as found.

    Args:
        context: Pool with content hashes, model and limits.
        target: Rows that stand for the task, with content hashes.
        settings: How.

    Raises:
        BudgetExceededError: The next batch would pass a limit; it was not computed.
        DataError: Rows of a batch are not independent examples.
        ManifestError: ``context.store_dir`` holds features of other rows, settings or another model.
        ScoringStoppedError: A stop was requested.
    """
    with scoring_mode(context.model):
        known = {"model": model_fingerprint(context.model)}
        with temporary_adapter(context.model, settings.shape, context.seed) as adapter:
            checkpoints = _checkpoints(context, adapter, settings, known)
            sizes = tuple(math.prod(shape) for shape in adapter.shapes.values())
            recipe = FeatureRecipe(
                adapter=adapter,
                projector=RademacherProjector(sizes, settings.dims, settings.proj_seed),
                reduction=settings.reduction,
                compute_dtype=settings.warmup.compute_dtype,
            )
            pairs = []
            for number, checkpoint in enumerate(checkpoints):
                adapter.load(checkpoint.weights)
                place = _folder(context, f"checkpoint-{number}")
                about = {**known, "weights": tensors_fingerprint(checkpoint.weights)}
                pairs.append(_features(context, target, recipe, checkpoint, settings, place, about))
    rates = [checkpoint.learning_rate for checkpoint in checkpoints]
    facts = {
        "adapter": "fresh" if adapter.is_new else "the model's own",
        "adapter_params": adapter.num_params,
        "dims": recipe.projector.width,
        "projected": not recipe.projector.is_identity,
        "warmup_rows": len(_warmup_rows(context, settings)),
        "warmup_steps": checkpoints[-1].step,
    }
    return GradientTrace(
        pools=[pool for pool, _ in pairs],
        targets=[goal for _, goal in pairs],
        weights=[rate / sum(rates) if sum(rates) else 1 / len(rates) for rate in rates],
        facts=facts,
    )


def with_hashes(pool: Pool) -> Pool:
    """The pool with a content hash a row."""
    if pool.row_hash is not None:
        return pool
    return replace(pool, row_hash=row_hashes([pool.rows[row] for row in range(len(pool))]))


def _checkpoints(
    context: SelectionContext, adapter: Adapter, settings: TraceSettings, known: Mapping[str, Any]
) -> list[WarmupCheckpoint]:
    rows = _warmup_rows(context, settings)
    if not len(rows):
        return [untrained(adapter)]
    paid = backward_context(context, adapter, settings.gradient_tokens)
    return warm_up(paid, adapter, rows, settings.warmup, folder=_folder(context, "warmup"), header=known)


def _warmup_rows(context: SelectionContext, settings: TraceSettings) -> np.ndarray:
    """A random share of the valid rows, drawn by content."""
    valid = np.flatnonzero(context.pool.loss_lengths > 0)
    if not settings.warmup.epochs or not settings.warmup_fraction:
        return valid[:0]
    hashes = context.pool.row_hash or ()
    order = content_order([hashes[int(row)] for row in valid], context.seed)
    return valid[order][: max(1, round(settings.warmup_fraction * len(valid)))]


def _features(
    context: SelectionContext,
    target: Pool,
    recipe: FeatureRecipe,
    checkpoint: WarmupCheckpoint,
    settings: TraceSettings,
    folder: Path | None,
    about: Mapping[str, Any],
) -> tuple[FeatureStore, FeatureStore]:
    """Scaled gradients of the pool and plain ones of the target, at one checkpoint."""
    paid = backward_context(context, recipe.adapter, settings.gradient_tokens, recipe.projector)
    goal = pool_features(
        paid,
        target,
        recipe,
        folder=folder and folder / "target",
        header=about,
        description="Gradients of the target",
    )
    first, second = (
        [moment[name].to(context.device).flatten() for name in recipe.adapter.factors]
        for moment in (checkpoint.first_moment, checkpoint.second_moment)
    )
    pool = pool_features(
        paid,
        context.pool,
        recipe,
        dtype=settings.store_dtype,
        folder=folder and folder / "pool",
        header={**about, "scaling": vars(settings.scaling)},
        direction=settings.scaling.at(first, second, checkpoint.step),
        description="Gradients of the pool",
    )
    return pool, goal


def _folder(context: SelectionContext, name: str) -> Path | None:
    return context.store_dir / name if context.store_dir else None
