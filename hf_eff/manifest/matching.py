"""Which rows of a dataset are the chosen ones: compared by content in blocks, found by content in one sort.

Nothing here holds a Python object a row: content hashes are 16 bytes each.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_eff.errors import ManifestError
from hf_eff.manifest.columns import HashColumn
from hf_eff.numerics.row_hash import row_hash, row_hashes

_BLOCK = 50_000
_HUB_CACHE = re.compile(
    r"[/\\](?P<user>[\w.-]+)___(?P<name>[\w.-]+)[/\\](?P<config>[^/\\]+)[/\\][^/\\]+[/\\](?P<revision>[0-9a-f]{40})"
    r"[/\\](?!cache-)[^/\\]+\.arrow$"
)
"""Where ``datasets`` keeps a split of a Hub dataset, as it came; ``cache-*`` files hold what ``map`` made of it."""
ABSENT, TOO_FEW = -1, -2


class RowView(Sequence[Any]):
    """Some rows of a sequence, by position; a map-style dataset for a data loader."""

    def __init__(self, rows: Any, indices: np.ndarray) -> None:
        self.rows, self.indices = rows, indices

    def __len__(self) -> int:
        """Number of rows shown."""
        return len(self.indices)

    def __getitem__(self, position: Any) -> Any:
        """One row; a slice gives a view."""
        if isinstance(position, slice):
            return RowView(self.rows, self.indices[position])
        return self.rows[int(self.indices[position])]


def taken(dataset: Any, indices: np.ndarray) -> Any:
    """Rows of a dataset by position."""
    return dataset.select(indices) if hasattr(dataset, "select") else RowView(dataset, indices)


def hub_origin(dataset: Any) -> tuple[str | None, str | None, str | None]:
    """Repository, configuration and revision of a dataset that is a Hub split unchanged, else three times None."""
    if getattr(dataset, "_indices", None) is not None:
        return None, None, None
    files = [_HUB_CACHE.search(entry["filename"]) for entry in getattr(dataset, "cache_files", None) or ()]
    origins = {(f"{match['user']}/{match['name']}", match["config"], match["revision"]) for match in files if match}
    return origins.pop() if len(origins) == 1 and all(files) else (None, None, None)


def columns_of(dataset: Any, wanted: Sequence[str] | None) -> Sequence[str] | None:
    """The columns that count, once they are known to be there.

    Raises:
        ManifestError: The dataset lacks one.
    """
    present = getattr(dataset, "column_names", None)
    if present is None and hasattr(dataset, "__len__") and len(dataset):
        present = list(dataset[0])
    missing = [name for name in wanted or () if present is not None and name not in present]
    if missing:
        raise ManifestError(f"the dataset lacks the columns {missing}; it has {sorted(present or ())}.")
    return wanted


def content(dataset: Any, columns: Sequence[str] | None) -> HashColumn:
    """Content hashes of all rows."""
    codes = np.empty((len(dataset), 16), dtype=np.uint8)
    for start, block in _blocks(dataset, columns, len(dataset)):
        codes[start : start + len(block)] = block
    return HashColumn(codes)


def content_digest(dataset: Any, columns: Sequence[str] | None) -> str:
    """One digest for all rows in their order; equals ``hash_of_hashes`` of their hashes."""
    digest = hashlib.blake2b(digest_size=16)
    for _, block in _blocks(dataset, columns, len(dataset)):
        digest.update(block.tobytes())
    return digest.hexdigest()


def changed_places(
    hashes: HashColumn, dataset: Any, columns: Sequence[str] | None, positions: np.ndarray
) -> np.ndarray:
    """Places whose row of the dataset has another content, in the order of the dataset.

    Args:
        hashes: [k] expected content.
        dataset: Where to look.
        columns: Columns that count.
        positions: [k] row of the dataset for each hash.
    """
    # Rows are read in the order in which they lie on disk.
    order = np.argsort(positions, kind="stable")
    wrong = []
    for start, block in _blocks(dataset, columns, len(order), positions[order]):
        places = order[start : start + len(block)]
        wrong.append(places[(hashes.codes[places] != block).any(axis=1)])
    return np.concatenate(wrong) if wrong else np.empty(0, dtype=np.int64)


def found_positions(wanted: HashColumn, held: HashColumn) -> np.ndarray:
    """[k] where each wanted row lies among the held ones.

    Equal rows are interchangeable, but each is taken once, the first first.

    Args:
        wanted: [k] content to find.
        held: [N] content to look in.

    Returns:
        [k] int64 positions; ``ABSENT`` where no such row is held, ``TOO_FEW`` where its copies have run out.
    """
    first, second = _keys(np.concatenate([wanted.codes, held.codes]))
    # A stable sort: within a group of equal rows the wanted ones come first, then the held ones, each in order.
    order = np.lexsort((second, first))
    changes = (np.diff(first[order]) != 0) | (np.diff(second[order]) != 0)
    group = np.concatenate([[0], np.cumsum(changes)]) if len(order) else np.empty(0, dtype=np.int64)
    ours = order < len(wanted)
    sizes = np.bincount(group)
    asked = np.bincount(group, weights=ours).astype(np.int64)
    starts = np.cumsum(sizes) - sizes
    places = np.flatnonzero(ours)
    member = group[places]
    copy = places - starts[member]
    available = (sizes - asked)[member]
    partner = np.minimum(starts[member] + asked[member] + copy, len(order) - 1)
    found = np.where(copy < available, order[partner] - len(wanted), np.where(available == 0, ABSENT, TOO_FEW))
    result = np.empty(len(wanted), dtype=np.int64)
    result[order[places]] = found
    return result


@dataclass(frozen=True)
class RowFilter:
    """Picklable test of a row's content, for streams and data loader workers.

    Attributes:
        first: [k] sorted first halves of the wanted hashes.
        second: [k] second halves, sorted within equal first halves.
        columns: Columns that count.
    """

    first: np.ndarray
    second: np.ndarray
    columns: Sequence[str] | None

    @classmethod
    def of(cls, hashes: HashColumn, columns: Sequence[str] | None) -> RowFilter:
        """A test for the rows with these hashes."""
        first, second = _keys(hashes.codes)
        order = np.lexsort((second, first))
        return cls(first[order], second[order], columns)

    def __call__(self, row: Mapping[str, Any]) -> bool:
        """Whether the row is a wanted one.

        Raises:
            ManifestError: The row lacks a column that counts.
        """
        if missing := [name for name in self.columns or () if name not in row]:
            raise ManifestError(f"the dataset lacks the columns {missing}; it has {sorted(row)}.")
        code = np.frombuffer(bytes.fromhex(row_hash(row, self.columns)), dtype=">u8").astype(np.uint64)
        place = int(np.searchsorted(self.first, code[0]))
        while place < len(self.first) and self.first[place] == code[0]:
            if self.second[place] == code[1]:
                return True
            place += 1
        return False


def _keys(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    halves = codes.view(">u8").astype(np.uint64)
    return halves[:, 0], halves[:, 1]


def _blocks(
    dataset: Any, columns: Sequence[str] | None, count: int, positions: np.ndarray | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Hash block after block.

    Yields:
        Number of the block's first row, and its [b, 16] hashes.
    """
    for start in range(0, count, _BLOCK):
        places = (
            np.arange(start, min(start + _BLOCK, count)) if positions is None else positions[start : start + _BLOCK]
        )
        hashes = row_hashes(taken(dataset, places), columns)
        yield start, np.frombuffer(bytes.fromhex("".join(hashes)), dtype=np.uint8).reshape(-1, 16)
