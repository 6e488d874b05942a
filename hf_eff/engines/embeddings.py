"""One vector a row: a model's last hidden states, pooled, or vectors that the user brings in a column."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_eff.contracts.cost import ModelFacts
from hf_eff.contracts.memory import BatchShape
from hf_eff.contracts.selection import Pool, SelectionContext
from hf_eff.engines.datastore import FeatureStore, model_fingerprint, pool_fingerprint
from hf_eff.engines.facts import model_facts
from hf_eff.engines.pool_pass import scored_batches, unfinished
from hf_eff.engines.scoring import scoring_mode
from hf_eff.errors import DataError, OptionError
from hf_eff.numerics.flops import forward_flops

# N rows, B rows of a batch, T padded tokens, h width of a hidden state

POOLINGS = ("mean", "last", "weighted")
"""Mean over tokens, the last token, or a mean with weights that grow with the position: 1, 2, 3, ..."""
_TILE = 8192


def pool_embeddings(
    context: SelectionContext,
    pool: Pool,
    *,
    pooling: str = "mean",
    center: bool = False,
    description: str = "Embeddings",
) -> np.ndarray:
    """Pooled last hidden state of every row, of length one.

    The model's output head is not run, nor charged for; of an encoder-decoder only the encoder runs.
    Padding has no say in any pooling. With ``context.store_dir`` finished batches are kept there:
    interrupted and called again with the same rows, model and ``batch_tokens``, only unfinished
    batches are computed, and the result is that of an uninterrupted call, bit for bit.

    Args:
        context: Model, collator, limits and progress bar. The model is left as found.
        pool: The rows; those without loss tokens are skipped.
        pooling: One of ``POOLINGS``.
        center: Subtract the mean of the rows and scale to length one again: hidden states of
            language models share a large common part, which hides what tells rows apart.
        description: Text of the progress bar.

    Returns:
        [N, h] float32; NaN for rows without loss tokens and for those whose vector is not finite or zero.

    Raises:
        BudgetExceededError: The next batch would pass a limit; it was not computed.
        DataError: The model gives no hidden states, or of another width than its configuration says.
        ManifestError: The folder holds embeddings by another model.
        OptionError: The pooling is unknown.
        ScoringStoppedError: A stop was requested.
    """
    if pooling not in POOLINGS:
        raise OptionError(f"pooling must be one of {list(POOLINGS)}, got {pooling!r}.")
    if not len(pool):
        return np.zeros((0, 0), dtype=np.float32)
    facts = model_facts(context.model)
    trunk = trunk_facts(facts)

    def flops(rows: int, length: int) -> float:
        return forward_flops(trunk, BatchShape(rows, length))

    store = _open(context, pool, pooling, facts.hidden_size)
    paid = replace(context, forward_flops=flops)
    body = _body(context.model)

    def embed(_positions: np.ndarray, batch: Mapping[str, Any]) -> Tensor:
        states = _hidden_states(body, batch, is_causal_lm=context.is_causal_lm)
        if states.shape[-1] != facts.hidden_size:
            raise DataError(
                f"the model gives hidden states of width {states.shape[-1]} and its configuration says "
                f"{facts.hidden_size}; pass vectors of your own in a column."
            )
        return _pooled(states, batch.get("attention_mask"), pooling).cpu()

    with scoring_mode(context.model), torch.no_grad():
        for positions, rows in scored_batches(paid, unfinished(context, pool, store.done), description, embed):
            store.write(positions, rows)
    vectors = _read(store)
    return centred(vectors, mean_vector(vectors)) if center else vectors


def column_embeddings(pool: Pool, column: str) -> np.ndarray:
    """Vectors that the rows bring along, scaled to length one.

    Args:
        pool: Rows with ``examples``.
        column: Column that holds one list of numbers a row, as many in each.

    Returns:
        [N, h] float32; NaN for rows without loss tokens and for those whose vector is missing, not
        finite or zero.

    Raises:
        DataError: The pool has no such column, or its vectors differ in length.
    """
    if pool.examples is None:
        raise DataError(f"embedding_column={column!r} was given and the pool came without its columns; pass a dataset.")
    valid = np.flatnonzero(np.asarray(pool.loss_lengths) > 0)
    found = {int(row): _vector(pool.examples[int(row)], column) for row in valid}
    widths = {len(vector) for vector in found.values() if vector is not None}
    if len(widths) != 1 or 0 in widths:
        raise DataError(
            f"column {column!r} must hold one vector a row, all of one length; found lengths {sorted(widths)}."
        )
    vectors = np.full((len(pool), widths.pop()), np.nan, dtype=np.float32)
    for row, vector in found.items():
        length = 0.0 if vector is None else float(np.linalg.norm(vector))
        if vector is not None and np.isfinite(length) and length > 0:
            vectors[row] = vector / length
    return vectors


def embeddings(
    context: SelectionContext, pool: Pool, *, column: str | None, pooling: str, description: str = "Embeddings"
) -> np.ndarray:
    """Vectors of a column where one is named, else those of the model; see the two functions for both."""
    if column is not None:
        return column_embeddings(pool, column)
    return pool_embeddings(context, pool, pooling=pooling, description=description)


def target_of(context: SelectionContext, method: str) -> Pool:
    """The target of a selection.

    Raises:
        DataError: There is none, or no row of it has tokens that carry loss.
    """
    if context.reference is None or not (np.asarray(context.reference.loss_lengths) > 0).any():
        raise DataError(
            f"selection={method!r} needs target rows with tokens that carry loss; pass target= "
            "(eval_dataset in a trainer)."
        )
    return context.reference


def members_of(target: Pool, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Places in ``rows`` by group of the target, sorted by name; one group where the target has none."""
    names = np.asarray(["the target"] * len(target) if target.groups is None else target.groups, dtype=object)[rows]
    return {name: np.flatnonzero(names == name) for name in sorted(set(names))}


