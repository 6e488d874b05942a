"""README of a model repository that holds recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_eff.report.markdown import table

_MARK = "<!-- hf_eff recipes -->"


def recipe_card(repo_id: str, recipes: Sequence[Mapping[str, Any]]) -> str:
    """What the recipes do and how to run one.

    Args:
        repo_id: The repository.
        recipes: One ``Recipe.to_dict()`` each.
    """
    rows = [
        (f"`{each['name']}`", each["version"], _methods(each), each.get("run", {}).get("model", "any"), _summary(each))
        for each in sorted(recipes, key=lambda each: str(each["name"]))
    ]
    address = repo_id if len(rows) == 1 else f"{repo_id}/{min(str(each['name']) for each in recipes)}"
    lines = ["pip install 'hf_eff[sft]'", f"hf-eff train --recipe {address} --output_dir out   # flags override it"]
    body = [
        "---\ntags:\n- hf_eff\n- hf_eff-recipes\n---",
        _MARK,
        "# Recipes",
        "Settings for fine-tuning under a budget. Plain YAML: nothing here runs code.",
        table(["Recipe", "Version", "Methods", "Model", "For"], rows),
        "\n".join(["```bash", *lines, "```"]),
    ]
    return "\n\n".join(body) + "\n"


def may_replace_card(path: Path) -> bool:
    """Whether the card at ``path`` is absent or one of ours: a model's own is not to be overwritten."""
    return not path.is_file() or _MARK in path.read_text(encoding="utf-8", errors="replace")


def _methods(recipe: Mapping[str, Any]) -> str:
    options = recipe.get("options", {})
    named = [f"{kind}={options[kind]}" for kind in ("selection", "memory", "governor", "budget") if kind in options]
    return ", ".join(named) or "none"


def _summary(recipe: Mapping[str, Any]) -> str:
    """One line in which nothing is markup."""
    text = " ".join(str(recipe.get("summary", "")).split())
    return text.replace("<", "&lt;").replace("[", "\\[").replace("`", "'")
