"""What a manifest may say: a closed schema, version 1, and how to fill it.

A manifest is data from strangers: an unknown or missing key, a wrong type or a boolean where a number
belongs is refused by its path.
"""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np

from hf_eff.errors import ManifestError
from hf_eff.numerics.row_hash import ALGORITHM, CANON

FORMAT, VERSION = "hf_eff.selection", 1
_ROW_HASH = {"algo": ALGORITHM, "canon": CANON}
_PACKAGES = ("hf_eff", "transformers", "trl", "peft", "datasets", "torch")

_TEXT, _OPTIONAL_TEXT, _OPTIONAL_NUMBER = (str,), (str, type(None)), (int, float, type(None))
_SCHEMA: dict[str, Any] = {
    "format": _TEXT,
    "format_version": (int,),
    "dataset": {
        "repo_id": _OPTIONAL_TEXT,
        "repo_type": _TEXT,
        "revision": _OPTIONAL_TEXT,
        "config": _OPTIONAL_TEXT,
        "split": _OPTIONAL_TEXT,
        "num_rows": (int,),
        "data_files": (list, type(None)),
        "fingerprint": _OPTIONAL_TEXT,
        "columns": (list, type(None)),
        "preprocess": (dict,),
        "row_hash": {"algo": _TEXT, "canon": _TEXT},
        "digest": _OPTIONAL_TEXT,
    },
    "selection": {
        "name": _TEXT,
        "method": _TEXT,
        "method_version": _TEXT,
        "params": (dict,),
        "budget": {"kind": _TEXT, "value": (int, float)},
        "seed": (int,),
        "num_selected": (int,),
        "num_tokens": (int,),
        "num_invalid": (int,),
        "invalid": (dict,),
        "notes": (dict,),
        "file": _TEXT,
        "sha256": _TEXT,
        "phases": (list,),
    },
    "scorer": {"model": (dict, type(None)), "tokenizer_sha256": _OPTIONAL_TEXT, "max_length": (int, type(None))},
    "scores": {
        "higher_is_better": (bool,),
        "mean": _OPTIONAL_NUMBER,
        "std": _OPTIONAL_NUMBER,
        "min": _OPTIONAL_NUMBER,
        "max": _OPTIONAL_NUMBER,
        "quantiles": (dict,),
        "nan": (int,),
        "hist": {"edges": (list,), "counts": (list,)},
    },
    "cost": {
        "flops": (int, float),
        "flops_source": _TEXT,
        "seconds": (int, float),
        "device": _TEXT,
        "num_devices": (int,),
        "peak_bytes": _OPTIONAL_NUMBER,
        "tokens": (int, float),
        "energy_kwh": _OPTIONAL_NUMBER,
    },
    "software": (dict,),
    "provenance": {"created": _TEXT, "command": _TEXT, "git_commit": _OPTIONAL_TEXT, "parents": (list,)},
    "licence": {"inherits": _TEXT, "notes": _TEXT},
}


