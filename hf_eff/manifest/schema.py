"""What a manifest may say: a closed schema, version 1, and how to fill it.

A manifest is data from strangers: an unknown or missing key, a wrong type or a boolean where a number
belongs is refused by its path.
"""

from __future__ import annotations

import copy
import datetime as dt
import importlib.metadata
import math
import platform
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hf_eff.errors import ManifestError
from hf_eff.numerics.row_hash import ALGORITHM, CANON

FORMAT, VERSION = "hf_eff.selection", 1
_ROW_HASH = {"algo": ALGORITHM, "canon": CANON}
_DEEPEST = 50
_PACKAGES = ("hf_eff", "transformers", "trl", "peft", "datasets", "torch")

_LARGEST = 2**63 - 1

_TEXT, _OPTIONAL_TEXT = {"type": "string"}, {"type": ["string", "null"]}
_NUMBER, _OPTIONAL_NUMBER, _INTEGER = {"type": "number"}, {"type": ["number", "null"]}, {"type": "integer"}
_COUNT = {"type": "integer", "minimum": 0}
_NAMED = {"type": "object"}
_SHA = {"type": "string", "pattern": "^([0-9a-f]{64})?$"}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": sorted(properties), "additionalProperties": False}


def _list_of(items: Mapping[str, Any], *, optional: bool = False) -> dict[str, Any]:
    return {"type": ["array", "null"] if optional else "array", "items": dict(items)}


JSON_SCHEMA: dict[str, Any] = {
    "$schema": "http://json-schema.org/draft-04/schema#",
    "id": "https://json-schema.org/hf_eff/selection.v1.schema.json",
    "title": "hf_eff.selection, version 1",
    **_object(
        format={"enum": [FORMAT]},
        format_version={"enum": [VERSION], "type": "integer"},
        dataset=_object(
            repo_id=_OPTIONAL_TEXT,
            repo_type={"enum": ["dataset"]},
            revision=_OPTIONAL_TEXT,
            config=_OPTIONAL_TEXT,
            split=_OPTIONAL_TEXT,
            num_rows=_COUNT,
            data_files=_list_of(_TEXT, optional=True),
            fingerprint=_OPTIONAL_TEXT,
            columns=_list_of(_TEXT, optional=True),
            preprocess=_NAMED,
            row_hash=_object(algo={"enum": [ALGORITHM]}, canon={"enum": [CANON]}),
            digest={"type": ["string", "null"], "pattern": "^[0-9a-f]{32}$"},
        ),
        selection=_object(
            name=_TEXT,
            method=_TEXT,
            method_version=_TEXT,
            params=_NAMED,
            budget=_object(kind=_TEXT, value=_NUMBER),
            seed=_INTEGER,
            num_selected=_COUNT,
            num_tokens=_COUNT,
            num_invalid=_COUNT,
            invalid=_NAMED,
            notes=_NAMED,
            file=_TEXT,
            sha256=_SHA,
            phases=_list_of(_object(phase=_COUNT, from_step=_COUNT, to_step={"type": ["integer", "null"]})),
        ),
        scorer=_object(
            model={"type": ["object", "null"]},
            tokenizer_sha256=_OPTIONAL_TEXT,
            max_length={"type": ["integer", "null"]},
        ),
        scores=_object(
            higher_is_better={"type": "boolean"},
            mean=_OPTIONAL_NUMBER,
            std=_OPTIONAL_NUMBER,
            min=_OPTIONAL_NUMBER,
            max=_OPTIONAL_NUMBER,
            quantiles=_NAMED,
            nan=_COUNT,
            hist=_object(edges=_list_of(_NUMBER), counts=_list_of(_COUNT)),
        ),
        cost=_object(
            flops=_NUMBER,
            flops_source=_TEXT,
            seconds=_NUMBER,
            device=_TEXT,
            num_devices=_COUNT,
            peak_bytes=_OPTIONAL_NUMBER,
            tokens=_NUMBER,
            energy_kwh=_OPTIONAL_NUMBER,
        ),
        software=_NAMED,
        provenance=_object(
            created=_TEXT,
            command=_TEXT,
            git_commit=_OPTIONAL_TEXT,
            parents=_list_of({"type": "string", "pattern": "^[0-9a-f]{64}$"}),
        ),
        licence=_object(inherits=_TEXT, notes=_TEXT),
    ),
}
"""The format as a JSON Schema; ``selection.v1.schema.json`` beside this file is its copy for other tools.

Draft 4, in which an integer has no fraction. What no schema can say: numbers are finite and fit 64 bits
(``check_values``), and a histogram has one more edge than counts (``check_manifest``).
"""


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
    """Hold a manifest to ``JSON_SCHEMA``, and to what no schema can say.

    Raises:
        ManifestError: A key is unknown, missing or of the wrong type, a number is not finite, or the version or the
            hash is another.
    """
    if isinstance(manifest, Mapping) and {"format", "format_version"} <= set(manifest):
        _check_version(manifest["format"], manifest["format_version"])
    _check(manifest, JSON_SCHEMA, "manifest")
    edges, counts = (manifest["scores"]["hist"][name] for name in ("edges", "counts"))
    if len(edges) != (len(counts) + 1 if counts else 0):
        raise ManifestError(f"manifest.scores.hist has {len(edges)} edges for {len(counts)} counts.")


