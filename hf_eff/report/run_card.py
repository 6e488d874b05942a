"""``README.md`` of a run: what was done, what it cost and how to do it again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hf_eff.report.markdown import table
from hf_eff.report.run_report import binding_sentence, costs_table, memory_table, purposes_table
from hf_eff.report.secrets import mask_secrets

TAG = "hf_eff"
_REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def render_run_card(report: Mapping[str, Any]) -> str:
    """The card as Markdown under a YAML head that the Hub reads.

    Args:
        report: What ``build_report`` returned. Its environment may name ``base_model``,
            ``datasets`` (list of repo ids), ``library_name`` and ``command``.
    """
    environment = report.get("environment") or {}
    parts = [
        "---\n" + _head(environment, report) + "---",
        f"# {environment.get('title') or 'Budgeted fine-tuning run'}",
        binding_sentence(report),
        "## Methods",
        _methods(report),
        "## Predicted and measured",
        costs_table(report),
        memory_table(report),
        "## Where it went",
        purposes_table(report),
        "## Repeat it",
        _repeat(environment),
    ]
    return mask_secrets("\n\n".join(parts) + "\n")


def _head(environment: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    head: dict[str, Any] = {"tags": sorted({TAG, *_method_names(report), *(environment.get("tags") or [])})}
    for key in ("library_name", "license"):
        if environment.get(key):
            head[key] = environment[key]
    if _is_repo_id(environment.get("base_model")):
        head["base_model"] = environment["base_model"]
    datasets = [name for name in environment.get("datasets") or [] if _is_repo_id(name)]
    if datasets:
        head["datasets"] = datasets
    return yaml.safe_dump(head, sort_keys=False, allow_unicode=True)


def _is_repo_id(name: Any) -> bool:
    """Whether the Hub can link to it; a folder of this machine is nobody else's business."""
    return isinstance(name, str) and _REPO_ID.fullmatch(name) is not None and not Path(name).exists()


def _method_names(report: Mapping[str, Any]) -> list[str]:
    return [address.replace(":", "-") for address in report.get("methods", {})]


def _methods(report: Mapping[str, Any]) -> str:
    rows = []
    for address, options in report.get("methods", {}).items():
        kind, _, name = address.partition(":")
        settings = ", ".join(f"{key}={value!r}" for key, value in options.items() if value is not None)
        rows.append((kind, f"`{name}`", f"`{settings}`" if settings else "none"))
    return table(["Kind", "Method", "Options"], rows)


def _repeat(environment: Mapping[str, Any]) -> str:
    versions = environment.get("versions") or {}
    lines = []
    if environment.get("command"):
        lines += ["```bash", str(environment["command"]), "```", ""]
    if versions:
        lines += ["Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".", ""]
    return "\n".join(
        [*lines, "`plan.json`, `report.json` and `selection/` in this folder hold every setting and figure."]
    )
