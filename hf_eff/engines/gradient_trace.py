"""Gradients of a pool and of a target along a short training: what gradient matching works with.

A LoRA is trained on a few rows of the pool. At each checkpoint every row of the pool leaves the
projected step that Adam would take on it, every row of the target its projected gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hf_eff.contracts.selection import Pool, SelectionContext
from hf_eff.engines.adapter import Adapter, LoraShape, temporary_adapter
from hf_eff.engines.datastore import FeatureStore, model_fingerprint, tensors_fingerprint
from hf_eff.engines.gradient_features import FeatureRecipe, backward_context, make_projector, pool_features
from hf_eff.engines.scoring import scoring_mode
from hf_eff.engines.warmup import WarmupCheckpoint, WarmupSettings, scheduled_rate, untrained, warm_up
from hf_eff.numerics.adam_direction import AdamScaling
from hf_eff.numerics.example_loss import Reduction
from hf_eff.numerics.keyed_random import content_order
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
        projection: One of ``PROJECTIONS``.
        proj_seed: Names the projection.
        reduction: What an example's summed loss is divided by.
        store_dtype: Type of the pool's stored features, one of ``STORE_DTYPES``.
        target_dtype: Type of the target's stored features.
        checkpoint_weights: What a checkpoint counts by: the mean learning rate of its epoch (``"mean_rate"``), the
            rate of its last step (``"last_rate"``), or as much as any other (``"equal"``).
        gradient_tokens: Tokens, padding included, of a batch with gradients.
    """

    shape: LoraShape
    warmup: WarmupSettings
    warmup_fraction: float
    scaling: AdamScaling
    dims: int
    projection: str = "rademacher"
    proj_seed: int = 0
    reduction: Reduction = "mean"
    store_dtype: str = "float16"
    target_dtype: str = "float32"
    checkpoint_weights: str = "mean_rate"
    gradient_tokens: int = 2048


@dataclass(frozen=True)
class GradientTrace:
    """Features along the training.

    Attributes:
        pools: Features of the pool, one store a checkpoint.
        targets: Features of the target, one store a checkpoint.
        weights: Weight of each checkpoint, as a share of their sum.
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
            checkpoints = train_adapter(
                context,
                adapter,
                settings.warmup,
                settings.warmup_fraction,
                batch_tokens=settings.gradient_tokens,
                folder=_folder(context, "warmup"),
                header=known,
            )
            recipe = FeatureRecipe(
                adapter=adapter,
                projector=make_projector(settings.projection, adapter, settings.dims, settings.proj_seed),
                reduction=settings.reduction,
                compute_dtype=settings.warmup.compute_dtype,
            )
            pairs = []
            for number, checkpoint in enumerate(checkpoints):
                adapter.load(checkpoint.weights)
                place = _folder(context, f"checkpoint-{number}")
                about = {**known, "weights": tensors_fingerprint(checkpoint.weights)}
                pairs.append(_features(context, target, recipe, checkpoint, settings, place, about))
    facts = {
        "adapter": "fresh" if adapter.is_new else "the model's own",
        "adapter_params": adapter.num_params,
        "dims": recipe.projector.width,
        "projected": settings.projection if not recipe.projector.is_identity else False,
        "warmup_rows": len(_warmup_rows(context, settings.warmup, settings.warmup_fraction)),
        "warmup_steps": checkpoints[-1].step,
    }
    return GradientTrace(
        pools=[pool for pool, _ in pairs],
        targets=[goal for _, goal in pairs],
        weights=_weights(checkpoints, settings),
        facts=facts,
    )


def _weights(checkpoints: Sequence[WarmupCheckpoint], settings: TraceSettings) -> list[float]:
    """Weight of each checkpoint; without any learning rate all weigh the same."""
    rates = [checkpoint.learning_rate for checkpoint in checkpoints]
    if settings.checkpoint_weights == "last_rate":
        last = checkpoints[-1].step
        rates = [scheduled_rate(each.step - 1, last, settings.warmup) if last else 0.0 for each in checkpoints]
    if settings.checkpoint_weights == "equal" or not sum(rates):
        rates = [1.0] * len(checkpoints)
    return [rate / sum(rates) for rate in rates]


def with_hashes(pool: Pool) -> Pool:
    """The pool with a content hash a row."""
    if pool.row_hash is not None:
        return pool
    return replace(pool, row_hash=row_hashes([pool.rows[row] for row in range(len(pool))]))


def train_adapter(
    context: SelectionContext,
    adapter: Adapter,
    settings: WarmupSettings,
    fraction: float,
    *,
    batch_tokens: int,
    folder: Path | None = None,
    header: Mapping[str, Any] | None = None,
) -> list[WarmupCheckpoint]:
    """Warm an adapter up on a random share of the pool's valid rows, drawn by content.

    Args:
        context: Pool with content hashes, model and limits.
        adapter: Trained in place.
        settings: How.
        fraction: Share of the rows; without any, or without epochs, the adapter is taken as it is.
        batch_tokens: Tokens, padding included, of a batch with gradients.
        folder: Keeps finished epochs.
        header: What else the result depends on; JSON-able.

    Returns:
        One checkpoint an epoch, or the adapter as it is.

    Raises:
        BudgetExceededError: The next batch would pass a limit; it was not computed.
        ManifestError: ``folder`` holds a warm-up of something else.
        ScoringStoppedError: A stop was requested.
    """
    rows = _warmup_rows(context, settings, fraction)
    if not len(rows):
        return [untrained(adapter)]
    return warm_up(
        backward_context(context, adapter, batch_tokens), adapter, rows, settings, folder=folder, header=header
    )


def _warmup_rows(context: SelectionContext, settings: WarmupSettings, fraction: float) -> np.ndarray:
    valid = np.flatnonzero(context.pool.loss_lengths > 0)
    if not settings.epochs or not fraction:
        return valid[:0]
    hashes = context.pool.row_hash or ()
    order = content_order([hashes[int(row)] for row in valid], settings.seed)
    return valid[order][: max(1, round(fraction * len(valid)))]


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
        dtype=settings.target_dtype,
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
