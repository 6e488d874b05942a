"""The two files of a selection, ``manifest.json`` and ``train.parquet``: never half-written, never trusted."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hf_eff.errors import ManifestError
from hf_eff.manifest.columns import text_lengths
from hf_eff.manifest.schema import check_manifest, check_values

MANIFEST, ROWS = "manifest.json", "train.parquet"
_NEW_MANIFEST, _NEW_ROWS = ".manifest.json.new", ".train.parquet.new"
MAX_MANIFEST_BYTES = 16 * 2**20
_MAX_TEXT_BYTES = {"row_hash": 32, "row_id": 1024, "reason": 1024}
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
    if file.stat().st_size > MAX_MANIFEST_BYTES:
        raise ManifestError(f"{file} is larger than a manifest may be ({MAX_MANIFEST_BYTES // 2**20} MiB).")
    try:
        text = file.read_text(encoding="utf-8")
        manifest = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_distinct_keys)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{file} is not valid JSON: {error}.") from None
    check_values(manifest)
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
    for name, limit in _MAX_TEXT_BYTES.items():
        _refuse_long(table, name, limit, "the selection")
    pq.write_table(table, folder / _NEW_ROWS, compression="zstd", use_dictionary=["reason"])
    complete["selection"] |= {"file": ROWS, "sha256": file_hash(folder / _NEW_ROWS)}
    (folder / _NEW_MANIFEST).write_text(manifest_text(complete), encoding="utf-8")
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
        if rows.is_file() and file_hash(rows) == manifest["selection"]["sha256"]:
            return manifest, _read_rows(rows, manifest["selection"]["num_selected"])
    raise ManifestError(
        f"{folder / ROWS} is missing, truncated or not the file that {MANIFEST} describes (SHA-256 differs); "
        "fetch or save the selection again."
    )


def rows_limit(num_selected: int) -> int:
    """Bytes that the rows file of so many rows may take: more is no selection."""
    return 16 * 2**20 + 4096 * max(0, num_selected)


def _read_rows(path: Path, expected: int) -> pa.Table:
    if path.stat().st_size > rows_limit(expected):
        raise ManifestError(f"{path} is larger than {expected} rows may be ({rows_limit(expected) / 2**20:.0f} MiB).")
    try:
        # As dictionaries, a text that is repeated a billion times costs no more than once.
        with pq.ParquetFile(path, read_dictionary=list(_MAX_TEXT_BYTES)) as file:
            if file.metadata.num_rows != expected:
                raise ManifestError(f"{path} has {file.metadata.num_rows} rows; its manifest says {expected}.")
            _check_columns(path, file.schema_arrow)
            table = file.read()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path} is not readable as Parquet: {' '.join(str(error).split())}.") from None
    if table.column("index").null_count:
        raise ManifestError(f"{path} has rows without an index.")
    if table.column("reason").null_count:
        raise ManifestError(f"{path} has rows without a reason.")
    for name, limit in _MAX_TEXT_BYTES.items():
        _refuse_long(table, name, limit, str(path))
    if table.column("rank").null_count or not np.array_equal(table.column("rank").to_numpy(), np.arange(expected)):
        raise ManifestError(f"{path} must hold its rows by rank, from 0 to {expected - 1}.")
    return table


def _check_columns(path: Path, schema: pa.Schema) -> None:
    found = {field.name: getattr(field.type, "value_type", field.type) for field in schema}
    if list(found.items()) != [(field.name, field.type) for field in COLUMNS] or len(found) != len(schema):
        raise ManifestError(f"{path} must have the columns {COLUMNS.names} in their types, got {schema.names}.")


def _refuse_long(table: pa.Table, name: str, limit: int, owner: str) -> None:
    if (longest := text_lengths(table.column(name))) > limit:
        raise ManifestError(f"{owner} has a {name} of {longest} bytes; {limit} are allowed.")


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
    except (TypeError, ValueError, RecursionError) as error:
        raise ManifestError(f"the manifest cannot be written as JSON: {error}.") from None


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """What ``manifest.json`` holds."""
    return canonical_json(manifest, indent=2) + "\n"


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
