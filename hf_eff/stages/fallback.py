"""Random rows instead of chosen ones: where choosing would cost too much, or a proxy knows nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hf_eff.contracts.selection import Picks, Pool, SelectionContext
from hf_eff.engines.pool_size import SizedConfig
from hf_eff.errors import BudgetExceededError, SelectionFallbackWarning
from hf_eff.options import Chosen, choose
from hf_eff.units import format_amount


class SelectionCapError(BudgetExceededError):
    """Selection would take more FLOPs than ``max_selection_fraction`` grants it."""


def random_for(chosen: Chosen, pool: Pool) -> Chosen:
    """Random draws of as many rows as ``chosen`` would keep: evenly over sources where there are any."""
    size: dict[str, Any] = (
        chosen.config.size if isinstance(chosen.config, SizedConfig) else {"kind": "fraction", "value": 1.0}
    )
    mode = "plain" if pool.sources is None else "balanced"
    return choose("selection", "random", {size["kind"]: size["value"], "mode": mode})[0]


def random_instead(chosen: Chosen, context: SelectionContext) -> Picks:
    """What ``random_for`` draws, marked as standing in for ``chosen``."""
    picks: Picks = random_for(chosen, context.pool).build().select(context)
    return replace(picks, notes={**picks.notes, "instead_of": chosen.spec.name})


def run_capped(
    select: Callable[[SelectionContext], Picks],
    context: SelectionContext,
    limit: float,
    fall_back: Callable[[SelectionContext], Picks],
) -> Picks:
    """Select within a number of FLOPs; rows are drawn at random as soon as the next batch would pass it.

    Args:
        select: Runs the selection.
        context: Its context.
        limit: FLOPs that it may spend.
        fall_back: Draws rows instead.
    """
    spent = 0.0

    def spend(flops: float, tokens: float) -> None:
        nonlocal spent
        if spent + flops > limit:
            raise SelectionCapError(
                f"selection would spend {format_amount('flops', spent + flops)}, more than the "
                f"{format_amount('flops', limit)} that max_selection_fraction grants it."
            )
        context.spend(flops, tokens)
        spent += flops

    try:
        return select(replace(context, spend=spend))
    except SelectionCapError as error:
        warnings.warn(
            SelectionFallbackWarning(f"{error} Rows are drawn at random instead; what was spent is lost."), stacklevel=2
        )
        picks = fall_back(context)
        return replace(picks, notes={**picks.notes, "fell_back": str(error)})
