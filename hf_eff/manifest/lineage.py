"""Selections made from selections: joined, met, subtracted, refreshed. Each names its parents by hash."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa

from hf_eff.errors import ManifestError, OptionError
from hf_eff.manifest import Selection
from hf_eff.manifest.columns import HashColumn, TextColumn

Chosen = TypeVar("Chosen", bound=Selection)
Operation = Literal["union", "intersection", "difference"]
_OPERATIONS = ("union", "intersection", "difference")


def combine_selections(first: Chosen, *others: Selection, operation: Operation = "union") -> Chosen:
    """Rows of several selections of one dataset as one selection.

    Order, scores, weights and reasons of a row are those of the first selection that has it. Scores of different
    methods do not compare, so they are kept only where all methods are the same.

    Args:
        first: A selection.
        others: More selections of the same dataset.
        operation: ``"union"``, ``"intersection"``, or ``"difference"``: rows of the first that are in no other.

    Raises:
        ManifestError: The selections are of different datasets, or no row is left.
        OptionError: The operation is not known, or nothing is given to combine with.
    """
    if operation not in _OPERATIONS or not others:
        raise OptionError(f"operation must be one of {list(_OPERATIONS)} of two selections or more, got {operation!r}.")
    for other in others:
        _check_same_dataset(first, other)
    parts: tuple[Selection, ...] = (first, *others)
    owner, places = _kept(parts, operation)
    if not len(owner):
        raise ManifestError(f"the {operation} of these selections has no rows.")
    about = {
        "method": operation,
        "name": operation,
        "params": {"methods": [part.manifest["selection"]["method"] for part in parts]},
        "num_tokens": 0,
        "notes": {"rows_by_parent": np.bincount(owner, minlength=len(parts)).tolist()},
    }
    same = len({part.manifest["selection"]["method"] for part in parts}) == 1
    fields: dict[str, Any] = {
        "indices": _gathered([part.indices for part in parts], owner, places),
        "scores": _gathered([part.scores for part in parts], owner, places) if same else None,
        "weights": _gathered([part.weights for part in parts], owner, places),
        "row_hashes": _hashes(parts, owner, places),
        "row_ids": _texts([part.row_ids for part in parts], owner, places),
        "reasons": _texts([part.reasons for part in parts], owner, places),
    }
    manifest = _descended(first, about, [part.identity for part in parts], len(owner))
    return replace(first, manifest=manifest, all_scores=None, **fields)


def refresh_selection(old: Selection, new: Chosen, from_step: int) -> Chosen:
    """The selection that takes over from another one at a step of a run.

    Args:
        old: What was trained on until then.
        new: What is trained on from then on, of the same dataset.
        from_step: The first step on the new rows.

    Returns:
        The new selection, its manifest naming the old one as its parent and the steps of every phase so far.

    Raises:
        ManifestError: The selections are of different datasets.
        OptionError: The step lies before the phase that it ends.
    """
    _check_same_dataset(old, new)
    phases = copy.deepcopy(old.manifest["selection"]["phases"]) or [{"phase": 0, "from_step": 0, "to_step": None}]
    if from_step < phases[-1]["from_step"]:
        raise OptionError(f"from_step={from_step} lies before the phase that it ends: {phases[-1]}.")
    phases[-1]["to_step"] = from_step
    phases.append({"phase": phases[-1]["phase"] + 1, "from_step": from_step, "to_step": None})
    parents = [*new.manifest["provenance"]["parents"], old.identity]
    manifest = _descended(new, {"phases": phases}, parents, len(new))
    return replace(new, manifest=manifest)


def _descended(
    selection: Selection, about: Mapping[str, Any], parents: Sequence[str], num_selected: int
) -> dict[str, Any]:
    """A manifest with these facts, that is in no file yet."""
    manifest: dict[str, Any] = copy.deepcopy(dict(selection.manifest))
    manifest["selection"] |= {**about, "num_selected": num_selected, "file": "", "sha256": ""}
    manifest["provenance"] |= {"parents": list(parents)}
    return manifest


def _check_same_dataset(first: Selection, second: Selection) -> None:
    one, other = first.manifest["dataset"], second.manifest["dataset"]
    for name in ("num_rows", "columns", "digest"):
        if one[name] != other[name]:
            raise ManifestError(f"the selections are of different datasets: {name} is {one[name]} and {other[name]}.")


def _kept(parts: Sequence[Selection], operation: str) -> tuple[np.ndarray, np.ndarray]:
    """[m] number of the selection and [m] place in it, of every row that is kept."""
    if operation != "union":
        test = [np.isin(parts[0].indices, part.indices) for part in parts[1:]]
        kept = np.logical_and.reduce(test) if operation == "intersection" else ~np.logical_or.reduce(test)
        places = np.flatnonzero(kept)
        return np.zeros(len(places), dtype=np.int64), places
    owner = np.concatenate([np.full(len(part), number) for number, part in enumerate(parts)])
    places = np.concatenate([np.arange(len(part)) for part in parts])
    _, first = np.unique(np.concatenate([part.indices for part in parts]), return_index=True)
    first.sort()
    return owner[first], places[first]


def _gathered(columns: Sequence[np.ndarray | None], owner: np.ndarray, places: np.ndarray) -> np.ndarray | None:
    """Values by owner and place; None where a column that rows are taken from is missing."""
    used = {int(number) for number in np.unique(owner)}
    if any(columns[number] is None for number in used):
        return None
    starts = np.cumsum([0, *(0 if column is None else len(column) for column in columns)])[:-1]
    return np.concatenate([column for column in columns if column is not None])[starts[owner] + places]


def _hashes(parts: Sequence[Selection], owner: np.ndarray, places: np.ndarray) -> HashColumn | None:
    codes = [None if part.row_hashes is None else HashColumn.of(part.row_hashes).codes for part in parts]
    found = _gathered(codes, owner, places)
    return None if found is None else HashColumn(found)


def _texts(columns: Sequence[Any], owner: np.ndarray, places: np.ndarray) -> TextColumn | None:
    used = [int(number) for number in np.unique(owner)]
    if any(columns[number] is None for number in used):
        return None
    chunks = [chunk for number in used for chunk in TextColumn.of(columns[number]).values.chunks]
    starts = np.zeros(len(columns), dtype=np.int64)
    starts[used] = np.cumsum([0, *(len(columns[number]) for number in used)])[:-1]
    return TextColumn(pa.chunked_array(chunks).unify_dictionaries())[starts[owner] + places]
