"""The two files of a selection, ``manifest.json`` and ``train.parquet``: never half-written, never trusted."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hf_eff.errors import ManifestError
from hf_eff.manifest.schema import check_manifest

MANIFEST, ROWS = "manifest.json", "train.parquet"
_NEW_MANIFEST, _NEW_ROWS = ".manifest.json.new", ".train.parquet.new"
_MAX_MANIFEST_BYTES = 16 * 2**20
COLUMNS = pa.schema(
    [
        ("index", pa.int64()),
        ("row_hash", pa.string()),
        ("row_id", pa.string()),
        ("score", pa.float32()),
        ("weight", pa.float32()),
        ("rank", pa.int32()),
        ("phase", pa.int32()),
        ("reason", pa.string()),
    ]
)


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Read and check a ``manifest.json``.

    Raises:
        ManifestError: The file is missing, too large, no strict JSON, or does not fit the schema.
    """
    file = Path(path)
    if not file.is_file() or file.is_symlink():
        raise ManifestError(f"{file} is not a manifest file.")
    if file.stat().st_size > _MAX_MANIFEST_BYTES:
        raise ManifestError(f"{file} is larger than a manifest may be ({_MAX_MANIFEST_BYTES // 2**20} MiB).")
    try:
        text = file.read_text(encoding="utf-8")
        manifest = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_distinct_keys)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{file} is not valid JSON: {error}.") from None
    check_manifest(manifest)
    return dict(manifest)


def write_pair(folder: Path, manifest: Mapping[str, Any], table: pa.Table) -> None:
    """Write both files; an older pair stays whole until both new ones are complete.

    A manifest that JSON cannot say, NaN included, raises ``ManifestError``.

    Args:
        folder: Created when needed.
        manifest: Gets the name and hash of the rows file.
        table: Rows with the columns ``COLUMNS``.
    """
    complete = json.loads(canonical_json(manifest))
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / _NEW_ROWS)
    complete["selection"] |= {"file": ROWS, "sha256": _sha256(folder / _NEW_ROWS)}
    (folder / _NEW_MANIFEST).write_text(canonical_json(complete, indent=2) + "\n", encoding="utf-8")
    for name in (_NEW_ROWS, _NEW_MANIFEST):
        _flush(folder / name)
    # Stopped between these two, read_pair finds rows that fit the new manifest only, and takes that.
    os.replace(folder / _NEW_ROWS, folder / ROWS)
    os.replace(folder / _NEW_MANIFEST, folder / MANIFEST)


def read_pair(folder: Path) -> tuple[dict[str, Any], pa.Table]:
    """The manifest and the rows that belong together.

    Raises:
        ManifestError: The folder holds no such pair, or one of the two is malformed.
    """
    if not (folder / MANIFEST).is_file() and not (folder / _NEW_MANIFEST).is_file():
        raise ManifestError(f"{folder} holds no {MANIFEST}.")
    for name in (MANIFEST, _NEW_MANIFEST):
        if not (folder / name).is_file():
            continue
        manifest = read_manifest(folder / name)
        rows = _inside(folder, manifest["selection"]["file"])
        if rows.is_file() and _sha256(rows) == manifest["selection"]["sha256"]:
            return manifest, _read_rows(rows, manifest["selection"]["num_selected"])
    raise ManifestError(
        f"{folder / ROWS} is missing, truncated or not the file that {MANIFEST} describes (SHA-256 differs); "
        "fetch or save the selection again."
    )


def _read_rows(path: Path, expected: int) -> pa.Table:
    try:
        with pq.ParquetFile(path) as file:
            if file.metadata.num_rows != expected:
                raise ManifestError(f"{path} has {file.metadata.num_rows} rows; its manifest says {expected}.")
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise ManifestError(f"{path} is not readable as Parquet: {error}.") from None
    if not table.schema.equals(COLUMNS):
        raise ManifestError(f"{path} must have the columns {COLUMNS.names} in their types, got {table.schema.names}.")
    if table.column("index").null_count:
        raise ManifestError(f"{path} has rows without an index.")
    return table


def _inside(folder: Path, name: str) -> Path:
    """Path of ``name`` directly in ``folder``: no separators, parents, drives or links."""
    path = folder / name
    if not name or name.startswith(".") or set(name) & set("/\\:") or path.is_symlink():
        raise ManifestError(f"manifest.selection.file must be a plain file name in the same folder, got {name!r}.")
    return path


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError(f"a key is repeated among {[key for key, _ in pairs]}")
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def canonical_json(value: Any, indent: int | None = None) -> str:
    """JSON with sorted keys.

    Raises:
        ManifestError: The value holds NaN or a type that JSON does not know.
    """
    try:
        return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, indent=indent)
    except (TypeError, ValueError) as error:
        raise ManifestError(f"the manifest cannot be written as JSON: {error}.") from None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
