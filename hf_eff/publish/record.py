"""``_push.json`` beside a run: where it goes or went on the Hub. It stays on this machine and holds no token."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from hf_eff.files import write_json
from hf_eff.report.secrets import publishable

FILE = "_push.json"


@dataclass(frozen=True, kw_only=True)
class PushRecord:
    """What is known about the push of a run.

    Attributes:
        repo_id: Model repository.
        private: Visibility if it is created.
        branch: Branch to commit to; None for the main one.
        message: Title of the commit.
        selection_repo: Dataset repository of the selection, or None.
        collection: Title of the collection that links them, or None.
        commit: Hash of the last commit that arrived whole, or None.
        problem: Why the last attempt failed, or None.
    """

    repo_id: str | None = None
    private: bool = True
    branch: str | None = None
    message: str = "End of training"
    selection_repo: str | None = None
    collection: str | None = None
    commit: str | None = None
    problem: str | None = None

    @classmethod
    def read(cls, folder: Path) -> PushRecord:
        """The record of a run's folder; an empty one where there is none or it is damaged."""
        try:
            values = json.loads((folder / FILE).read_text(encoding="utf-8"))
            return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})
        except (OSError, ValueError, TypeError, KeyError):
            return cls()

    def write(self, folder: Path) -> PushRecord:
        """Write the record and return it."""
        write_json(folder / FILE, publishable(dataclasses.asdict(self)))
        return self