def check_values(value: Any, where: str = "manifest", depth: int = 0) -> None:
    """Refuse what a text of JSON can hold and a manifest cannot.

    Raises:
        ManifestError: A number is not finite or does not fit 64 bits, a text is no Unicode, or values are nested too
            deep.
    """
    if depth > _DEEPEST:
        raise ManifestError(f"{where[:80]}... is nested more than {_DEEPEST} deep.")
    if isinstance(value, Mapping):
        for key, item in value.items():
            check_values(key, where, depth + 1)
            check_values(item, f"{where}.{key}", depth + 1)
    elif isinstance(value, list):
        for item in value:
            check_values(item, where, depth + 1)
    elif isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ManifestError(f"{where[:200]} holds text that is not Unicode.")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ManifestError(f"{where[:200]} is {value}, which is not a JSON number.")
    elif isinstance(value, int) and abs(value) > _LARGEST:
        raise ManifestError(f"{where[:200]} is a number of more than 64 bits.")


def _check_version(name: Any, version: Any) -> None:
    if (name, version) != (FORMAT, VERSION) or isinstance(version, bool):
        raise ManifestError(
            f"the manifest has format {_shown(name)} version {_shown(version)}; "
            f"this release of hf_eff reads {FORMAT!r} version {VERSION}."
        )


def _check(value: Any, schema: Mapping[str, Any], where: str) -> None:
    """Hold a value to the part of JSON Schema that this format uses."""
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else types
    if types and not any(_TYPES[name](value) for name in types):
        shown = " or ".join(_WORDS.get(name, name) for name in types)
        found = type(value).__name__ if isinstance(value, (dict, list)) or "object" in types else _shown(value)
        raise ManifestError(f"{where} must be {shown}, got {found}.")
    if "enum" in schema and not any(value == allowed for allowed in schema["enum"]):
        allowed = schema["enum"][0]
        raise ManifestError(f"{where} is {_shown(value)}; this release of hf_eff reads {allowed!r}.")
    if isinstance(value, str) and "pattern" in schema and re.search(schema["pattern"], value) is None:
        raise ManifestError(f"{where} must be hexadecimal digits of a hash, got {_shown(value)}.")
    if "minimum" in schema and value is not None and value < schema["minimum"]:
        raise ManifestError(f"{where} must be at least {schema['minimum']}, got {value!r}.")
    if isinstance(value, Mapping) and "properties" in schema:
        _check_object(value, schema["properties"], where)
    if isinstance(value, list):
        for place, item in enumerate(value):
            _check(item, schema["items"], f"{where}[{place}]")


def _check_object(value: Mapping[str, Any], properties: Mapping[str, Any], where: str) -> None:
    if unknown := sorted(set(value) - set(properties), key=str):
        raise ManifestError(f"{where} has unknown keys {_shown(unknown)}; allowed: {sorted(properties)}.")
    if missing := sorted(set(properties) - set(value)):
        raise ManifestError(f"{where} lacks the keys {missing}.")
    for key, schema in properties.items():
        _check(value[key], schema, f"{where}.{key}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


# bool is an int to Python, not to a manifest.
_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "boolean": lambda value: isinstance(value, bool),
    "object": lambda value: isinstance(value, Mapping),
    "array": lambda value: isinstance(value, list),
    "null": lambda value: value is None,
}
_WORDS = {"string": "str", "integer": "int", "number": "int or float", "object": "an object", "array": "a list"}


def _blank() -> dict[str, Any]:
    """Every key, each with the value that says nothing."""
    manifest: dict[str, Any] = _neutral(JSON_SCHEMA)
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


def _neutral(schema: Mapping[str, Any]) -> Any:
    """Null where it is allowed, else the empty value of the type."""
    if "properties" in schema:
        return {name: _neutral(part) for name, part in schema["properties"].items()}
    kinds = schema.get("type", "string")
    empty = {"string": "", "integer": 0, "number": 0, "boolean": False, "array": [], "object": {}}
    return None if "null" in kinds else copy.copy(empty[kinds])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