def mean_vector(vectors: np.ndarray) -> np.ndarray:
    """[h] float64 mean of the rows that are finite.

    Raises:
        DataError: None is.
    """
    finite = np.flatnonzero(np.isfinite(vectors[:, 0])) if vectors.size else np.zeros(0, dtype=np.int64)
    if not len(finite):
        raise DataError("no row of the pool has a finite embedding; check the model's weights and dtype.")
    total = np.zeros(vectors.shape[1])
    for start in range(0, len(finite), _TILE):
        total += vectors[finite[start : start + _TILE]].sum(axis=0, dtype=np.float64)
    return total / len(finite)


def centred(vectors: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """[N, h] rows less ``mean``, of length one again; a row equal to the mean has no direction and becomes zero."""
    out = np.empty_like(vectors)
    for start in range(0, len(vectors), _TILE):
        rows = slice(start, start + _TILE)
        shifted = vectors[rows].astype(np.float64) - mean
        lengths = np.linalg.norm(shifted, axis=1, keepdims=True)
        # Below the rounding of the float32 input there is no direction, only noise.
        nothing = lengths < 1e-6
        out[rows] = np.where(nothing, 0.0, shifted / np.where(nothing, 1.0, lengths))
    return out


def rows_by_content(pool: Pool, vectors: np.ndarray) -> np.ndarray:
    """[M] rows with loss tokens and a finite vector, in the order of their content hashes.

    Work on rows in this order: ties then go by content, sums run in one order, and random draws fall on
    the same rows, so that a result depends on what the pool holds and not on how it is ordered.

    Raises:
        DataError: There is no such row.
    """
    finite = np.isfinite(vectors).all(axis=1) if vectors.size else np.zeros(len(pool), dtype=bool)
    usable = np.flatnonzero(finite & (np.asarray(pool.loss_lengths) > 0))
    if not len(usable):
        raise DataError("no row of the pool has a finite embedding; check the model's weights and dtype.")
    if pool.row_hash is None:
        return usable
    return usable[np.argsort(np.asarray([pool.row_hash[int(row)] for row in usable]), kind="stable")]


def trunk_facts(facts: ModelFacts) -> ModelFacts:
    """Shapes of what an embedding runs: the model without its output head, or its encoder alone."""
    blocks = facts.blocks
    if facts.is_encoder_decoder:
        blocks = tuple(replace(block, stream="decoder") for block in blocks if block.stream == "encoder")
    return replace(facts, blocks=blocks, head_matmul_params=0)


def embedding_flops(facts: ModelFacts, rows: int, length: float) -> float:
    """FLOPs of ``pool_embeddings`` for rows of one length."""
    return forward_flops(trunk_facts(facts), BatchShape(rows, max(1, round(length)))) if rows else 0.0


# -- the model ------------------------------------------------------------------------------------------------------


def _body(model: Any) -> nn.Module:
    """What turns tokens into hidden states: the model inside its head and adapters, or the encoder of two stacks."""
    core: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    two_stacks = getattr(getattr(core, "config", None), "is_encoder_decoder", False)
    body: nn.Module = core.get_encoder() if two_stacks else getattr(core, "base_model", core)
    return body


def _hidden_states(body: nn.Module, batch: Mapping[str, Any], *, is_causal_lm: bool) -> Tensor:
    """[B, T, h]."""
    accepted = inspect.signature(type(body).forward).parameters
    inputs = {key: value for key, value in batch.items() if key in accepted and key != "labels"}
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    mask: Any = batch.get("attention_mask")
    if is_causal_lm and "position_ids" in accepted and "position_ids" not in inputs and _is_left_padded(mask):
        # Positions that do not count padding, lest a vector depend on the rows it is batched with.
        inputs["position_ids"] = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    outputs = body(**inputs)
    states = outputs.get("last_hidden_state") if isinstance(outputs, Mapping) else outputs[0]
    if not isinstance(states, Tensor) or states.dim() != 3:
        raise DataError(
            f"{type(body).__name__} returns no last hidden state; pass vectors of your own in a column "
            "(embedding_column) or use a method that needs no embeddings."
        )
    return states


def _is_left_padded(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dim() == 2 and bool((mask[:, 0] == 0).any())


def _pooled(states: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """[B, h] float32; sums run over real tokens only, so that what padding holds, NaN included, does not count."""
    real = torch.ones(states.shape[:2], device=states.device) if mask is None else (mask != 0).float()
    places = real.cumsum(dim=1) * real
    if pooling == "last":
        weights = (places == places.max(dim=1, keepdim=True).values).float() * real
    else:
        weights = places if pooling == "weighted" else real
    weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1.0)
    visible = states.float().masked_fill(real[..., None] == 0, 0.0)
    return torch.einsum("bt,bth->bh", weights, visible)


# -- the store ------------------------------------------------------------------------------------------------------


def _open(context: SelectionContext, pool: Pool, pooling: str, width: int) -> FeatureStore:
    """A folder a pool and pooling, so that pool and target, and the stages of a pipeline, do not meet."""
    rows = pool_fingerprint(pool)
    header = {"rows": rows, "pooling": pooling, "model": model_fingerprint(context.model)}
    return FeatureStore.open(
        _folder(context, rows, pooling), rows=len(pool), width=width, dtype="float32", header=header
    )


def _folder(context: SelectionContext, *parts: str) -> Path | None:
    if context.store_dir is None:
        return None
    return context.store_dir / f"embeddings-{hashlib.sha256('/'.join(parts).encode()).hexdigest()[:12]}"


def _read(store: FeatureStore) -> np.ndarray:
    """[N, h] unit rows; NaN where a row is missing, not finite or zero."""
    norms = store.norms
    usable = store.done & np.isfinite(norms) & (norms > 0)
    vectors = store.unit_rows(slice(None)).numpy().copy()
    vectors[~usable] = np.nan
    return vectors


def _vector(row: Mapping[str, Any], column: str) -> np.ndarray | None:
    if column not in row:
        raise DataError(f"the pool has no column {column!r}; its columns are {sorted(row)}.")
    if row[column] is None:
        return None
    try:
        return np.asarray(row[column], dtype=np.float32).reshape(-1)
    except (TypeError, ValueError):
        raise DataError(f"column {column!r} must hold lists of numbers, got {type(row[column]).__name__}.") from None
