"""Projected per-example gradients of a whole pool, in a store that resumes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_eff.contracts.selection import Pool, SelectionContext
from hf_eff.engines.adapter import Adapter
from hf_eff.engines.datastore import FeatureStore, pool_fingerprint
from hf_eff.engines.example_gradients import example_gradients
from hf_eff.engines.pool_pass import scored_batches, unfinished
from hf_eff.numerics.adam_direction import Direction
from hf_eff.numerics.example_loss import Reduction
from hf_eff.numerics.projection import Projector, RademacherProjector
from hf_eff.numerics.sparse_projection import SparseProjector
from hf_eff.numerics.two_sided_projection import TwoSidedProjector

PROJECTIONS = ("rademacher", "sparse", "two_sided")


def make_projector(kind: str, adapter: Adapter, dims: int, seed: int) -> Projector:
    """The projection of an adapter's gradients.

    Args:
        kind: One of ``PROJECTIONS``.
        adapter: Whose gradients.
        dims: Width; at or above the adapter's size nothing is projected.
        seed: Names the matrix.
    """
    shapes = tuple((shape[0], shape[1]) for shape in adapter.shapes.values())
    if kind == "two_sided":
        return TwoSidedProjector(shapes, dims, seed)
    sizes = tuple(math.prod(shape) for shape in shapes)
    return SparseProjector(sizes, dims, seed) if kind == "sparse" else RademacherProjector(sizes, dims, seed)


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
    projector: Projector
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
    context: SelectionContext, adapter: Adapter, batch_tokens: int, projector: Projector | None = None
) -> SelectionContext:
    """The context for batches with a backward through an adapter: smaller, and charged for what they cost.

    With frozen base weights the backward is about one more forward. Each entry of the adapter costs
    2 FLOPs a token in the forward, 2 for the gradient of its input and 2 for its own. A projection costs
    its own FLOPs an example.
    """
    per_row = projector.flops if projector else 0.0

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
        dtype: Type of the stored features, one of ``STORE_DTYPES``.
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

    def features(batch: Mapping[str, Any], rows: int) -> Tensor:
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
        return recipe.projector.project(pieces, rows)

    fill_store(context, pool, store, features, description)
    return store


def fill_store(
    context: SelectionContext,
    pool: Pool,
    store: FeatureStore,
    features: Callable[[Mapping[str, Any], int], Tensor],
    description: str,
) -> None:
    """Compute what a store lacks of the valid rows of a pool, in the batches of an uninterrupted call.

    Args:
        context: Limits, collator and progress bar.
        pool: The rows.
        store: Has a row a row of the pool.
        features: [B, D] of a batch on the device and its number of rows B.
        description: Text of the progress bar.

    Raises:
        BudgetExceededError: The next batch would pass a limit; it was not computed.
        ScoringStoppedError: A stop was requested.
    """

    def compute(positions: np.ndarray, batch: Mapping[str, Any]) -> torch.Tensor:
        return features(batch, len(positions)).cpu()

    for positions, found in scored_batches(context, unfinished(context, pool, store.done), description, compute):
        store.write(positions, found)
