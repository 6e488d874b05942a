"""``README.md`` of a run: what was done, what it cost and how to do it again."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hf_eff.report.markdown import table
from hf_eff.report.run_report import binding_sentence, costs_table, memory_table, pictures, purposes_table
from hf_eff.report.secrets import mask_secrets

TAG = "hf_eff"
_REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def render_run_card(report: Mapping[str, Any], figures: Sequence[str] = ()) -> str:
    """The card as Markdown under a YAML head that the Hub reads.

    Args:
        report: What ``build_report`` returned. Its environment may name ``base_model``,
            ``datasets`` (list of repo ids), ``library_name`` and ``command``. It may also hold ``plan`` (lines of
            text) and ``evaluation`` (``metrics``, ``step`` and the ``datasets`` they were measured on).
        figures: Pictures beside the card.
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
        *_plan(report),
        *_evaluation(report),
        *pictures(figures),
        "## Repeat it",
        _repeat(environment),
    ]
    return mask_secrets("\n\n".join(parts) + "\n")


def add_to_card(before: str, card: str) -> str:
    """A card that another program wrote, with the body of this one after it and both heads in one.

    Args:
        before: The other card; its own facts stay as they are.
        card: Result of ``render_run_card``.
    """
    (theirs, text), (ours, body) = _parted(before), _parted(card)
    head = {**ours, **theirs}
    tags = theirs.get("tags") or []
    head["tags"] = list(dict.fromkeys([*([tags] if isinstance(tags, str) else tags), *ours["tags"]]))
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n{text.rstrip()}\n\n{body.strip()}\n"


def _parted(card: str) -> tuple[dict[str, Any], str]:
    """Head and body; a head that is no mapping counts as text."""
    parts = card.split("---\n", 2)
    if len(parts) == 3 and not parts[0].strip():
        with contextlib.suppress(yaml.YAMLError):
            head = yaml.safe_load(parts[1])
            if isinstance(head, dict):
                return head, parts[2]
    return {}, card


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


def _plan(report: Mapping[str, Any]) -> list[str]:
    """The plan as it was before anything was spent."""
    lines = [str(line).replace("```", "") for line in report.get("plan") or []]
    return ["## Plan", "\n".join(["```text", *lines, "```"])] if lines else []


def _evaluation(report: Mapping[str, Any]) -> list[str]:
    """Last value of each metric, and the dataset where the Hub can link to it."""
    evaluation = report.get("evaluation")
    if not evaluation:
        return []
    rows = [(f"`{name}`", f"{value:.6g}") for name, value in sorted(evaluation["metrics"].items())]
    origins = [origin for origin in evaluation["datasets"].values() if origin and _is_repo_id(origin["repo_id"])]
    told = [f"Measured on {_origin(origin)}." for origin in origins]
    return ["## Evaluation", table(["Metric", f"At step {evaluation['step']}"], rows), *told]


def _origin(origin: Mapping[str, Any]) -> str:
    name = origin["repo_id"]
    place = f"[{name}](https://huggingface.co/datasets/{name})"
    return f"{place}, split `{origin['split']}`, revision `{origin['revision']}`, {origin['num_rows']:,} rows"


def _repeat(environment: Mapping[str, Any]) -> str:
    versions = environment.get("versions") or {}
    lines = []
    if environment.get("command"):
        lines += ["```bash", str(environment["command"]), "```", ""]
    if versions:
        lines += ["Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".", ""]
    return "\n".join(
        [
            *lines,
            "`plan.json`, `report.json` and, where rows were chosen, the selection's manifest hold every setting and "
            "figure.",
        ]
    )
