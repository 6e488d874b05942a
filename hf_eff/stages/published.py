"""Selections that somebody published: found by address, read without trust, used in place of selecting.

An address is ``hub:user/repo``, ``hub:user/repo/name`` or ``hub:user/repo/name@revision``, or the path of a folder.
"""

from __future__ import annotations

import functools
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from hf_eff import hub
from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.selection import Pool, SelectionContext
from hf_eff.contracts.spec import MethodConfig, MethodSpec, Traits, knob
from hf_eff.errors import ManifestError, OptionError
from hf_eff.manifest import MANIFEST, ROWS, Selection, read_manifest
from hf_eff.manifest.card import FOLDER
from hf_eff.manifest.columns import HashColumn
from hf_eff.manifest.files import MAX_MANIFEST_BYTES, rows_limit
from hf_eff.manifest.matching import changed_places, columns_of, content, found_positions
from hf_eff.manifest.provenance import AdoptedPicks

SCHEME = "hub:"
_NAME = re.compile(r"[\w-][\w.-]*")
_PUBLISHED = TypeVar("_PUBLISHED", bound=Selection)


@dataclass(frozen=True)
class Address:
    """Where a selection is published.

    Attributes:
        source: Hub dataset repository, or a folder.
        name: Which selection of it; None where it holds one.
        revision: Branch, tag or commit; None for the main branch.
    """

    source: str
    name: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read an address.

        Raises:
            OptionError: It is neither a folder nor ``hub:user/repo[/name][@revision]``.

        >>> Address.parse("hub:user/pool/less-5pct@v1")
        Address(source='user/pool', name='less-5pct', revision='v1')
        """
        if not text.startswith(SCHEME) and text and Path(text).is_dir():
            return cls(text)
        path, _, revision = text.removeprefix(SCHEME).partition("@")
        parts = path.split("/")
        if not text.startswith(SCHEME) or len(parts) not in (2, 3) or not all(map(_NAME.fullmatch, parts)):
            raise OptionError(
                f"selection={text!r} is no folder and no address; published selections are addressed as "
                "'hub:user/repo', 'hub:user/repo/name' or 'hub:user/repo/name@revision'."
            )
        return cls("/".join(parts[:2]), parts[2] if len(parts) == 3 else None, revision or None)


def plain_name(name: str) -> str:
    """The name of a selection, once it is known to be one.

    Raises:
        OptionError: It holds something else than letters, digits, ``-``, ``_`` and ``.``.
    """
    if not _NAME.fullmatch(name) or not name.isascii():
        raise OptionError(f"a selection's name may hold letters, digits, '-', '_' and '.', got {name!r}.")
    return name


def read_published(kind: type[_PUBLISHED], address: Address, token: str | None = None) -> _PUBLISHED:
    """Read a selection from the Hub or a folder.

    Args:
        kind: Class of the result.
        address: Where it is; a folder is one that ``save`` wrote, that of a run, or a copy of a repository.
        token: Access token; None for the one that is logged in.

    Raises:
        ManifestError: There is no such selection, or it is not intact.
        HubError: The Hub cannot be reached or refuses.
    """
    if Path(address.source).is_dir():
        return kind.load(_local(Path(address.source), address.name))
    name = _found_name(address, token)
    with tempfile.TemporaryDirectory() as folder:
        try:
            return kind.load(_pulled(address, name, Path(folder) / "cached", token))
        except ManifestError:
            if hub.is_offline():
                raise
        # What the cache holds may have been damaged on its way; the Hub's own copy is asked for once more.
        return kind.load(_pulled(address, name, Path(folder) / "fresh", token, fresh=True))


def read_published_manifest(address: Address, token: str | None = None) -> dict[str, Any]:
    """The manifest alone: a few kilobytes. Raises as ``read_published`` does."""
    if Path(address.source).is_dir():
        return read_manifest(_local(Path(address.source), address.name) / MANIFEST)
    name = _found_name(address, token)
    with tempfile.TemporaryDirectory() as folder:
        return read_manifest(_pulled(address, name, Path(folder), token, rows=False) / MANIFEST)


def _local(folder: Path, name: str | None) -> Path:
    for place in (folder, folder / "selection"):
        if name is None and (place / MANIFEST).is_file():
            return place
    if not (folder / FOLDER).is_dir():
        return folder  # which says what is missing
    return folder / FOLDER / _only([path.parent.name for path in folder.glob(f"{FOLDER}/*/{MANIFEST}")], name, folder)


def _found_name(address: Address, token: str | None) -> str:
    """Name of the one selection that is meant."""
    pattern = f"{FOLDER}/{plain_name(address.name) if address.name else '*'}/{MANIFEST}"
    if not hub.is_offline():
        place = {"revision": address.revision, "token": token}
        for path, size in hub.list_files(address.source, "dataset", **place).items():
            if path.startswith(f"{FOLDER}/") and path.endswith(f"/{MANIFEST}") and size > MAX_MANIFEST_BYTES:
                raise ManifestError(f"{path} of dataset {address.source!r} is larger than a manifest may be.")
    with tempfile.TemporaryDirectory() as folder:
        root = hub.pull_folder(address.source, folder, patterns=[pattern], revision=address.revision, token=token)
        names = [path.parent.name for path in root.glob(f"{FOLDER}/*/{MANIFEST}")]
        return plain_name(_only(names, address.name, f"dataset {address.source!r}"))


def _only(names: list[str], name: str | None, owner: Any) -> str:
    if name is not None and name in names:
        return name
    if name is not None or not names:
        raise ManifestError(f"{owner} holds no selection{f' {name!r}' if name else ''}.")
    if len(names) > 1:
        raise ManifestError(f"{owner} holds the selections {sorted(names)}; pass name=.")
    return names[0]


def _pulled(
    address: Address, name: str, folder: Path, token: str | None, *, fresh: bool = False, rows: bool = True
) -> Path:
    """Folder with the two files of a selection, the larger one within what its manifest allows."""
    place: dict[str, Any] = {"revision": address.revision, "token": token, **({"fresh": True} if fresh else {})}
    inside = f"{FOLDER}/{name}"
    hub.pull_folder(address.source, folder, patterns=[f"{inside}/{MANIFEST}"], **place)
    about = read_manifest(folder / inside / MANIFEST)["selection"]
    if rows and not hub.is_offline():
        held = hub.list_files(address.source, "dataset", revision=address.revision, token=token)
        if held.get(f"{inside}/{ROWS}", 0) > rows_limit(about["num_selected"]):
            raise ManifestError(f"{inside}/{ROWS} is larger than {about['num_selected']} rows may be.")
    if rows:
        hub.pull_folder(address.source, folder, patterns=[f"{inside}/{name}" for name in (MANIFEST, ROWS)], **place)
    return folder / inside


# -- in place of selecting


@dataclass(frozen=True, kw_only=True)
class PublishedConfig(MethodConfig):
    """Options of ``selection="hub:user/repo/name"``."""

    address: ClassVar[str] = ""

    on_mismatch: str = knob(
        "error",
        "Where rows differ: stop, find the rows by id or content, or take them by number.",
        choices=("error", "rematch", "warn"),
    )
    level: str = knob("rows", "What is compared: names, chosen rows, or every row.", choices=("fast", "rows", "full"))

    @property
    def size(self) -> dict[str, Any]:
        """Rows that were chosen; read once, from the manifest."""
        return {"kind": "num_examples", "value": _num_selected(self.address)}


class Published:
    """Takes the rows that a published selection names."""

    def __init__(self, config: PublishedConfig) -> None:
        self.config = config

    def select(self, context: SelectionContext) -> AdoptedPicks:
        """Read, verify and locate the published rows.

        Raises:
            ManifestError: The pool is not what was selected from, or lacks chosen rows.
        """
        origin = read_published(Selection, Address.parse(self.config.address))
        policy: Any = self.config.on_mismatch
        try:
            positions, exact = self._located(origin, context.pool, "error"), True
        except ManifestError:
            if policy == "error":
                raise
            positions, exact = self._located(origin, context.pool, policy), False
        scores = None
        if origin.scores is not None:
            scores = np.full(len(context.pool), np.nan)
            scores[positions] = origin.scores
        return AdoptedPicks(
            positions=positions,
            scores=scores,
            weights=origin.weights,
            reasons=origin.reasons,
            higher_is_better=origin.manifest["scores"]["higher_is_better"],
            notes={"published": self.config.address, "published method": origin.manifest["selection"]["method"]},
            origin=origin,
            exact=exact,
        )

    def _located(self, origin: Selection, pool: Pool, policy: Any) -> np.ndarray:
        """[k] positions in the pool."""
        if pool.examples is None:
            raise ManifestError("the pool does not show its rows, so a published selection cannot be verified.")
        index = np.asarray(pool.index)
        level: Any = self.config.level
        if np.array_equal(index, np.arange(origin.manifest["dataset"]["num_rows"])):
            return origin.locate(pool.examples, on_mismatch=policy, level=level)
        # Rows that were dropped before: numbers are those of the whole dataset, content is compared where it is left.
        columns = columns_of(pool.examples, origin.manifest["dataset"]["columns"])
        hashes = None if origin.row_hashes is None else HashColumn.of(origin.row_hashes)
        if policy == "rematch" and hashes is not None:
            positions = found_positions(hashes, content(pool.examples, columns))
            _refuse_lost(origin, positions < 0)
            return positions
        order = np.argsort(index)
        positions = order[np.minimum(np.searchsorted(index, origin.indices, sorter=order), len(index) - 1)]
        _refuse_lost(origin, index[positions] != origin.indices)
        if hashes is None or policy == "warn":
            return positions
        if len(wrong := changed_places(hashes, pool.examples, columns, positions)):
            raise ManifestError(
                f"{len(wrong)} of {len(origin)} chosen rows have another content than when selected: "
                f"row {origin.indices[wrong[0]]}."
            )
        return positions


def published_spec(address: str) -> MethodSpec:
    """SPEC of the method that takes the rows of one published selection.

    Args:
        address: See the head of this file.

    Raises:
        OptionError: It is no address.
    """
    Address.parse(address)
    config = type("PublishedConfig", (PublishedConfig,), {"address": address})
    return MethodSpec(
        name=address,
        kind="selection",
        slot="pool",
        summary="Take the rows that a published selection names.",
        config=config,
        build=Published,
        cost=_costs_nothing,
        traits=Traits(baseline=True, fsdp2=True),
    )


def _costs_nothing(config: PublishedConfig, facts: Facts) -> Cost:  # noqa: ARG001 - the signature every method shares
    return Cost()


@functools.cache
def _num_selected(address: str) -> int:
    return int(read_published_manifest(Address.parse(address))["selection"]["num_selected"])


def _refuse_lost(origin: Selection, lost: np.ndarray) -> None:
    if lost.any():
        raise ManifestError(
            f"{int(lost.sum())} of {len(origin)} chosen rows are not in the pool, where rows may have been dropped; "
            f"the first was row {origin.indices[lost][0]}."
        )
