"""Several methods one after another: each narrows what the one before it kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hf_eff.contracts.selection import Picks, SelectionContext
from hf_eff.errors import DataError
from hf_eff.options import Chosen

Run = Callable[[Chosen, SelectionContext], Picks]
"""Runs one method."""


def run_pipeline(stages: Sequence[Chosen], context: SelectionContext, run: Run) -> Picks:
    """Run every stage on the rows that the one before it kept.

    A stage sees the scores of the last stage that gave any as ``context.prior``.

    Args:
        stages: At least one method; the last one's order, weights and reasons are those of the result.
        context: The whole pool.
        run: Runs one stage.

    Returns:
        Picks over the whole pool. Scores are those of the last stage, NaN for rows that never reached it.

    Raises:
        DataError: A stage leaves no rows.
    """
    reached, inner = np.arange(len(context.pool)), context
    notes: list[dict[str, Any]] = []
    for number, chosen in enumerate(stages[:-1]):
        picks = run(chosen, _in_folder(inner, f"stage-{number}-{chosen.spec.name}"))
        if not len(picks.positions):
            raise DataError(f"stage {number + 1} of the pipeline, {chosen.spec.name!r}, left no rows; loosen it.")
        # Pool order, so that a stage's preference does not leak into one that knows no order.
        kept = np.sort(np.asarray(picks.positions))
        notes.append({"method": chosen.spec.name, "rows": len(reached), "kept": len(kept), "notes": dict(picks.notes)})
        inner = replace(inner, pool=inner.pool.take(kept), prior=_prior(inner, picks, kept))
        reached = reached[kept]
    last = run(stages[-1], inner)
    return _over_the_pool(last, reached, len(context.pool), notes)


def _in_folder(context: SelectionContext, name: str) -> SelectionContext:
    return context if context.store_dir is None else replace(context, store_dir=context.store_dir / name)


def _prior(context: SelectionContext, picks: Picks, kept: np.ndarray) -> np.ndarray | None:
    if picks.scores is None:
        return None if context.prior is None else context.prior[kept]
    scores = np.asarray(picks.scores, dtype=np.float64)[kept]
    return scores if picks.higher_is_better else -scores


def _over_the_pool(picks: Picks, reached: np.ndarray, size: int, notes: list[dict[str, Any]]) -> Picks:
    if not notes:
        return picks
    scores = None
    if picks.scores is not None:
        scores = np.full(size, np.nan)
        scores[reached] = picks.scores
    return replace(picks, positions=reached[picks.positions], scores=scores, notes={**picks.notes, "stages": notes})
