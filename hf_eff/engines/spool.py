"""A stream as a dataset on disk: read once, then mapped into memory row by row."""

from __future__ import annotations

import atexit
import itertools
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from datasets import Dataset, IterableDataset

from hf_eff.errors import DataError


def spooled(rows: Any, *, limit: int | None = None) -> Any:
    """Rows of a stream as a ``Dataset``; anything else as it is.

    The rows go to a temporary folder in chunks, so that a pool may be larger than memory; the folder goes when the
    process ends. The cache of ``datasets`` is not used: it knows a stream by its code, not by what it reads.

    Args:
        rows: An ``IterableDataset``, or rows of known length.
        limit: Rows to read of a stream; None reads to its end, which an endless one does not have.

    Raises:
        DataError: ``limit`` is below 1 or given for rows of known length, or the stream ends before its first row.
    """
    if not isinstance(rows, IterableDataset):
        if limit is not None:
            raise DataError(f"stream_rows={limit} is for a stream, and the pool has a length; take rows with select().")
        return rows
    if limit is not None and limit < 1:
        raise DataError(f"stream_rows must be at least 1, got {limit}.")
    features = rows.features

    def read() -> Iterator[dict[str, Any]]:
        yield from itertools.islice(iter(rows), limit)

    if next(read(), None) is None:
        raise DataError("the pool is empty: the stream ends before its first row.")
    folder = tempfile.mkdtemp(prefix="hf_eff-stream-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    dataset: Any = Dataset.from_generator(read, features=features, cache_dir=folder)
    return dataset
