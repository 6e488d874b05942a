"""Where a selection comes from: the dataset, the scorer, the method and what it picked, as manifest sections."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from hf_eff.contracts.selection import Picks, Pool, SelectionContext
from hf_eff.engines.pool_size import SizedConfig
from hf_eff.errors import DataError
from hf_eff.manifest import Selection
from hf_eff.manifest.columns import TextColumn
from hf_eff.manifest.matching import hub_origin
from hf_eff.manifest.schema import build_manifest, describe_scores
from hf_eff.numerics.row_hash import hash_of_hashes
from hf_eff.options import Chosen


@dataclass(frozen=True)
class AdoptedPicks(Picks):
    """Picks that an earlier selection made.

    Attributes:
        origin: That selection.
        exact: Whether its rows are taken as it named them, so that its manifest stays true.
    """

    origin: Selection | None = None
    exact: bool = False


def describe_dataset(
    dataset: Any, pool: Pool, columns: Sequence[str] | None = None, id_column: str | None = None
) -> dict[str, Any]:
    """The ``dataset`` section of the manifest: how to find and to recognise the rows.

    Args:
        dataset: What the pool was made from.
        pool: Result of ``make_pool``.
        columns: Columns the row hashes cover; all of the dataset's without.
        id_column: Column with the dataset's own ids, where they are recorded.
    """
    repo_id, config, revision = hub_origin(dataset)
    names = columns if columns is not None else getattr(dataset, "column_names", None)
    split = getattr(dataset, "split", None)
    return {
        "repo_id": repo_id,
        "revision": revision,
        "config": config,
        "split": None if split is None else str(split),
        "num_rows": len(dataset),
        "fingerprint": getattr(dataset, "_fingerprint", None),
        "columns": None if names is None else sorted(names),
        "preprocess": {} if id_column is None else {"id_column": id_column},
        "digest": None if pool.row_hash is None else hash_of_hashes(pool.row_hash),
    }


def describe_scorer(model: Any, tokenizer: Any, max_length: int | None) -> dict[str, Any]:
    """The ``scorer`` section of the manifest; folders of this machine are left out."""
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    is_repo = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not Path(name).exists()
    described = {
        "repo_id": name if is_repo else None,
        "revision": getattr(getattr(model, "config", None), "_commit_hash", None),
        "class": type(model).__name__,
        "dtype": str(getattr(model, "dtype", "")).removeprefix("torch."),
        "adapter": bool(getattr(model, "peft_config", None)),
    }
    return {
        "model": None if model is None else described,
        "tokenizer_sha256": None if tokenizer is None else _tokenizer_hash(tokenizer),
        "max_length": max_length,
    }


def check_picks(picks: Picks, pool: Pool, address: str) -> None:
    """Hold a method to its contract.

    Raises:
        DataError: The picks are none, repeated, out of range or invalid rows, or their weights are
            not finite and non-negative.
    """
    positions = np.asarray(picks.positions)
    if not len(positions):
        raise DataError(f"{address} chose no rows.")
    if not np.issubdtype(positions.dtype, np.integer) or positions.min() < 0 or positions.max() >= len(pool):
        raise DataError(f"{address} chose positions outside the pool of {len(pool)} rows.")
    if len(np.unique(positions)) != len(positions):
        raise DataError(f"{address} chose a row twice.")
    if (pool.loss_lengths[positions] == 0).any():
        raise DataError(f"{address} chose rows without a token that carries loss.")
    if picks.scores is not None and len(picks.scores) != len(pool):
        raise DataError(f"{address} gave {len(picks.scores)} scores for {len(pool)} candidates.")
    weights = picks.weights
    if weights is not None and (len(weights) != len(positions) or not (np.isfinite(weights) & (weights >= 0)).all()):
        raise DataError(f"{address} gave weights that are not finite, non-negative and one a choice.")


def selection_fields(
    chosen: Chosen,
    context: SelectionContext,
    picks: Picks,
    *,
    dataset: Mapping[str, Any],
    cost: Mapping[str, Any],
    scorer: Mapping[str, Any] | None = None,
    row_ids: Sequence[str] | None = None,
    params: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a ``Selection`` is made of: choice, reasons and provenance."""
    origin = picks.origin if isinstance(picks, AdoptedPicks) else None
    if origin is not None and isinstance(picks, AdoptedPicks) and picks.exact and "stages" not in picks.notes:
        return {field.name: getattr(origin, field.name) for field in fields(origin)}
    pool, positions = context.pool, np.asarray(picks.positions)
    scores = describe_scores(picks.scores, higher_is_better=picks.higher_is_better)
    indices = np.asarray(pool.index)[positions]
    return {
        "indices": indices,
        "manifest": build_manifest(
            dataset,
            _about(chosen, context, picks, params),
            scorer=scorer,
            scores=scores,
            cost=cost,
            provenance=None if origin is None else {"parents": [origin.identity]},
        ),
        "row_hashes": None if pool.row_hash is None else [pool.row_hash[i] for i in positions.tolist()],
        "scores": None if picks.scores is None else picks.scores[positions],
        "weights": picks.weights,
        "reasons": TextColumn.repeated(picks.reasons, len(positions))
        if isinstance(picks.reasons, str)
        else picks.reasons,
        "row_ids": None if row_ids is None else [row_ids[i] for i in indices.tolist()],
        "all_scores": picks.scores,
    }


def _about(
    chosen: Chosen,
    context: SelectionContext,
    picks: Picks,
    params: Mapping[str, Any] | None,
) -> dict[str, Any]:
    invalid, config = _invalid_rows(picks, context.pool), chosen.config
    return {
        "method": chosen.spec.name,
        "params": config.to_dict() if params is None else dict(params),
        "budget": config.size if isinstance(config, SizedConfig) else {"kind": "fraction", "value": 1.0},
        "seed": context.seed,
        "num_selected": len(picks.positions),
        "num_tokens": int(context.pool.lengths[picks.positions].sum()),
        "num_invalid": sum(invalid.values()),
        "invalid": invalid,
        "notes": dict(picks.notes),
    }


def _invalid_rows(picks: Picks, pool: Pool) -> dict[str, int]:
    """Rows that could not be chosen, by reason."""
    empty, masked = pool.lengths == 0, (pool.loss_lengths == 0) & (pool.lengths > 0)
    reasons = {"empty": int(empty.sum()), "no_loss_tokens": int(masked.sum())}
    if picks.scores is not None:
        reasons["no_finite_score"] = int((~np.isfinite(picks.scores) & (pool.loss_lengths > 0)).sum())
    return {reason: count for reason, count in reasons.items() if count}


def _tokenizer_hash(tokenizer: Any) -> str | None:
    backend = getattr(getattr(tokenizer, "tokenizer", tokenizer), "backend_tokenizer", None)
    return None if backend is None else hashlib.sha256(backend.to_str().encode()).hexdigest()
