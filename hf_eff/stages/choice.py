"""One selection before training: its methods in order, and what holds around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from hf_eff.contracts.selection import Picks, SelectionContext
from hf_eff.errors import PlanError
from hf_eff.options import Chosen, PoolOptions, ResolvedOptions, choose_selection
from hf_eff.stages.fallback import random_for, random_instead, run_capped
from hf_eff.stages.pipeline import run_pipeline
from hf_eff.stages.verification import run_verified


@dataclass(frozen=True)
class PoolChoice:
    """Methods that narrow a pool, in order, with the options they share.

    Attributes:
        stages: At least one method.
        options: Shared options.
        training_flops: FLOPs of training on what is kept, for the cap; None where unknown.
    """

    stages: tuple[Chosen, ...]
    options: PoolOptions
    training_flops: float | None = None

    def column(self, name: str) -> str | None:
        """The column that the first method with an option of that name reads."""
        found = (getattr(chosen.config, name, None) for chosen in reversed(self.stages))
        return next((column for column in found if column is not None), None)

    def select(self, context: SelectionContext) -> Picks:
        """Run the stages within the cap.

        Raises:
            PlanError: A cap is set and the training it is a share of is unknown.
        """
        share = self.options.max_selection_fraction
        run = partial(run_pipeline, self.stages, run=self._run)
        if share is None or share >= 1:
            return run(context)
        if self.training_flops is None:
            raise PlanError(
                f"max_selection_fraction={share} is a share of selection and training together, and without a model "
                "the cost of training is unknown; pass model=, or leave it out."
            )
        # A share s of both is s / (1 - s) of training alone.
        return run_capped(run, context, self.training_flops * share / (1 - share), self._random)

    def recorded(self, picks: Picks, context: SelectionContext) -> Chosen:
        """The method that made the choice: the last stage, or random draws in its place."""
        return random_for(self.stages[-1], context.pool) if "instead_of" in picks.notes else self.stages[-1]

    def params(self, picks: Picks, context: SelectionContext) -> dict[str, Any]:
        """Options behind the choice, for its record: those of its method, and what was set around it."""
        own = self.recorded(picks, context).config.to_dict()
        shared = {
            name: value
            for name, value in self.options.to_dict().items()
            if name != "pipeline" and value != getattr(PoolOptions(), name)
        }
        earlier = [] if "fell_back" in picks.notes else self.stages[:-1]
        stages = [{"method": chosen.spec.name, "params": chosen.config.to_dict()} for chosen in earlier]
        return {**own, **shared, **({"pipeline": stages} if stages else {})}

    def _run(self, chosen: Chosen, context: SelectionContext) -> Picks:
        share = self.options.verify
        if share is None or chosen is not self.stages[-1]:
            return _build_and_select(chosen, context)
        return run_verified(chosen, context, share, _build_and_select, self._random)

    def _random(self, context: SelectionContext) -> Picks:
        return random_instead(self.stages[-1], context)


def choose_pool(names: str, options: Mapping[str, Any]) -> PoolChoice:
    """The methods of ``names`` and of ``pipeline`` that select before training.

    Raises:
        PlanError: Two methods fill the same slot, or none selects before training.
    """
    selection, stages, shared = choose_selection(names, options)
    pool = tuple(chosen for chosen in selection if chosen.spec.slot == "pool")
    if not pool:
        raise PlanError(f"selection={names!r} selects during training only; use it in a trainer, not on a dataset.")
    return PoolChoice((*stages, *pool), shared)


def choice_of(resolved: ResolvedOptions, training_flops: float) -> PoolChoice:
    """The part of a run's options that narrows its pool."""
    return PoolChoice(resolved.pool_stages, resolved.pool, training_flops)


def _build_and_select(chosen: Chosen, context: SelectionContext) -> Picks:
    picks: Picks = chosen.build().select(context)
    return picks
