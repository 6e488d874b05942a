"""A selection as data: which rows, why, from which dataset, by what, at what cost; never the rows themselves.

A folder holds ``manifest.json`` and ``train.parquet``, see ``schema`` and ``files``.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from hf_eff.errors import ManifestError, OptionError
from hf_eff.manifest.files import COLUMNS, MANIFEST, ROWS, canonical_json, read_manifest, read_pair, write_pair
from hf_eff.manifest.schema import build_manifest, check_manifest, describe_scores
from hf_eff.numerics.row_hash import hash_of_hashes, row_hash, row_hashes

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["MANIFEST", "ROWS", "RowView", "Selection", "build_manifest", "describe_scores", "read_manifest"]


@dataclass(frozen=True, eq=False, repr=False)
class Selection:
    """Chosen rows of one dataset. A value: nothing about it changes after it was made.

    Attributes:
        indices: [k] int64 positions in the dataset, in order of preference, distinct.
        manifest: Where the choice comes from, in the format of ``manifest.json``.
        row_hashes: [k] content hashes of the chosen rows, or None where rows cannot be verified.
        scores: [k] float32 scores of the chosen rows, or None when the method does not score.
        weights: [k] float32 training weights, or None for equal weights.
        reasons: [k] one short reason each.
        row_ids: [k] the dataset's own ids, or None.
        all_scores: [N] scores of every candidate, in memory only; NaN where invalid.

    Raises:
        ManifestError: The parts contradict each other.
    """

    indices: np.ndarray
    manifest: Mapping[str, Any]
    row_hashes: Sequence[str] | None = None
    scores: np.ndarray | None = None
    weights: np.ndarray | None = None
    reasons: Sequence[str] = ()
    row_ids: Sequence[str] | None = None
    all_scores: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Fix the types that a file would have, and check ranges."""
        object.__setattr__(self, "indices", np.asarray(self.indices, dtype=np.int64))
        for name in ("scores", "weights"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float32))
        object.__setattr__(self, "reasons", list(self.reasons) or [""] * len(self))
        check_manifest(self.manifest)
        self._check_values()

    def __len__(self) -> int:
        """Number of chosen rows."""
        return len(self.indices)

    def __repr__(self) -> str:
        """One line: the method, how much it kept, and the digest."""
        about, rows = self.manifest["selection"], self.manifest["dataset"]["num_rows"]
        return f"{type(self).__name__}({about['method']!r}, {len(self)} of {rows} rows, digest {self.digest[:12]})"

    @property
    def digest(self) -> str:
        """Identity of the choice: rows, weights, method, options, seed and dataset.

        Equal digests mean that training on either selection is the same run. Time stamps, costs
        and names do not enter.
        """
        about, data = self.manifest["selection"], self.manifest["dataset"]
        identity = {
            "indices": self.indices.tolist(),
            "weights": None if self.weights is None else self.weights.tolist(),
            **{name: about[name] for name in ("method", "params", "seed")},
            "dataset": [data["num_rows"], data["digest"]],
        }
        return hashlib.blake2b(canonical_json(identity).encode(), digest_size=16).hexdigest()

    def verify(self, dataset: Any, *, full: bool = False) -> None:
        """Check that ``dataset`` is the one the rows were chosen from.

        Args:
            dataset: ``datasets.Dataset`` or any sequence of mappings.
            full: Hash every row and compare their order too, instead of the chosen rows only.

        Raises:
            ManifestError: It differs; the message says in what.
        """
        if problem := self._difference(dataset, full=full):
            raise ManifestError(problem)

    def apply(self, dataset: Any, *, on_mismatch: Literal["error", "rematch"] = "error") -> Any:
        """The chosen rows of ``dataset``, verified by content.

        Args:
            dataset: ``datasets.Dataset``, any sequence of mappings, or a stream
                (``datasets.IterableDataset``). A stream keeps its order: rows are matched by
                content as they pass, and rows that never come are not missed.
            on_mismatch: ``"error"``, or ``"rematch"`` to find the chosen rows by content in a
                shuffled, filtered or extended copy.

        Raises:
            ManifestError: The dataset differs, or chosen rows are not in it.
            OptionError: ``on_mismatch`` is not known.
        """
        if on_mismatch not in ("error", "rematch"):
            raise OptionError(f"on_mismatch must be 'error' or 'rematch', got {on_mismatch!r}.")
        if not hasattr(dataset, "__len__"):
            return self._matching(dataset)
        indices = self.indices
        if problem := self._difference(dataset):
            if on_mismatch == "error":
                raise ManifestError(problem)
            indices = self._found_by_content(dataset)
        return dataset.select(indices) if hasattr(dataset, "select") else RowView(dataset, indices)

    def save(self, directory: str | Path) -> Path:
        """Write ``manifest.json`` and ``train.parquet``; an older pair stays whole until both are complete.

        Returns:
            The folder.
        """
        write_pair(Path(directory), self.manifest, self._table())
        return Path(directory)

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Read a folder that ``save`` wrote, trusting nothing in it.

        A manifest that is malformed, incomplete, does not fit its rows or points outside the
        folder raises ``ManifestError``.
        """
        manifest, table = read_pair(Path(directory))
        rows = table.to_pydict()
        return cls(
            indices=np.asarray(rows["index"], dtype=np.int64),
            manifest=manifest,
            row_hashes=_optional(rows["row_hash"]),
            scores=_optional(rows["score"], np.float32),
            weights=_optional(rows["weight"], np.float32),
            reasons=[reason or "" for reason in rows["reason"]],
            row_ids=_optional(rows["row_id"]),
        )

    def _table(self) -> pa.Table:
        count = len(self)
        return pa.table(
            {
                "index": self.indices,
                "row_hash": self.row_hashes if self.row_hashes is not None else [None] * count,
                "row_id": self.row_ids if self.row_ids is not None else [None] * count,
                "score": self.scores if self.scores is not None else [None] * count,
                "weight": self.weights if self.weights is not None else [None] * count,
                "rank": np.arange(count),
                "phase": np.zeros(count, dtype=np.int32),
                "reason": list(self.reasons),
            },
            schema=COLUMNS,
        )

    def _check_values(self) -> None:
        about, num_rows = self.manifest["selection"], self.manifest["dataset"]["num_rows"]
        if about["num_selected"] != len(self):
            raise ManifestError(f"manifest says num_selected={about['num_selected']}, but there are {len(self)} rows.")
        if len(self) and (self.indices.min() < 0 or self.indices.max() >= num_rows):
            worst = self.indices[(self.indices < 0) | (self.indices >= num_rows)][0]
            raise ManifestError(f"index {worst} is outside the dataset of {num_rows} rows.")
        if len(np.unique(self.indices)) != len(self):
            raise ManifestError("indices repeat; a selection takes every row at most once.")
        for name in ("row_hashes", "scores", "weights", "reasons", "row_ids"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self):
                raise ManifestError(f"{len(values)} {name} do not fit {len(self)} indices.")
        if self.weights is not None and not (np.isfinite(self.weights).all() and (self.weights >= 0).all()):
            raise ManifestError("weights must be finite and not negative.")

    def _columns(self, dataset: Any) -> Sequence[str] | None:
        """Columns that count. A dataset without one of them cannot be verified."""
        columns: Sequence[str] | None = self.manifest["dataset"]["columns"]
        present = getattr(dataset, "column_names", None)
        if present is None and len(dataset):
            present = list(dataset[0])
        missing = [name for name in columns or () if present is not None and name not in present]
        if missing:
            raise ManifestError(f"the dataset lacks the columns {missing}; it has {sorted(present or ())}.")
        return columns

    def _difference(self, dataset: Any, *, full: bool = False) -> str | None:
        """What tells ``dataset`` from the one that was selected from, or None."""
        about = self.manifest["dataset"]
        columns = self._columns(dataset)
        if len(dataset) != about["num_rows"]:
            return f"the dataset has {len(dataset)} rows; the selection was made from {about['num_rows']}."
        if self.row_hashes is None:
            return None
        found = row_hashes(_rows(dataset, self.indices), columns)
        wrong = [i for i, (a, b) in enumerate(zip(found, self.row_hashes, strict=True)) if a != b]
        if wrong:
            return self._describe(wrong, dataset, columns)
        if full and hash_of_hashes(row_hashes(dataset, columns)) != about["digest"]:
            return "the chosen rows are the same, but other rows of the dataset have changed or moved."
        return None

    def _describe(self, wrong: Sequence[int], dataset: Any, columns: Sequence[str] | None) -> str:
        assert self.row_hashes is not None  # noqa: S101 - only called after comparing hashes
        if set(self.row_hashes) <= set(row_hashes(dataset, columns)):
            return (
                f"the dataset holds the chosen rows in another order, as a shuffled copy would ({len(wrong)} of "
                f"{len(self)} are elsewhere); pass the original or on_mismatch='rematch'."
            )
        first = ", ".join(str(self.indices[i]) for i in wrong[:5])
        more = ", ..." if len(wrong) > 5 else ""
        return f"{len(wrong)} of {len(self)} chosen rows have another content than when selected: row {first}{more}."

    def _found_by_content(self, dataset: Any) -> np.ndarray:
        if self.row_hashes is None:
            raise ManifestError("this selection has no row hashes, so its rows cannot be found by content.")
        places: dict[str, deque[int]] = defaultdict(deque)
        for position, value in enumerate(row_hashes(dataset, self._columns(dataset))):
            places[value].append(position)
        lost = [int(i) for i, value in zip(self.indices, self.row_hashes, strict=True) if value not in places]
        if lost:
            raise ManifestError(
                f"{len(lost)} of {len(self)} chosen rows are not in the dataset; the first was row {lost[0]}."
            )
        try:
            # Equal rows are interchangeable, but each is taken once.
            return np.array([places[value].popleft() for value in self.row_hashes], dtype=np.int64)
        except IndexError:
            raise ManifestError("the dataset holds fewer copies of a repeated row than were chosen.") from None

    def _matching(self, stream: Any) -> Any:
        if self.row_hashes is None:
            raise ManifestError("this selection has no row hashes, so its rows cannot be found in a stream.")
        return stream.filter(_RowFilter(frozenset(self.row_hashes), self.manifest["dataset"]["columns"]))


@dataclass(frozen=True)
class _RowFilter:
    """Picklable test of a row's content, for data loader workers."""

    wanted: frozenset[str]
    columns: Sequence[str] | None

    def __call__(self, row: Mapping[str, Any]) -> bool:
        return row_hash(row, self.columns) in self.wanted


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


def _optional(values: list[Any], dtype: Any = None) -> Any:
    if any(value is None for value in values) or not values:
        return None
    return values if dtype is None else np.asarray(values, dtype=dtype)


def _rows(dataset: Any, indices: np.ndarray) -> Any:
    return dataset.select(indices) if hasattr(dataset, "select") else RowView(dataset, indices)
