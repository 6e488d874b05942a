"""Several selections of one dataset side by side: what they share, what they cost, whether their scores agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hf_eff.errors import ManifestError
from hf_eff.manifest import Selection
from hf_eff.numerics.agreement import jaccard, spearman
from hf_eff.report.markdown import table
from hf_eff.units import format_amount, format_seconds

Scores = Mapping[int, float]
"""Score by index of the dataset."""


def compare_selections(
    selections: Mapping[str, Selection], scores: Mapping[str, Scores | None] | None = None
) -> dict[str, Any]:
    """Compare selections pair by pair.

    Args:
        selections: At least two, by the name to show; of one dataset.
        scores: Scores of all candidates where they are at hand. Without them the scores of the rows
            that both selections chose are compared.

    Returns:
        JSON-able: ``names``, ``overlap`` [S, S] Jaccard index, ``agreement`` [S, S] Spearman correlation of the scores,
        higher better, or None where fewer than three rows have both; and ``rows``, one mapping a selection.

    Raises:
        ManifestError: There are fewer than two, or they are of different datasets.
    """
    _check_one_dataset(selections)
    names, given = list(selections), scores or {}
    known = {name: given.get(name) or _own_scores(selections[name]) for name in names}
    signs = {name: _sign(selections[name]) for name in names}
    return {
        "names": names,
        "overlap": _matrix(names, lambda a, b: jaccard(selections[a].indices, selections[b].indices)),
        "agreement": _matrix(names, lambda a, b: _agreement(known[a], known[b], signs[a] * signs[b])),
        "rows": [_row(name, selections[name]) for name in names],
    }


def render_comparison(facts: Mapping[str, Any]) -> str:
    """The comparison as Markdown, ending in a newline."""
    names = facts["names"]
    cost = [
        (
            row["name"],
            row["method"],
            f"{row['chosen']:,} of {row['of']:,}",
            _amount("tokens", row["tokens"]),
            _amount("flops", row["flops"]),
            _amount("seconds", row["seconds"]),
        )
        for row in facts["rows"]
    ]
    parts = [
        table(["Selection", "Method", "Rows", "Tokens chosen", "FLOPs spent", "Time spent"], cost),
        "Overlap (Jaccard index of the chosen rows):",
        _square(names, facts["overlap"]),
        "Agreement (Spearman correlation of the scores of shared rows, higher is better):",
        _square(names, facts["agreement"]),
    ]
    return "\n\n".join(parts) + "\n"


def _check_one_dataset(selections: Mapping[str, Selection]) -> None:
    if len(selections) < 2:
        raise ManifestError(f"a comparison needs at least two selections, got {len(selections)}.")
    (first, one), *others = selections.items()
    for name, other in others:
        before, after = one.manifest["dataset"], other.manifest["dataset"]
        if (before["num_rows"], before["digest"]) != (after["num_rows"], after["digest"]):
            raise ManifestError(
                f"{first!r} and {name!r} were made from different datasets ({before['num_rows']} and "
                f"{after['num_rows']} rows, or rows of other content); compare selections of one dataset."
            )


def _own_scores(selection: Selection) -> Scores | None:
    if selection.scores is None:
        return None
    return dict(zip(selection.indices.tolist(), selection.scores.tolist(), strict=True))


def _sign(selection: Selection) -> float:
    return 1.0 if selection.manifest["scores"]["higher_is_better"] else -1.0


def _agreement(first: Scores | None, second: Scores | None, sign: float) -> float | None:
    if first is None or second is None:
        return None
    shared = [index for index in first if index in second and np.isfinite(first[index] + second[index])]
    if len(shared) < 3:
        return None
    return sign * spearman(np.array([first[i] for i in shared]), np.array([second[i] for i in shared]))


def _matrix(names: Sequence[str], pair: Callable[[str, str], float | None]) -> list[list[float | None]]:
    return [[pair(a, b) for b in names] for a in names]


def _row(name: str, selection: Selection) -> dict[str, Any]:
    about, cost = selection.manifest["selection"], selection.manifest["cost"]
    return {
        "name": name,
        "method": about["method"],
        "chosen": len(selection),
        "of": selection.manifest["dataset"]["num_rows"],
        "tokens": about["num_tokens"],
        "flops": cost["flops"],
        "seconds": cost["seconds"],
    }


def _square(names: Sequence[str], values: Sequence[Sequence[float | None]]) -> str:
    rows = [
        [name, *("" if value is None else f"{value:.3f}" for value in row)]
        for name, row in zip(names, values, strict=True)
    ]
    return table(["", *names], rows)


def _amount(name: str, value: float | None) -> str:
    if value is None:
        return "unavailable"
    return format_seconds(value) if name == "seconds" else format_amount(name, value)
