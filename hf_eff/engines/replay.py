"""Rebuilding the weights of a zeroth-order run from its replay log."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_eff.engines.direction_families import rebuilt
from hf_eff.engines.low_rank_momentum import LowRankMomentum
from hf_eff.engines.replay_header import LogHeader
from hf_eff.engines.replay_log import ReplayLog
from hf_eff.engines.update_rules import RecentMomentum, UpdateRule
from hf_eff.errors import CheckpointError


def replay(model: nn.Module, log: ReplayLog, until_step: int | None = None) -> None:
    """Repeat the updates of a run on the weights it started from; the result is bit for bit the run's.

    Args:
        model: Holds the weights that the first record starts from; changed in place.
        log: The run.
        until_step: Optimizer steps after which to end, counted from the start of training; None for all.

    Raises:
        CheckpointError: The model has other parameters or weights, or this software and processor compute
            other numbers than those of the run.
    """
    header = log.header
    every = dict(model.named_parameters(remove_duplicate=False))
    missing = [name for name, *_ in header.parameters if name not in every]
    if missing:
        raise CheckpointError(f"cannot replay the run: the model has no parameter {missing[0]!r}.")
    groups: list[dict[str, nn.Parameter]] = [{} for _ in range(1 + max(row[3] for row in header.parameters))]
    for name, _, _, index in header.parameters:
        groups[index][name] = every[name]
    family, rule = rebuilt(header.seed, header.family), _rule(header)
    here = LogHeader.of(family, header.eps, groups, rule.describe())
    header.require_same(here, "replay the run")
    if header.base != here.base:
        raise CheckpointError(
            "cannot replay the run: it started from other weights than the model has; load those anew."
        )
    state: dict[Any, dict[str, Any]] = {}
    for record in log.records:
        if until_step is None or record.step < until_step:
            rule.apply(record, groups, family, state)


def _rule(header: LogHeader) -> UpdateRule:
    described = header.rule
    if not described:
        return UpdateRule()
    if described.get("name") == "recent_momentum":
        return RecentMomentum(described["beta"], window=described["window"])
    if described.get("name") == "low_rank_momentum":
        return LowRankMomentum(described["beta"])
    raise CheckpointError(f"cannot replay the run: its update rule {described.get('name')!r} is not known.")
