"""Sending a run to the Hub: from its folder, at once or later, whole or not at all."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from hf_eff import hub
from hf_eff.errors import EffError, OptionError
from hf_eff.hub import HubError
from hf_eff.manifest import read_manifest
from hf_eff.publish.bundle import MANIFEST_COPY, bundle_files
from hf_eff.publish.links import write_links
from hf_eff.publish.record import PushRecord
from hf_eff.reallocation import PHASES, read_phases
from hf_eff.run_directory import SELECTION
from hf_eff.selection import Selection

__all__ = ["PushRecord", "Pushed", "later", "push_folder_of_run"]


@dataclass(frozen=True)
class Pushed:
    """What arrived, with the names that ``huggingface_hub.CommitInfo`` has for it.

    Attributes:
        repo_id: Model repository.
        oid: Hash of the commit.
        commit_url: Address of the commit.
        selection_repo: Dataset repository of the selection, or None.
        collection: Slug of the collection, or None.
    """

    repo_id: str
    oid: str
    commit_url: str
    selection_repo: str | None = None
    collection: str | None = None


def push_folder_of_run(folder: Path, record: PushRecord, token: str | None = None) -> Pushed:
    """Send what of a run others may have, in one commit that is read back. The folder is only read, but for its links.

    Args:
        folder: ``output_dir`` of the run.
        record: Where to; kept beside the run, so that a failed push can be repeated without saying it again.
        token: Access token; None for the one that is logged in.

    Raises:
        OptionError: No repository is named.
        HubError: The Hub cannot be reached or refuses, or holds something else afterwards. The folder is whole.
    """
    if not record.repo_id:
        raise OptionError(f"no repository is named for {str(folder)!r}; give --repo-id user/name.")
    record = replace(record, commit=None, problem=None).write(folder)
    try:
        pushed = _push(folder, record, token)
    except EffError as error:
        replace(record, problem=str(error)).write(folder)
        raise HubError(f"{error} {later(folder, record)}") from None
    replace(record, repo_id=pushed.repo_id, commit=pushed.oid).write(folder)
    return pushed


def later(folder: Path, record: PushRecord) -> str:
    """The sentence that says how to send a run that is whole on this disk."""
    words = ["hf-eff", "push", str(folder), *(["--repo-id", record.repo_id] if record.repo_id else [])]
    return f"Nothing is lost: the run is whole in {str(folder)!r}; send it later with: {shlex.join(words)}"


def _push(folder: Path, record: PushRecord, token: str | None) -> Pushed:
    bundle_files(folder)  # what cannot be sent is found out before anything is created
    repo_id = hub.create(str(record.repo_id), "model", token, private=record.private)
    if record.selection_repo is not None:
        _push_selections(folder, record, token)
    slug = None
    if record.collection is not None:
        items = [(repo_id, "model"), *_datasets(folder, record)]
        owner = repo_id.partition("/")[0]
        slug = hub.collect(record.collection, items, namespace=owner, token=token, private=record.private)
    write_links(folder, repo_id, record.selection_repo, slug)
    files = bundle_files(folder)
    commit = hub.push_files(
        files, repo_id, "model", record.message, token, private=record.private, branch=record.branch
    )
    address = f"{hub.address(repo_id, 'model')}/commit/{commit}"
    return Pushed(repo_id, commit, address, record.selection_repo, slug)


def _push_selections(folder: Path, record: PushRecord, token: str | None) -> None:
    """Send the choice of rows, and those of later data phases under the same name with their number."""
    name = str(record.repo_id).rpartition("/")[2].lower()
    named = {name: folder / SELECTION}
    if (folder / PHASES).is_file():
        later = enumerate(read_phases(folder).phases[1:], start=1)
        named |= {f"{name}-phase-{number}": folder / phase.manifest for number, phase in later}
    for each, place in named.items():
        Selection.load(place).push_to_hub(str(record.selection_repo), each, private=record.private, token=token)


def _datasets(folder: Path, record: PushRecord) -> list[tuple[str, str]]:
    """The dataset that was selected from, if it is on the Hub, and the selection."""
    found = [] if record.selection_repo is None else [(record.selection_repo, "dataset")]
    manifest = bundle_files(folder).get(MANIFEST_COPY)
    source = None if manifest is None else read_manifest(manifest)["dataset"]["repo_id"]
    return [*([(str(source), "dataset")] if source else []), *found]
