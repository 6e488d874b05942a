"""What a selection kept and what it passed over, for people: figures, confounds, examples to read.

The page quotes rows, so it lies in a folder whose name starts with ``_``, which pushes leave out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hf_eff.contracts.selection import Pool
from hf_eff.engines.row_text import row_texts
from hf_eff.errors import DataError
from hf_eff.files import replacing, write_json, write_text
from hf_eff.manifest import Selection
from hf_eff.numerics.agreement import jaccard, spearman
from hf_eff.numerics.keyed_random import content_order
from hf_eff.numerics.top_k import TopK
from hf_eff.numerics.water_filling import water_fill
from hf_eff.report.histogram import histogram_svg
from hf_eff.report.markdown import table
from hf_eff.units import format_amount, format_seconds

FOLDER = "_selection_report"
PAGE, FIGURE, FACTS, SCORES = "report.md", "scores.svg", "report.json", "scores.parquet"
_EXTREMES = 10
_QUOTE = 300  # characters of a row that are quoted
_BINS = 20


def write_selection_report(selection: Selection, pool: Pool, folder: Path, tokenizer: Any = None) -> Path:
    """Write the page, its figure, the figure's numbers and every row's score.

    Args:
        selection: What was chosen from the pool.
        pool: The candidates.
        folder: Where the report's own folder goes.
        tokenizer: Decodes rows that came as tokens; without one they are not quoted.

    Returns:
        The page.
    """
    facts, place = selection_facts(selection, pool), folder / FOLDER
    if facts["scores"] is not None:
        scores = facts["scores"]
        title = f"Scores of {selection.manifest['selection']['method']}"
        write_text(place / FIGURE, histogram_svg(scores["edges"], scores["all"], scores["chosen"], title))
    if selection.all_scores is not None:
        columns = {"index": np.asarray(pool.index), "score": np.asarray(selection.all_scores, dtype=np.float32)}
        with replacing(place / SCORES) as temporary:
            pq.write_table(pa.table(columns), temporary)
    write_json(place / FACTS, facts)
    write_text(place / PAGE, _page(selection, facts, _extremes(selection, pool, tokenizer)))
    return place / PAGE


def read_scores(folder: Path) -> dict[int, float] | None:
    """Score of every candidate by its index, from the report beside a selection; None where there is none."""
    path = folder / FOLDER / SCORES
    if not path.is_file():
        return None
    rows = pq.read_table(path)
    return dict(zip(rows["index"].to_pylist(), rows["score"].to_pylist(), strict=True))


def selection_facts(selection: Selection, pool: Pool) -> dict[str, Any]:
    """Numbers behind the page, JSON-able; None where they do not apply.

    ``overlap`` is the Jaccard index with as many rows drawn at random, evenly over sources; ``by_chance`` is what two
    such draws share.
    """
    wanted = set(selection.indices.tolist())
    chosen = np.array([index in wanted for index in np.asarray(pool.index).tolist()], dtype=bool)
    scores, about = selection.all_scores, selection.manifest["selection"]
    seed = int(about["seed"] or 0)
    drawn = [np.flatnonzero(_balanced(pool, int(chosen.sum()), (seed, number))) for number in (0, 1)]
    loss_lengths = np.asarray(pool.loss_lengths)
    return {
        "method": about["method"],
        "rows": len(pool),
        "chosen": int(chosen.sum()),
        "scores": None if scores is None else _histogram(np.asarray(scores, dtype=np.float64), chosen),
        "length": {
            "spearman_with_score": None if scores is None else _length_confound(scores, loss_lengths),
            "mean_loss_tokens_pool": float(loss_lengths[loss_lengths > 0].mean()),
            "mean_loss_tokens_chosen": float(loss_lengths[chosen].mean()),
        },
        "sources": None if pool.sources is None else _sources(pool.sources, chosen),
        "overlap": {
            "with_balanced_random": jaccard(np.flatnonzero(chosen), drawn[0]),
            "by_chance": jaccard(drawn[0], drawn[1]),
        },
        "cost": {name: selection.manifest["cost"].get(name) for name in ("flops", "tokens", "seconds")},
        "invalid": dict(about["invalid"] or {}),
    }


def _histogram(scores: np.ndarray, chosen: np.ndarray) -> dict[str, Any] | None:
    finite = np.isfinite(scores)
    if not finite.any():
        return None
    every, edges = np.histogram(scores[finite], bins=_BINS)
    taken, _ = np.histogram(scores[finite & chosen], bins=edges)
    return {"edges": edges.tolist(), "all": every.tolist(), "chosen": taken.tolist()}


def _length_confound(scores: Any, loss_lengths: np.ndarray) -> float:
    values = np.asarray(scores, dtype=np.float64)
    finite = np.isfinite(values)
    return spearman(values[finite], loss_lengths[finite].astype(np.float64))


def _sources(sources: Sequence[str], chosen: np.ndarray) -> dict[str, dict[str, int]]:
    every = Counter(sources)
    taken = Counter(name for name, kept in zip(sources, chosen.tolist(), strict=True) if kept)
    return {name: {"pool": every[name], "chosen": taken[name]} for name in sorted(every)}


def _balanced(pool: Pool, size: int, key: tuple[int, ...]) -> np.ndarray:
    """[N] Whether a row is in a random draw that is even over sources."""
    valid = np.flatnonzero(np.asarray(pool.loss_lengths) > 0)
    hashes = pool.row_hash or [str(place) for place in range(len(pool))]
    order = valid[content_order([hashes[int(row)] for row in valid], *key)]
    sources = np.asarray(pool.sources if pool.sources is not None else [""] * len(pool))[order]
    names, codes = np.unique(sources, return_inverse=True)
    shares = water_fill(np.bincount(codes, minlength=len(names)), min(size, len(order)))
    drawn = np.zeros(len(pool), dtype=bool)
    for code, share in enumerate(shares):
        drawn[order[codes == code][:share]] = True
    return drawn


def _extremes(selection: Selection, pool: Pool, tokenizer: Any) -> Mapping[str, list[tuple[str, str]]]:
    """The rows with the highest and the lowest scores, quoted; none where rows have no text or no score."""
    if selection.all_scores is None:
        return {}
    scores = np.asarray(selection.all_scores, dtype=np.float64)
    finite = np.flatnonzero(np.isfinite(scores))
    best, worst = _top(finite, scores[finite]), _top(finite, -scores[finite])
    try:
        quotes = [row_texts(pool.take(rows), tokenizer) for rows in (best, worst)]
    except DataError:
        return {}
    return {
        title: [(f"{scores[row]:.4g}", _short(text.whole)) for row, text in zip(rows, texts, strict=True)]
        for title, rows, texts in zip(("Highest scores", "Lowest scores"), (best, worst), quotes, strict=True)
    }


def _top(positions: np.ndarray, scores: np.ndarray) -> np.ndarray:
    top = TopK(_EXTREMES)
    top.add(positions, scores)
    return top.positions


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _QUOTE else f"{line[:_QUOTE]}..."


def _page(selection: Selection, facts: Mapping[str, Any], extremes: Mapping[str, list[tuple[str, str]]]) -> str:
    about = selection.manifest["selection"]
    parts = [
        f"# Selection by {about['method']}",
        f"{facts['chosen']:,} of {facts['rows']:,} rows, digest `{selection.digest}`.",
        *(["## Scores", f"![scores]({FIGURE})"] if facts["scores"] is not None else []),
        "## Length and chance",
        _confounds(facts),
        *(["## Sources", _source_table(facts)] if facts["sources"] else []),
        "## Cost",
        _cost_table(facts["cost"]),
        *(["## Rows that could not be chosen", _counts(facts["invalid"])] if facts["invalid"] else []),
    ]
    for title, rows in extremes.items():
        parts += [f"## {title}", table(["Score", "Row"], rows)]
    return "\n\n".join(parts) + "\n"


def _confounds(facts: Mapping[str, Any]) -> str:
    length, overlap = facts["length"], facts["overlap"]
    correlation = length["spearman_with_score"]
    rows = [
        ("Spearman of score and loss tokens", "no scores" if correlation is None else f"{correlation:.2f}"),
        ("Mean loss tokens, pool", f"{length['mean_loss_tokens_pool']:.1f}"),
        ("Mean loss tokens, chosen", f"{length['mean_loss_tokens_chosen']:.1f}"),
        ("Jaccard with balanced random rows", f"{overlap['with_balanced_random']:.3f}"),
        ("Jaccard of two balanced random draws", f"{overlap['by_chance']:.3f}"),
    ]
    return table(["Fact", "Value"], rows)


def _source_table(facts: Mapping[str, Any]) -> str:
    rows = [
        (name, f"{counts['pool']:,}", f"{counts['chosen']:,}", f"{counts['chosen'] / max(1, facts['chosen']):.1%}")
        for name, counts in facts["sources"].items()
    ]
    return table(["Source", "Pool", "Chosen", "Of the chosen"], rows)


def _cost_table(cost: Mapping[str, float | None]) -> str:
    rows = [(name, "unavailable" if value is None else _amount(name, value)) for name, value in cost.items()]
    return table(["Resource", "Spent"], rows)


def _amount(name: str, value: float) -> str:
    return format_seconds(value) if name == "seconds" else format_amount(name, value)


def _counts(counts: Mapping[str, int]) -> str:
    return table(["Why", "Rows"], [(why.replace("_", " "), f"{count:,}") for why, count in counts.items()])
