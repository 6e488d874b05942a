"""The Hugging Face Hub: the one module that talks to a network, and the only importer of its client.

Tokens are handed to the client and to nothing else: no message, log line or file of ours holds one.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator, Sequence
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


def push_folder(
    folder: str | Path,
    repo_id: str,
    repo_type: str,
    message: str,
    token: str | None = None,
    *,
    private: bool = True,
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

    Returns:
        The commit's 40-digit hash.

    Raises:
        HubError: The folder has no files, the Hub cannot be reached or refuses, or what it holds
            after the commit is not what was sent.
    """
    files = {name: path for name, path in _files(Path(folder)).items() if not path.is_symlink()}
    if not files:
        raise HubError(f"{folder} holds no files to push.")
    with _clear_errors(f"pushing to {repo_type} {repo_id!r}", token):
        from huggingface_hub import CommitOperationAdd

        api = _api(token)
        api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()],
            commit_message=message,
            repo_type=repo_type,
            parent_commit=api.repo_info(repo_id, repo_type=repo_type).sha,
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


def pull_folder(
    repo_id: str,
    destination: str | Path,
    repo_type: str = "dataset",
    *,
    patterns: Sequence[str] | None = None,
    revision: str | None = None,
    token: str | None = None,
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
            )
        )
    for name, path in _files(snapshot).items():
        if patterns is None or any(fnmatch(name, pattern) for pattern in patterns):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)
    return target


def fetch_split(
    repo_id: str, *, config: str | None, split: str | None, revision: str | None, token: str | None = None
) -> Dataset:
    """One split of a dataset, from the Hub, the cache or a local folder.

    A dataset that cannot be found or read raises ``HubError``.

    Args:
        repo_id: Repository or local folder.
        config: Configuration; None for the only or default one.
        split: Such as ``"train"``, which None stands for.
        revision: Branch, tag or commit.
        token: Access token; None for the one that is logged in.
    """
    with _clear_errors(f"loading dataset {repo_id!r}", token):
        from datasets import load_dataset

        return load_dataset(repo_id, config, split=split or "train", revision=revision, token=token)


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
    content = path.read_bytes()
    lfs = getattr(entry, "lfs", None)
    if lfs is not None:
        return bool(lfs.sha256 == hashlib.sha256(content).hexdigest())
    git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return bool(entry.blob_id == git.hexdigest())
