"""The Hugging Face Hub: the one module that talks to a network, and the only importer of its client.

Tokens are handed to the client and to nothing else: no message, log line or file of ours holds one.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_eff.errors import EffError

if TYPE_CHECKING:
    from datasets import Dataset
    from huggingface_hub import HfApi

_TOKEN = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{8,}")
_USERINFO = re.compile(r"(?<=://)[^/@\s]+@")


class HubError(EffError, OSError):
    """The Hub could not be reached, refused a request, or holds something else than was sent."""


class HubConflictError(HubError):
    """Somebody else committed to the repository meanwhile; nothing was pushed."""


def push_folder(
    folder: str | Path,
    repo_id: str,
    repo_type: str,
    message: str,
    token: str | None = None,
    *,
    private: bool = True,
    parent: str | None = None,
) -> str:
    """Upload every file of a folder in one commit, then read back what arrived.

    One commit means that nobody ever sees half of it. The commit names the one it was made on, so
    that of two concurrent pushes one fails instead of undoing the other.

    Args:
        folder: Files to send, with their paths relative to it; hidden files and links stay.
        repo_id: Such as ``"user/name"``; created when it does not exist.
        repo_type: ``"model"`` or ``"dataset"``.
        message: Title of the commit.
        token: Access token; None for the one that is logged in.
        private: Visibility of a repository that is created; an existing one keeps its own.
        parent: Commit that the pushed files build on; with another one at the head nothing is pushed
            (``HubConflictError``). The head itself without.

    Returns:
        The commit's 40-digit hash.

    Raises:
        HubError: The folder has no files, the Hub cannot be reached or refuses, or what it holds
            after the commit is not what was sent.
    """
    files = {name: path for name, path in _files(Path(folder)).items() if not path.is_symlink()}
    if not files:
        raise HubError(f"{folder} holds no files to push.")
    return push_files(files, repo_id, repo_type, message, token, private=private, parent=parent)


def push_files(
    files: Mapping[str, Path],
    repo_id: str,
    repo_type: str,
    message: str,
    token: str | None = None,
    *,
    private: bool = True,
    branch: str | None = None,
    parent: str | None = None,
) -> str:
    """Upload these files in one commit, then read back what arrived; see ``push_folder``.

    Args:
        files: Path in the repository to the file on disk.
        repo_id: Such as ``"user/name"``; created when it does not exist.
        repo_type: ``"model"`` or ``"dataset"``.
        message: Title of the commit.
        token: Access token; None for the one that is logged in.
        private: Visibility of a repository that is created; an existing one keeps its own.
        branch: Branch to commit to; the main one without.
        parent: Commit that these files build on, see ``push_folder``.

    Returns:
        The commit's 40-digit hash.

    Raises:
        HubError: The Hub cannot be reached or refuses, or what it holds after the commit is not what was sent.
    """
    place: dict[str, Any] = {} if branch is None else {"revision": branch}
    with _clear_errors(f"pushing to {repo_type} {repo_id!r}", token):
        from huggingface_hub import CommitOperationAdd

        api = _api(token)
        api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()],
            commit_message=message,
            repo_type=repo_type,
            parent_commit=parent or api.repo_info(repo_id, repo_type=repo_type, **place).sha,
            **place,
        )
        held = api.get_paths_info(repo_id, list(files), repo_type=repo_type, revision=commit.oid)
    wrong = sorted(set(files) - {entry.path for entry in held if _same_content(entry, files[entry.path])})
    if wrong:
        raise HubError(f"{repo_type} {repo_id!r} does not hold what was sent after commit {commit.oid}: {wrong}.")
    return commit.oid


def exists(repo_id: str, repo_type: str, token: str | None = None) -> bool:
    """Whether a repository exists and may be read; a Hub out of reach raises ``HubError``."""
    with _clear_errors(f"looking for {repo_type} {repo_id!r}", token):
        return _api(token).repo_exists(repo_id, repo_type=repo_type)


def head(repo_id: str, repo_type: str, *, revision: str | None = None, token: str | None = None) -> str | None:
    """Newest commit of a repository or revision; None where the repository does not exist or may not be read.

    An unknown revision and a Hub out of reach raise ``HubError``.
    """
    with _clear_errors(f"looking for {repo_type} {repo_id!r}", token):
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            return str(_api(token).repo_info(repo_id, repo_type=repo_type, revision=revision).sha)
        except RepositoryNotFoundError:
            return None


def create(repo_id: str, repo_type: str, token: str | None = None, *, private: bool = True) -> str:
    """Make sure that a repository exists and may be written; an existing one keeps its visibility.

    A Hub that cannot be reached or refuses raises ``HubError``.

    Returns:
        Its full id: the user's name is put before a bare one.
    """
    with _clear_errors(f"creating {repo_type} {repo_id!r}", token):
        return str(_api(token).create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id)


def list_files(
    repo_id: str, repo_type: str, *, revision: str | None = None, token: str | None = None
) -> dict[str, int]:
    """Size in bytes of every file of a repository; one that cannot be read raises ``HubError``."""
    with _clear_errors(f"listing {repo_type} {repo_id!r}", token):
        entries = _api(token).list_repo_tree(repo_id, repo_type=repo_type, revision=revision, recursive=True)
        return {entry.path: int(entry.size) for entry in entries if hasattr(entry, "size")}


def collect(
    title: str,
    items: Sequence[tuple[str, str]],
    *,
    namespace: str | None,
    token: str | None = None,
    private: bool = True,
) -> str:
    """Link repositories in one collection, which is made when there is none of that title.

    Args:
        title: Name of the collection.
        items: Pairs of repository and type (``"model"``, ``"dataset"``); those already in it stay.
        namespace: User or organisation that owns it; None for the user.
        token: Access token; None for the one that is logged in.
        private: Visibility of a collection that is made.

    Returns:
        The collection's slug. A Hub that cannot be reached or refuses raises ``HubError``.
    """
    with _clear_errors(f"linking the collection {title!r}", token):
        api = _api(token)
        collection = api.create_collection(title, namespace=namespace, private=private, exists_ok=True)
        for repo_id, repo_type in items:
            kind: Any = repo_type
            api.add_collection_item(collection.slug, repo_id, kind, exists_ok=True)
        return str(collection.slug)


def eval_results_yaml(entries: Sequence[Mapping[str, Any]]) -> str:
    """Evaluation results in the format of the Hub's ``.eval_results/*.yaml``.

    Args:
        entries: Fields of ``huggingface_hub.EvalResultEntry``.
    """
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    return yaml.safe_dump(eval_result_entries_to_yaml([EvalResultEntry(**entry) for entry in entries]), sort_keys=False)


def is_offline() -> bool:
    """Whether the client was told not to use the network."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def address(repo_id: str, repo_type: str) -> str:
    """Where people find a repository."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"


@contextmanager
def translated(doing: str, token: str | None = None) -> Iterator[None]:
    """Turn errors of foreign code that talks to the Hub, such as a trainer's, into ``HubError`` without the token."""
    with _clear_errors(doing, token):
        yield


