"""README of a dataset repository that holds selections."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hf_eff.manifest.files import ROWS
from hf_eff.units import format_seconds

FOLDER = "selections"
"""Where a repository keeps its selections: one folder each."""
_REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_BAR = 30


def dataset_card(manifests: Mapping[str, Mapping[str, Any]], repo_id: str = "<this repository>") -> str:
    """README of a repository of selections: a configuration each, a table, how to load, what is not in it.

    Manifests of earlier pushes are somebody else's text: nothing of them reaches the YAML head or breaks the table.

    Args:
        manifests: Manifest by name.
        repo_id: Where they are published.
    """
    names = sorted(manifests)
    # Quoted as JSON, which YAML reads: a name such as 1e3 or no would not be text.
    configs = [
        f"- config_name: {json.dumps(name)}\n  data_files:\n  - split: train\n    path: {FOLDER}/{name}/{ROWS}"
        for name in names
    ]
    found = {str(manifest["dataset"]["repo_id"]) for manifest in manifests.values()}
    sources = sorted(source for source in found if _REPO.fullmatch(source))
    head = ["---", "tags:", "- hf_eff", "- selection-manifest"]
    head += ["source_datasets:", *(f"- {json.dumps(source)}" for source in sources)] if sources else []
    head += ["configs:", *configs, "---"]
    body = [
        "# Selections",
        "Row numbers, content hashes, scores and provenance of selected training rows.",
        _table(manifests),
        "## Load",
        "```python\nfrom hf_eff import load_selected\n\n"
        f'rows = load_selected(dataset, "{repo_id}", name="{names[0]}")  # verified row by row, by content\n```',
        f'Or train on them: `selection="hub:{repo_id}/{names[0]}"`. Without hf_eff, '
        f'`load_dataset("{repo_id}", "{names[0]}", split="train")["index"]` are the row numbers.',
        *_histograms(manifests),
        "## Limits",
        "A selection fits the dataset revision, tokenizer and budget it was made for; scores of different methods do "
        "not compare.",
        "## Licence",
        "The rows themselves are not here: they keep the licence and the home of the dataset they come from, and "
        "nothing here grants rights to them.",
    ]
    return "\n".join(head) + "\n\n" + "\n\n".join(body) + "\n"


def _table(manifests: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "| name | dataset | method | rows | tokens | FLOPs | time | seed | revision |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in sorted(manifests):
        about, data, cost = (manifests[name][part] for part in ("selection", "dataset", "cost"))
        cells = [name, data["repo_id"] or "local", about["method"]]
        cells += [f"{about['num_selected']} of {data['num_rows']}", str(about["num_tokens"])]
        cells += [f"{cost['flops']:.3g}", format_seconds(float(cost["seconds"])), str(about["seed"])]
        cells += [(data["revision"] or "")[:12]]
        lines.append("| " + " | ".join(map(_plain, cells)) + " |")
    return "\n".join(lines)


def _histograms(manifests: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Scores of all candidates as bars of text, for every selection that has scores."""
    parts = []
    for name in sorted(manifests):
        about, histogram = manifests[name]["scores"], manifests[name]["scores"]["hist"]
        if histogram["counts"]:
            better = "higher" if about["higher_is_better"] else "lower"
            title = f"## Scores of {_plain(name)} ({_plain(manifests[name]['selection']['method'])})"
            parts += [title, f"All candidates; {better} is better.", _bars(histogram["edges"], histogram["counts"])]
    return parts


def _bars(edges: Sequence[float], counts: Sequence[int]) -> str:
    top = max(1, *counts)
    lines = [
        f"{edges[place]:>12.4g} |{'#' * round(_BAR * count / top):<{_BAR}}| {count}"
        for place, count in enumerate(counts)
    ]
    return "\n".join(["```text", *lines, "```"])


def _plain(text: str) -> str:
    """Text that stays within a cell: one line, no markup, no pipe."""
    return re.sub(r"[^\w .,:+/()=-]", "?", " ".join(text.split()))[:80]
