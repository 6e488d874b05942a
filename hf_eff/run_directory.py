"""The folder of a run: plan, selection, audit log, report and run card, each whole or absent."""

from __future__ import annotations

import contextlib
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_eff.files import require_writable, write_json, write_text
from hf_eff.report import render_report, render_run_card
from hf_eff.report.governor_figure import figure_of

if TYPE_CHECKING:
    from hf_eff.plan import Plan

PLAN = "plan.json"
GOVERNOR_LOG = "governor.jsonl"
SELECTION = "selection"
REPORT_JSON = "report.json"
REPORT_TEXT = "report.md"
CARD = "README.md"
_PACKAGES = ("hf_eff", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


class RunDirectory:
    """Paths and writers of one run's folder.

    Args:
        path: ``args.output_dir``.

    Raises:
        OptionError: The folder cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = require_writable(path)

    @property
    def selection(self) -> Path:
        """Folder of the manifest."""
        return self.path / SELECTION

    @property
    def governor_log(self) -> Path:
        """Audit log of decisions."""
        return self.path / GOVERNOR_LOG

    def write_plan(self, plan: Plan) -> None:
        """Write ``plan.json``."""
        write_json(self.path / PLAN, plan.to_dict())

    def write_report(self, report: Mapping[str, Any]) -> None:
        """Write ``report.json``, ``report.md`` and the run card."""
        self.update_report(report)
        write_text(self.path / CARD, render_run_card(report, figure_of(self.path)))

    def update_report(self, report: Mapping[str, Any]) -> None:
        """Write ``report.json`` and ``report.md`` anew; a card that others have added to stays."""
        write_json(self.path / REPORT_JSON, report)
        write_text(self.path / REPORT_TEXT, render_report(report, figure_of(self.path)))


def environment(base_model: str | None = None, datasets: Sequence[str] = ()) -> dict[str, Any]:
    """What a result depends on: versions, the command, the model it started from and the data.

    Args:
        base_model: Repo id or path of the model, when known.
        datasets: Repo ids of the datasets, where known.
    """
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    command = shlex.join(["python", *sys.argv]) if sys.argv[0].endswith(".py") else shlex.join(sys.argv)
    named = {"base_model": base_model, "library_name": "transformers"}
    return {"versions": versions, "command": command, **named, **({"datasets": list(datasets)} if datasets else {})}