def pull_folder(
    repo_id: str,
    destination: str | Path,
    repo_type: str = "dataset",
    *,
    patterns: Sequence[str] | None = None,
    revision: str | None = None,
    token: str | None = None,
    fresh: bool = False,
) -> Path:
    """Copy files of a repository into a folder, as plain files, by way of the local cache.

    Without a network, what the cache holds is used. An unknown repository or revision, or a Hub
    that cannot be reached with nothing in the cache, raises ``HubError``.

    Args:
        repo_id: Such as ``"user/name"``.
        destination: Folder for the copies; created when needed.
        repo_type: ``"model"`` or ``"dataset"``.
        patterns: Only files that match one of these globs; all without.
        revision: Branch, tag or commit.
        token: Access token; None for the one that is logged in.
        fresh: Whether to download again what the cache holds.

    Returns:
        ``destination``.
    """
    target = Path(destination)
    with _clear_errors(f"fetching {repo_type} {repo_id!r}", token):
        from huggingface_hub import snapshot_download

        snapshot = Path(
            snapshot_download(
                repo_id,
                repo_type=repo_type,
                revision=revision,
                allow_patterns=None if patterns is None else list(patterns),
                token=token,
                force_download=fresh,
            )
        )
    for name, path in _files(snapshot).items():
        if patterns is None or any(fnmatch(name, pattern) for pattern in patterns):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)
    return target


def fetch_split(
    repo_id: str,
    *,
    config: str | None,
    split: str | None,
    revision: str | None,
    token: str | None = None,
    streaming: bool = False,
) -> Dataset:
    """One split of a dataset, from the Hub, the cache or a local folder.

    A dataset that cannot be found or read raises ``HubError``.

    Args:
        repo_id: Repository or local folder.
        config: Configuration; None for the only or default one.
        split: Such as ``"train"``, which None stands for.
        revision: Branch, tag or commit.
        token: Access token; None for the one that is logged in.
        streaming: Whether to read rows as they are asked for (an ``IterableDataset``).
    """
    with _clear_errors(f"loading dataset {repo_id!r}", token):
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        place: dict[str, Any] = {"revision": revision, "token": token, "streaming": streaming}
        try:
            return load_dataset(repo_id, config, split=split or "train", **place)
        except DatasetsError as error:
            # What went wrong is in its cause: of a damaged file the error itself says only that reading failed.
            raise ValueError(str(error.__cause__ or error)) from None


def _api(token: str | None) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="hf_eff")


@contextmanager
def _clear_errors(doing: str, token: str | None) -> Iterator[None]:
    """Turn the client's many exceptions into one that says what was being done."""
    from huggingface_hub import errors

    refusals = (OSError, ValueError, errors.HTTPError)  # type: ignore[attr-defined]
    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise HubError(f"{doing} needs the network, but HF_HUB_OFFLINE is set; unset it or use local files.") from None
    except refusals as error:
        if getattr(getattr(error, "response", None), "status_code", None) == 412:
            raise HubConflictError(f"{doing} failed: somebody else committed to it meanwhile; push again.") from None
        # from None: the client's own exception may quote request headers.
        raise HubError(f"{doing} failed: {_masked(str(error), token) or type(error).__name__}") from None


def _masked(text: str, token: str | None) -> str:
    """One line without access tokens and without credentials in addresses."""
    text = " ".join(text.split())
    if token:
        text = text.replace(token, "***")
    return _USERINFO.sub("***@", _TOKEN.sub(r"\1_***", text))


def _files(folder: Path) -> dict[str, Path]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    named = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: path for name, path in named.items() if not any(part.startswith(".") for part in name.split("/"))}


def _same_content(entry: Any, path: Path) -> bool:
    """Whether the Hub's entry has the content of a local file, by its LFS or git hash."""
    lfs = getattr(entry, "lfs", None)
    if lfs is not None:
        return bool(lfs.sha256 == _digest(path, hashlib.sha256()))
    head = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    return bool(entry.blob_id == _digest(path, head))


def _digest(path: Path, digest: Any) -> str:
    """Hash of a file, read in pieces: weights are larger than memory may be."""
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return str(digest.hexdigest())
