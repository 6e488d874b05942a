"""README of a dataset repository that holds selections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_eff.manifest.files import ROWS

FOLDER = "selections"
"""Where a repository keeps its selections: one folder each."""


def dataset_card(manifests: Mapping[str, Mapping[str, Any]]) -> str:
    """README of a repository of selections: a configuration each, a table, how to load, what is not in it."""
    names = sorted(manifests)
    configs = [
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {FOLDER}/{name}/{ROWS}" for name in names
    ]
    sources = sorted({repo for m in manifests.values() if (repo := m["dataset"]["repo_id"])})
    head = ["---", "tags:", "- hf_eff", "- selection-manifest"]
    head += ["source_datasets:", *(f"- {source}" for source in sources)] if sources else []
    head += ["configs:", *configs, "---"]
    body = [
        "# Selections",
        "Row numbers, content hashes, scores and provenance of selected training rows. The rows themselves are not "
        "here; they keep the licence and the home of the dataset they come from.",
        _table(manifests),
        "```python\nfrom hf_eff import Selection\n\n"
        f'selection = Selection.from_pretrained("<this repository>", name="{names[0]}")\n'
        "chosen = selection.apply(dataset)  # verified row by row, by content\n```",
        "Limits: a selection fits the dataset revision, tokenizer and budget it was made for; scores of different "
        "methods do not compare.",
    ]
    return "\n".join(head) + "\n\n" + "\n\n".join(body) + "\n"


def _table(manifests: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "| name | dataset | method | rows | tokens | FLOPs | seconds | seed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in sorted(manifests):
        about, data, cost = (manifests[name][part] for part in ("selection", "dataset", "cost"))
        cells = [name, data["repo_id"] or "local", about["method"], f"{about['num_selected']} of {data['num_rows']}"]
        cells += [str(about["num_tokens"]), f"{cost['flops']:.3g}", f"{cost['seconds']:.1f}", str(about["seed"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