def build_manifest(
    dataset: Mapping[str, Any],
    selection: Mapping[str, Any],
    *,
    scorer: Mapping[str, Any] | None = None,
    scores: Mapping[str, Any] | None = None,
    cost: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A complete manifest from the parts that are known; the rest is neutral.

    Args:
        dataset: At least ``num_rows``.
        selection: At least ``method``, ``num_selected`` and ``seed``.
        scorer: Model and tokenizer that scored.
        scores: Statistics, see ``describe_scores``.
        cost: What selecting cost.
        provenance: Command, commit, parent manifests.

    Returns:
        A dictionary that fits the schema; a part that does not raises ``ManifestError``.
    """
    manifest = _blank()
    parts = {"dataset": dataset, "selection": selection, "scorer": scorer, "scores": scores, "cost": cost}
    for name, part in {**parts, "provenance": provenance}.items():
        manifest[name] |= dict(part or {})
    manifest["selection"]["name"] = manifest["selection"]["name"] or manifest["selection"]["method"]
    check_manifest(manifest)
    return manifest


def describe_scores(scores: np.ndarray | None, *, higher_is_better: bool) -> dict[str, Any]:
    """Statistics of all candidates' scores, NaN left out and counted."""
    values = np.asarray([] if scores is None else scores, dtype=np.float64)
    finite = values[np.isfinite(values)]
    described: dict[str, Any] = {"higher_is_better": higher_is_better, "nan": len(values) - len(finite)}
    if len(finite):
        counts, edges = np.histogram(finite, bins=min(20, len(finite)))
        described |= {name: float(getattr(finite, name)()) for name in ("mean", "std", "min", "max")}
        described["quantiles"] = {str(q): float(np.quantile(finite, q)) for q in (0.05, 0.25, 0.5, 0.75, 0.95)}
        described["hist"] = {"edges": edges.tolist(), "counts": counts.tolist()}
    return described


def check_manifest(manifest: Any) -> None:
    """Hold a manifest to the schema.

    Raises:
        ManifestError: A key is unknown, missing or of the wrong type, or the version or the hash is another.
    """
    _check(manifest, _SCHEMA, "manifest")
    if (manifest["format"], manifest["format_version"]) != (FORMAT, VERSION):
        raise ManifestError(
            f"the manifest has format {manifest['format']!r} version {manifest['format_version']}; "
            f"this release of hf_eff reads {FORMAT!r} version {VERSION}."
        )
    about = manifest["dataset"]
    if about["row_hash"] != _ROW_HASH:
        raise ManifestError(f"manifest.dataset.row_hash must be {_ROW_HASH}, got {about['row_hash']}.")
    if not all(isinstance(name, str) for name in about["columns"] or ()):
        raise ManifestError(f"manifest.dataset.columns must be names, got {about['columns']!r}.")


def _check(value: Any, schema: Mapping[str, Any], where: str) -> None:
    if not isinstance(value, Mapping):
        raise ManifestError(f"{where} must be an object, got {type(value).__name__}.")
    if unknown := sorted(set(value) - set(schema)):
        raise ManifestError(f"{where} has unknown keys {unknown}; allowed: {sorted(schema)}.")
    if missing := sorted(set(schema) - set(value)):
        raise ManifestError(f"{where} lacks the keys {missing}.")
    for key, kinds in schema.items():
        if isinstance(kinds, Mapping):
            _check(value[key], kinds, f"{where}.{key}")
        elif not _fits(value[key], kinds):
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise ManifestError(f"{where}.{key} must be {names}, got {value[key]!r}.")


def _fits(value: Any, kinds: tuple[type, ...]) -> bool:
    # bool is an int to Python, not to a manifest.
    return isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)


def _blank() -> dict[str, Any]:
    """Every key, each with the value that says nothing."""
    manifest = {name: _neutral(part) for name, part in _SCHEMA.items()}
    manifest |= {"format": FORMAT, "format_version": VERSION}
    manifest["dataset"] |= {"repo_type": "dataset", "row_hash": dict(_ROW_HASH)}
    manifest["selection"] |= {
        "method_version": _version("hf_eff"),
        "budget": {"kind": "fraction", "value": 1.0},
        "phases": [{"phase": 0, "from_step": 0, "to_step": None}],
    }
    manifest["scores"]["higher_is_better"] = True
    manifest["cost"] |= {"flops_source": "estimate", "device": "cpu", "num_devices": 1}
    manifest["software"] = {**{name: _version(name) for name in _PACKAGES}, "python": platform.python_version()}
    manifest["provenance"]["created"] = dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds")
    manifest["licence"] |= {"inherits": "dataset", "notes": "Indices, hashes and scores; rows are not redistributed."}
    return manifest


def _neutral(kinds: Any) -> Any:
    """Null where it is allowed, else the empty value of the first type."""
    if isinstance(kinds, Mapping):
        return {name: _neutral(part) for name, part in kinds.items()}
    return None if type(None) in kinds else kinds[0]()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
