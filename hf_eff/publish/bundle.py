"""What of a run's folder goes to the Hub, and what stays: rows, pickles, secrets and scratch stay."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

from hf_eff.hub import HubError
from hf_eff.manifest import MANIFEST
from hf_eff.run_directory import SELECTION

EVAL_RESULTS = ".eval_results"
"""The hidden folder in which the Hub looks for evaluation results."""
MANIFEST_COPY = "selection_manifest.json"
_STAYS = (
    *("_*", "checkpoint-*", ".*"),
    *("training_args.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.distcp"),  # pickles; the first can hold a token
    *("*.parquet", "*.arrow"),  # rows of selections have a repository of their own
    "*.tmp",
)
_TEXT = (".json", ".jsonl", ".md", ".yaml", ".yml", ".txt", ".csv", ".log")
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")
_READ = 2**20


def bundle_files(folder: Path) -> dict[str, Path]:
    """Path in the repository to the file on disk, for everything of a run that others may have.

    Raises:
        HubError: There is nothing to send, or a text file holds what looks like an access token.
    """
    files = {name: path for name, path in _all_files(folder).items() if not _stays(name)}
    files = {name: path for name, path in files.items() if not name.startswith(f"{SELECTION}/")}
    manifest = folder / SELECTION / MANIFEST
    if manifest.is_file():
        files[MANIFEST_COPY] = manifest
    for path in sorted((folder / EVAL_RESULTS).glob("*.yaml")):
        files[f"{EVAL_RESULTS}/{path.name}"] = path
    if not files:
        raise HubError(f"{str(folder)!r} holds nothing to push; give the output_dir of a run that saved its model.")
    require_no_token(files)
    return files


def require_no_token(files: dict[str, Path]) -> None:
    """Refuse to publish a file in which an access token stands.

    Raises:
        HubError: There is one; the message names the file alone.
    """
    for name, path in files.items():
        if path.suffix in _TEXT and _holds_token(path):
            raise HubError(f"{name!r} holds what looks like an access token, so nothing was sent; remove it first.")


def figures(folder: Path) -> list[str]:
    """Names of the pictures at the top of a run's folder, the governor's first."""
    names = sorted(path.name for path in folder.glob("*") if path.suffix in (".png", ".svg") and not _stays(path.name))
    return sorted(names, key=lambda name: not name.startswith("governor"))


def _all_files(folder: Path) -> dict[str, Path]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _stays(name: str) -> bool:
    return any(fnmatch(part, pattern) for part in name.split("/") for pattern in _STAYS)


def _holds_token(path: Path) -> bool:
    """Read in overlapping pieces: a vocabulary is large."""
    with path.open("rb") as file:
        tail = b""
        while block := file.read(_READ):
            if _TOKEN.search(tail + block):
                return True
            tail = block[-64:]
    return False
