"""A hash of a row's content, the same for a row from JSON, Parquet or a Python list.

A dataset's fingerprint depends on the path and age of its files; a row number says nothing about
the row. The hash of the row's canonical JSON ties a selection to the rows it was made from.

Canonical form: UTF-8 JSON with sorted keys and no spaces; floats in Python's shortest ``repr``;
dates and times in ISO 8601; durations in seconds; decimals as text; bytes as their SHA-256.
"""

from __future__ import annotations

import datetime as dt
import decimal
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from hf_eff.errors import DataError

ALGORITHM = "blake2b-128"
CANON = "json-sorted-compact-utf8/1"
_MEDIA = frozenset({"Image", "Audio", "Video", "Pdf", "Nifti"})
_BATCH = 1000


def row_hash(row: Mapping[str, Any], columns: Sequence[str] | None = None) -> str:
    """Hash of one row: 32 hexadecimal digits.

    Args:
        row: Values by column.
        columns: Columns that count; all of them without.

    >>> row_hash({"b": 1, "a": "x"}) == row_hash({"a": "x", "b": 1, "id": 7}, columns=["a", "b"])
    True
    """
    return _digest(_ENCODER.encode(dict(row) if columns is None else {name: row[name] for name in columns}))


def row_hashes(rows: Any, columns: Sequence[str] | None = None) -> list[str]:
    """Hash of every row of a ``datasets.Dataset`` or of any sequence of mappings.

    Args:
        rows: The rows, in order.
        columns: Columns that count; all of them without.

    Raises:
        DataError: A column holds images, audio, video or another type without a canonical form.
    """
    if not hasattr(rows, "with_format"):
        return [row_hash(rows[i], columns) for i in range(len(rows))]
    names = sorted(rows.column_names if columns is None else columns)
    for name in names:
        if _is_media(rows.features[name]):
            raise DataError(
                f"column {name!r} holds {rows.features[name]!r}, which has no canonical form; "
                "leave it out of columns or select from rows that refer to it by an id."
            )
    return [_digest(_ENCODER.encode(row)) for row in _plain_rows(rows.with_format(None), names)]


def hash_of_hashes(hashes: Iterable[str]) -> str:
    """One digest for rows in their order.

    >>> hash_of_hashes(["00" * 16, "11" * 16]) == hash_of_hashes(["11" * 16, "00" * 16])
    False
    """
    digest = hashlib.blake2b(digest_size=16)
    for value in hashes:
        digest.update(bytes.fromhex(value))
    return digest.hexdigest()


def _plain_rows(rows: Any, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    for batch in rows.select_columns(list(names)).iter(batch_size=_BATCH):
        for values in zip(*(batch[name] for name in names), strict=True):
            yield dict(zip(names, values, strict=True))


def _digest(text: str) -> str:
    # surrogatepass: text with a lone surrogate is legal in JSON and in Python, though not in UTF-8.
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _canonical(value: Any) -> Any:
    """JSON-able stand-in for a value that JSON does not know."""
    if isinstance(value, (dt.datetime, dt.date, dt.time)):
        return value.isoformat()
    if isinstance(value, dt.timedelta):
        return value.total_seconds()
    if isinstance(value, decimal.Decimal):
        return str(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {"sha256": hashlib.sha256(value).hexdigest()}
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "tolist"):  # arrays and tensors of any library, and their scalars
        return value.tolist()
    raise DataError(f"a value of type {type(value).__name__} has no canonical form; leave its column out of columns.")


def _is_media(feature: Any) -> bool:
    if isinstance(feature, Mapping):
        return any(_is_media(inner) for inner in feature.values())
    if isinstance(feature, (list, tuple)):
        return any(_is_media(inner) for inner in feature)
    return type(feature).__name__ in _MEDIA or _is_media(getattr(feature, "feature", ()))


_ENCODER = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=_canonical)
