"""Rebuilding the weights of a zeroth-order run from its replay log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from hf_eff.engines.directions import FAMILIES, DirectionFamily
from hf_eff.engines.replay_header import LogHeader
from hf_eff.engines.replay_log import ReplayLog, StepRecord
from hf_eff.engines.zeroth_order import update
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
    family = _family(header)
    here = LogHeader.of(family, header.eps, groups)
    header.require_same(here, "replay the run")
    if header.base != here.base:
        raise CheckpointError("cannot replay the run: it started from other weights than the model has.")
    for record in log.records:
        if until_step is None or record.step < until_step:
            apply(record, groups, family)


def apply(record: StepRecord, groups: Sequence[Mapping[str, Tensor]], family: DirectionFamily) -> None:
    """Do one recorded step; a run and its replay both come through here.

    Args:
        record: The step.
        groups: Parameters by name, one mapping a parameter group.
        family: Makes the directions.
    """
    if record.skipped:
        return
    for group, lr, weight_decay in zip(groups, record.lr, record.weight_decay, strict=True):
        update(group.items(), family, record.terms, step=record.step, lr=lr, weight_decay=weight_decay)


def _family(header: LogHeader) -> DirectionFamily:
    name = header.family.get("name")
    if name not in FAMILIES:
        raise CheckpointError(f"cannot replay the run: its directions {name!r} are none of {list(FAMILIES)}.")
    return FAMILIES[name](header.seed, header.family["chunk"])
