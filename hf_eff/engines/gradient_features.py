"""Projected per-example gradients of a whole pool, in a store that resumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_eff.contracts.selection import Pool, SelectionContext
from hf_eff.engines.adapter import Adapter
from hf_eff.engines.datastore import FeatureStore, pool_fingerprint
from hf_eff.engines.example_gradients import example_gradients
from hf_eff.engines.scoring import pool_batches, token_batches
from hf_eff.numerics.adam_direction import Direction
from hf_eff.numerics.example_loss import Reduction
from hf_eff.numerics.projection import RademacherProjector


@dataclass(frozen=True, kw_only=True)
class FeatureRecipe:
    """What makes a feature of an example, beside the model and the example.

    Attributes:
        adapter: Whose factors the gradient is taken of.
        projector: Makes it short; numbers factors as the adapter orders them.
        reduction: What an example's summed loss is divided by.
        compute_dtype: Autocast type of the forward, or None.
    """

    adapter: Adapter
    projector: RademacherProjector
    reduction: Reduction = "mean"
    compute_dtype: torch.dtype | None = None

    def describe(self) -> dict[str, Any]:
        """What a stored feature depends on beside the model and the rows; JSON-able."""
        return {
            "parameters": {name: list(shape) for name, shape in self.adapter.shapes.items()},
            "projector": self.projector.fingerprint(),
            "reduction": self.reduction,
            "compute_dtype": str(self.compute_dtype),
        }


def backward_context(
    context: SelectionContext, adapter: Adapter, batch_tokens: int, projector: RademacherProjector | None = None
) -> SelectionContext:
    """The context for batches with a backward through an adapter: smaller, and charged for what they cost.

    With frozen base weights the backward is about one more forward. Each entry of the adapter costs
    2 FLOPs a token in the forward, 2 for the gradient of its input and 2 for its own. A projection to
    D dims costs 2 D FLOPs an entry and example.
    """
    per_row = 2.0 * adapter.num_params * projector.dims if projector and not projector.is_identity else 0.0

    def flops(rows: int, length: int) -> float:
        return 2 * context.forward_flops(rows, length) + 6.0 * adapter.num_params * rows * length + per_row * rows

    return replace(context, forward_flops=flops, batch_tokens=min(batch_tokens, context.batch_tokens))


def pool_features(
    context: SelectionContext,
    pool: Pool,
    recipe: FeatureRecipe,
    *,
    dtype: str = "float32",
    folder: Path | None = None,
    header: Mapping[str, Any] | None = None,
    direction: Direction | None = None,
    description: str = "Gradients",
) -> FeatureStore:
    """Features of all valid rows; rows without loss tokens stay empty.

    Args:
        context: From ``backward_context``; its model is in evaluation mode.
        pool: The rows.
        recipe: How a feature is made.
        dtype: Type of the stored features.
        folder: Keeps finished batches. Interrupted and called again with the same pool, recipe and
            ``batch_tokens``, only unfinished batches are computed, and the features are those of an
            uninterrupted call, bit for bit. None keeps them in memory.
        header: What else the features depend on; JSON-able.
        direction: Applied to each factor's gradients before they are projected.
        description: Text of the progress bar.

    Raises:
        BudgetExceededError: The next batch would pass a limit; it was not computed.
        DataError: Rows of a batch are not independent examples.
        ManifestError: ``folder`` holds features of something else.
        ScoringStoppedError: A stop was requested.
    """
    about = {**recipe.describe(), "rows": pool_fingerprint(pool), **(header or {})}
    store = FeatureStore.open(folder, rows=len(pool), width=recipe.projector.width, dtype=dtype, header=about)
    lacking = np.where(_in_unfinished_batch(context, pool, store.done), pool.loss_lengths, 0)
    for positions, batch in pool_batches(context, replace(pool, loss_lengths=lacking), description):
        pieces = example_gradients(
            context.model,
            recipe.adapter.factors,
            batch,
            is_causal_lm=context.is_causal_lm,
            reduction=recipe.reduction,
            compute_dtype=recipe.compute_dtype,
        )
        if direction is not None:
            pieces = ((index, direction(index, gradients)) for index, gradients in pieces)
        store.write(positions, recipe.projector.project(pieces, len(positions)))
    return store


def _in_unfinished_batch(context: SelectionContext, pool: Pool, done: np.ndarray) -> np.ndarray:
    """[N] Rows of batches that are not done as a whole: a batch is redone with its old neighbours or not at all."""
    valid = np.flatnonzero(pool.loss_lengths > 0)
    ties = None if pool.row_hash is None else [pool.row_hash[int(i)] for i in valid]
    unfinished = np.zeros(len(pool), dtype=bool)
    for local in token_batches(pool.lengths[valid], context.batch_tokens, ties=ties):
        unfinished[valid[local]] = not done[valid[local]].all()
    return unfinished
