"""A selection as data: which rows, why, from which dataset, by what, at what cost; never the rows themselves.

A folder holds ``manifest.json`` and ``train.parquet``, see ``schema`` and ``files``. Ten million rows take a few
hundred megabytes: nothing holds a Python object a row.
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_eff.errors import EffWarning, ManifestError, OptionError
from hf_eff.manifest.columns import HashColumn, TextColumn
from hf_eff.manifest.files import (
    COLUMNS,
    MANIFEST,
    ROWS,
    canonical_json,
    file_hash,
    manifest_text,
    read_manifest,
    read_pair,
    write_pair,
)
from hf_eff.manifest.matching import (
    ABSENT,
    TOO_FEW,
    RowFilter,
    RowView,
    changed_places,
    columns_of,
    content,
    content_digest,
    found_positions,
    hub_origin,
    taken,
)
from hf_eff.manifest.schema import build_manifest, check_manifest, describe_scores

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "MANIFEST",
    "ROWS",
    "RowView",
    "Selection",
    "SelectionMismatchWarning",
    "build_manifest",
    "describe_scores",
    "read_manifest",
]

Level = Literal["fast", "rows", "full"]
OnMismatch = Literal["error", "rematch", "warn"]
_LEVELS, _POLICIES = ("fast", "rows", "full"), ("error", "rematch", "warn")
_BLOCK = 2**16


class SelectionMismatchWarning(EffWarning):
    """Rows were taken by number from a dataset that is not the one they were chosen from."""


@dataclass(frozen=True, eq=False, repr=False)
class Selection:
    """Chosen rows of one dataset. A value: nothing about it changes after it was made.

    Attributes:
        indices: [k] int64 positions in the dataset, in order of preference, distinct.
        manifest: Where the choice comes from, in the format of ``manifest.json``.
        row_hashes: [k] content hashes of the chosen rows (``HashColumn``), or None where rows cannot be verified.
        scores: [k] float32 scores of the chosen rows, or None when the method does not score.
        weights: [k] float32 training weights, or None for equal weights.
        reasons: [k] one short reason each (``TextColumn``).
        row_ids: [k] the dataset's own ids (``TextColumn``), or None.
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
        for name, column in (("row_hashes", HashColumn), ("row_ids", TextColumn)):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, column.of(getattr(self, name)))
        reasons = TextColumn.of(self.reasons) if len(self.reasons) else TextColumn.repeated("", len(self))
        object.__setattr__(self, "reasons", reasons)
        check_manifest(self.manifest)
        self._check_values()

    def __len__(self) -> int:
        """Number of chosen rows."""
        return len(self.indices)

    def __repr__(self) -> str:
        """One line: the method, how much it kept, and the digest."""
        about, rows = self.manifest["selection"], self.manifest["dataset"]["num_rows"]
        return f"{type(self).__name__}({about['method']!r}, {len(self)} of {rows} rows, digest {self.digest[:12]})"

    @functools.cached_property
    def digest(self) -> str:
        """Identity of the choice: rows, weights, method, options, seed and dataset.

        Equal digests mean that training on either selection is the same run. Time stamps, costs
        and names do not enter.
        """
        about, data = self.manifest["selection"], self.manifest["dataset"]
        identity = {
            "indices": self.indices,
            "weights": self.weights,
            **{name: about[name] for name in ("method", "params", "seed")},
            "dataset": [data["num_rows"], data["digest"]],
        }
        digest = hashlib.blake2b(digest_size=16)
        for place, name in enumerate(sorted(identity)):
            digest.update(f"{', ' if place else '{'}{canonical_json(name)}: ".encode())
            _hash_json(digest, identity[name])
        digest.update(b"}")
        return digest.hexdigest()

    @functools.cached_property
    def identity(self) -> str:
        """SHA-256 of ``manifest.json`` as ``save`` writes it: what a descendant names as its parent."""
        if self.manifest["selection"]["sha256"]:
            return hashlib.sha256(manifest_text(self.manifest).encode()).hexdigest()
        with tempfile.TemporaryDirectory() as folder:
            return file_hash(self.save(folder) / MANIFEST)

    def verify(self, dataset: Any, level: Level = "rows") -> None:
        """Check that ``dataset`` is the one the rows were chosen from.

        Args:
            dataset: ``datasets.Dataset`` or any sequence of mappings.
            level: ``"fast"`` compares names: repository and revision (where both are known), columns and number of
                rows. ``"rows"`` hashes the chosen rows. ``"full"`` hashes every row and compares their order too.

        Raises:
            ManifestError: It differs; the message says in what.
            OptionError: ``level`` is not known.
        """
        if problem := self._difference(dataset, level):
            raise ManifestError(problem)

    def apply(self, dataset: Any, *, on_mismatch: OnMismatch = "error", level: Level = "rows") -> Any:
        """The chosen rows of ``dataset``, verified.

        Args:
            dataset: ``datasets.Dataset``, any sequence of mappings, or a stream
                (``datasets.IterableDataset``). A stream keeps its order: rows are matched by
                content as they pass, and rows that never come are not missed.
            on_mismatch: ``"error"``; ``"rematch"`` to find the chosen rows by their ids, or else by content, in a
                shuffled, filtered or extended copy; ``"warn"`` to take them by number all the same.
            level: How much to verify, see ``verify``.

        Raises:
            ManifestError: The dataset differs, or chosen rows are not in it.
            OptionError: ``on_mismatch`` or ``level`` is not known.
        """
        if not hasattr(dataset, "__len__"):
            _check_one_of("on_mismatch", on_mismatch, _POLICIES)
            return self._matching(dataset)
        return taken(dataset, self.locate(dataset, on_mismatch=on_mismatch, level=level))

    def locate(self, dataset: Any, *, on_mismatch: OnMismatch = "error", level: Level = "rows") -> np.ndarray:
        """[k] positions of the chosen rows in ``dataset``; see ``apply``.

        Raises:
            ManifestError: The dataset differs, or chosen rows are not in it.
            OptionError: ``on_mismatch`` or ``level`` is not known.
        """
        _check_one_of("on_mismatch", on_mismatch, _POLICIES)
        problem = self._difference(dataset, level, explain=on_mismatch != "rematch")
        if problem is None:
            return self.indices
        if on_mismatch == "rematch":
            return self._found(dataset)
        if on_mismatch == "error" or (len(self) and self.indices.max() >= len(dataset)):
            raise ManifestError(problem)
        warnings.warn(SelectionMismatchWarning(f"{problem} Its rows are taken by number."), stacklevel=3)
        return self.indices

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
        hashes, ids = _whole(table, "row_hash"), _whole(table, "row_id")
        scores, weights = _whole(table, "score"), _whole(table, "weight")
        return cls(
            indices=table.column("index").to_numpy(),
            manifest=manifest,
            row_hashes=None if hashes is None else HashColumn.of(hashes),
            scores=None if scores is None else scores.to_numpy(),
            weights=None if weights is None else weights.to_numpy(),
            reasons=TextColumn(table.column("reason")),
            row_ids=None if ids is None else TextColumn.of(ids),
        )

    def _table(self) -> pa.Table:
        count, phase = len(self), self.manifest["selection"]["phases"]
        columns = {
            "index": pa.array(self.indices),
            "row_hash": None if self.row_hashes is None else HashColumn.of(self.row_hashes).arrow(),
            "row_id": None if self.row_ids is None else TextColumn.of(self.row_ids).arrow(),
            "score": None if self.scores is None else pa.array(self.scores),
            "weight": None if self.weights is None else pa.array(self.weights),
            "rank": pa.array(np.arange(count, dtype=np.int32)),
            "phase": pa.array(np.full(count, phase[-1]["phase"] if phase else 0, dtype=np.int32)),
            "reason": TextColumn.of(self.reasons).arrow(),
        }
        filled = {name: pa.nulls(count, COLUMNS.field(name).type) if c is None else c for name, c in columns.items()}
        return pa.table(filled, schema=COLUMNS)

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

    def _difference(self, dataset: Any, level: Level, *, explain: bool = True) -> str | None:
        """What tells ``dataset`` from the one that was selected from, in one sentence, or None.

        ``explain`` looks through all rows for the chosen ones, to tell an edit from a shuffle.
        """
        _check_one_of("level", level, _LEVELS)
        about = self.manifest["dataset"]
        columns = columns_of(dataset, about["columns"])
        moved = self._other_origin(dataset)
        prefix = f"{moved}, and " if moved else ""
        if len(dataset) != about["num_rows"]:
            return f"{prefix}the dataset has {len(dataset)} rows; the selection was made from {about['num_rows']}."
        if level == "fast":
            return f"{moved}." if moved else None
        if self.row_hashes is None:
            return None
        wrong = changed_places(HashColumn.of(self.row_hashes), dataset, columns, self.indices)
        if len(wrong):
            return prefix + (self._describe(wrong, dataset, columns) if explain else f"{len(wrong)} rows differ.")
        if level == "full" and content_digest(dataset, columns) != about["digest"]:
            return f"{prefix}the chosen rows are the same, but other rows of the dataset have changed or moved."
        return None

    def _other_origin(self, dataset: Any) -> str | None:
        """In what the names of the two datasets differ, where both are known."""
        about, (repo, _, revision) = self.manifest["dataset"], hub_origin(dataset)
        if repo is None or about["repo_id"] is None:
            return None
        if repo != about["repo_id"]:
            return f"the dataset is {repo}; the selection was made from {about['repo_id']}"
        if revision != about["revision"] and about["revision"] is not None:
            return f"the dataset is {repo} at revision {revision}; the selection was made at {about['revision']}"
        return None

    def _describe(self, wrong: np.ndarray, dataset: Any, columns: Sequence[str] | None) -> str:
        if (found_positions(HashColumn.of(self.row_hashes), content(dataset, columns)) != ABSENT).all():
            return (
                f"the dataset holds the chosen rows in another order, as a shuffled copy would ({len(wrong)} of "
                f"{len(self)} are elsewhere); pass the original or on_mismatch='rematch'."
            )
        first = ", ".join(str(self.indices[i]) for i in wrong[:5])
        more = ", ..." if len(wrong) > 5 else ""
        return f"{len(wrong)} of {len(self)} chosen rows have another content than when selected: row {first}{more}."

    def _found(self, dataset: Any) -> np.ndarray:
        """[k] positions of the chosen rows, by id where the dataset has ids, else by content."""
        columns = columns_of(dataset, self.manifest["dataset"]["columns"])
        name = self.manifest["dataset"]["preprocess"].get("id_column")
        if self.row_ids is not None and name in (getattr(dataset, "column_names", None) or ()):
            return self._found_by_id(dataset, name, columns)
        if self.row_hashes is None:
            raise ManifestError("this selection has neither row hashes nor ids, so its rows cannot be found elsewhere.")
        found = found_positions(HashColumn.of(self.row_hashes), content(dataset, columns))
        if len(lost := self.indices[found == ABSENT]):
            raise ManifestError(
                f"{len(lost)} of {len(self)} chosen rows are not in the dataset; the first was row {lost[0]}."
            )
        if (found == TOO_FEW).any():
            raise ManifestError("the dataset holds fewer copies of a repeated row than were chosen.")
        return found

    def _found_by_id(self, dataset: Any, name: str, columns: Sequence[str] | None) -> np.ndarray:
        """[k] positions of the rows with the chosen ids, whose content must be what it was."""
        ids = TextColumn.of([str(value) for value in dataset[name]]).arrow()
        if len(ids.unique()) != len(ids):
            raise ManifestError(f"the ids in column {name!r} of the dataset repeat, so rows cannot be found by them.")
        wanted = TextColumn.of(self.row_ids).arrow()
        found = pc.index_in(wanted, value_set=ids)
        if found.null_count:
            lost = wanted.filter(found.is_null())[0].as_py()
            raise ManifestError(f"{found.null_count} of {len(self)} chosen rows are not in the dataset: id {lost!r}.")
        positions = found.to_numpy().astype(np.int64)
        if self.row_hashes is not None:
            wrong = changed_places(HashColumn.of(self.row_hashes), dataset, columns, positions)
            if len(wrong):
                raise ManifestError(
                    f"{len(wrong)} of {len(self)} chosen rows have another content than when selected: "
                    f"id {wanted[int(wrong[0])].as_py()!r}."
                )
        return positions

    def _matching(self, stream: Any) -> Any:
        if self.row_hashes is None:
            raise ManifestError("this selection has no row hashes, so its rows cannot be found in a stream.")
        columns = columns_of(stream, self.manifest["dataset"]["columns"])
        return stream.filter(RowFilter.of(HashColumn.of(self.row_hashes), columns))


def _whole(table: pa.Table, name: str) -> pa.ChunkedArray | None:
    """A column that has a value for every row, or None where it has none at all."""
    column = table.column(name)
    if column.null_count == len(column):
        return None
    if column.null_count:
        raise ManifestError(f"{column.null_count} of {len(column)} rows have no {name}; a column is whole or absent.")
    return column


def _check_one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise OptionError(f"{name} must be one of {list(allowed)}, got {value!r}.")


def _hash_json(digest: Any, value: Any) -> None:
    """Feed a value's canonical JSON to a hash; arrays block by block."""
    if not isinstance(value, np.ndarray):
        digest.update(canonical_json(value).encode())
        return
    digest.update(b"[")
    for start in range(0, len(value), _BLOCK):
        text = canonical_json(value[start : start + _BLOCK].tolist())[1:-1]
        digest.update((", " if start else "").encode() + text.encode())
    digest.update(b"]")
