"""Selectors that are broken in one way each."""

from __future__ import annotations

import itertools
import socket
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from hf_eff.contracts.selection import Picks, SelectionContext
from hf_eff.contracts.spec import MethodSpec
from hf_eff.errors import NoEffectWarning
from hf_eff.testing.toys.match import SPEC, Match

Select = Callable[[Match, SelectionContext], Picks]
_runs = itertools.count()


def _that(select: Select, **changes: Any) -> MethodSpec:
    """The toy selector with another ``select``."""

    class Mutant(Match):
        def select(self, context: SelectionContext) -> Picks:
            return select(self, context)

    return replace(SPEC, build=Mutant, **changes)


def _after(act: Callable[[SelectionContext], object]) -> MethodSpec:
    """The toy selector that also does something else."""

    def select(method: Match, context: SelectionContext) -> Picks:
        picks = Match.select(method, context)
        act(context)
        return picks

    return _that(select)


def _instead(change: Callable[[Picks, SelectionContext], Picks]) -> MethodSpec:
    """The toy selector with a changed result."""
    return _that(lambda method, context: change(Match.select(method, context), context))


def _with_context(**changes: Any) -> MethodSpec:
    """The toy selector that ignores parts of its context."""
    return _that(lambda method, context: Match.select(method, replace(context, **changes)))


def _crash_if(condition: Callable[[SelectionContext], bool]) -> MethodSpec:
    def select(method: Match, context: SelectionContext) -> Picks:
        if condition(context):
            raise IndexError("list index out of range")
        return Match.select(method, context)

    return _that(select)


def _connect(_context: SelectionContext) -> None:
    with socket.socket() as door:
        door.settimeout(0.01)
        door.connect(("127.0.0.1", 9))


def _write_elsewhere(_context: SelectionContext) -> None:
    with tempfile.NamedTemporaryFile("w") as file:
        file.write("stray")


def _warn(_context: SelectionContext) -> None:
    warnings.warn(NoEffectWarning("a warning on an ordinary run"), stacklevel=2)


def _nudge(context: SelectionContext) -> None:
    with torch.no_grad():
        next(context.model.parameters()).add_(1e-3)


def _reversed(picks: Picks, _context: SelectionContext) -> Picks:
    return replace(picks, positions=picks.positions[::-1].copy())


def _last_rows(picks: Picks, context: SelectionContext) -> Picks:
    size = len(context.pool)
    return replace(picks, positions=np.arange(size - len(picks.positions), size), scores=None)


def _worst(picks: Picks, _context: SelectionContext) -> Picks:
    assert picks.scores is not None
    return replace(picks, positions=np.argsort(picks.scores)[: len(picks.positions)])


def _all_rows(picks: Picks, context: SelectionContext) -> Picks:
    return replace(picks, positions=np.arange(len(context.pool)))


def _by_run(picks: Picks, _context: SelectionContext) -> Picks:
    return replace(picks, positions=np.roll(picks.positions, next(_runs)))


def _one_more(picks: Picks, context: SelectionContext) -> Picks:
    rest = np.setdiff1d(np.arange(len(context.pool)), picks.positions)[:1]
    return replace(picks, positions=np.concatenate([picks.positions, rest]))


def _first_only(picks: Picks, _context: SelectionContext) -> Picks:
    return replace(picks, positions=picks.positions[:1])


def _twice(picks: Picks, _context: SelectionContext) -> Picks:
    return replace(picks, positions=np.repeat(picks.positions[:1], 2))


def _without_target(method: Match, context: SelectionContext) -> Picks:
    if context.reference is None or not len(context.reference):
        return Picks(np.arange(3), reasons="no target, any will do")
    return Match.select(method, context)


def _zeros_for_nan(_method: Match, context: SelectionContext) -> Picks:
    return Picks(np.arange(3), np.zeros(len(context.pool)), reasons="all scores are alike")


def _by_batch_size(picks: Picks, context: SelectionContext) -> Picks:
    return _last_rows(picks, context) if context.batch_tokens < 128 else picks


def _by_padding(picks: Picks, context: SelectionContext) -> Picks:
    row = context.pool.rows[0]
    padded = context.collate([row])["input_ids"].shape[1] > len(row["input_ids"])
    return _last_rows(picks, context) if padded else picks


def _pay_later(method: Match, context: SelectionContext) -> Picks:
    bill: list[tuple[float, float]] = []
    picks = Match.select(method, replace(context, spend=lambda flops, tokens: bill.append((flops, tokens))))
    for flops, tokens in bill:
        context.spend(flops, tokens)
    return picks


def _half_result(method: Match, context: SelectionContext) -> Picks:
    """Takes the mark of an interrupted run for a finished one."""
    mark = context.store_dir / "done" if context.store_dir else None
    interrupted = mark is not None and mark.exists()
    if mark is not None:
        mark.touch()
    return (
        replace(Match.select(method, context), positions=np.arange(6)) if interrupted else Match.select(method, context)
    )


def _otherwise_with_store(picks: Picks, context: SelectionContext) -> Picks:
    return _last_rows(picks, context) if context.store_dir else picks


def _picks(**changes: Any) -> MethodSpec:
    return _instead(lambda picks, _: replace(picks, **changes))


RESUME = (_instead(_by_run),)
MUTANTS: Mapping[str, tuple[MethodSpec, ...]] = {
    "check_global_randomness": (_after(lambda _: torch.rand(1)), _after(lambda _: np.random.rand())),  # noqa: NPY002
    "check_no_network": (_after(_connect),),
    "check_writes": (_after(_write_elsewhere),),
    "check_silent": (_after(lambda _: print("done")), _after(_warn)),
    "check_model_untouched": (
        _after(lambda context: context.model.train(not context.model.training)),
        _after(lambda context: context.model.register_forward_hook(lambda *_: None)),
        _after(lambda context: context.model.requires_grad_(True)),
        _after(lambda context: context.model.zero_grad()),
        _after(_nudge),
    ),
    "check_pool_untouched": (
        _after(lambda context: context.pool.rows[0]["labels"].append(-100)),
        _after(lambda context: context.reference.lengths.sort() if context.reference else None),
    ),
    "check_repeatable": (_instead(_by_run),),
    "check_seed": (
        replace(SPEC, traits=replace(SPEC.traits, deterministic=False)),
        _instead(lambda picks, context: replace(picks, positions=np.roll(picks.positions, context.seed))),
    ),
    "check_resume_selection": (_that(_half_result),),
    "check_empty_pool": (_crash_if(lambda context: not len(context.pool)),),
    "check_one_example": (_crash_if(lambda context: len(context.pool) == 1),),
    "check_equal_rows": (_instead(_twice),),
    "check_long_row": (_crash_if(lambda context: max(context.pool.lengths) > context.batch_tokens),),
    "check_rows_without_loss": (_instead(_all_rows),),
    "check_missing_target": (_that(_without_target),),
    "check_token_limit": (_instead(_all_rows), _instead(_first_only)),
    "check_sizes": (_instead(_one_more), _instead(_all_rows)),
    "check_broken_model": (_that(_zeros_for_nan),),
    "check_picks": (
        _instead(_twice),
        _picks(positions=np.array([10_000])),
        _picks(positions=np.array([], dtype=np.int64)),
        _picks(weights=np.array([1.0])),
        _instead(lambda picks, _: replace(picks, weights=np.full(len(picks.positions), np.nan))),
        _picks(reasons=""),
        _picks(reasons=("one reason",)),
        _picks(scores=np.zeros(3)),
    ),
    "check_order_free": (_instead(_last_rows),),
    "check_batch_free": (_instead(_by_batch_size),),
    "check_padding_free": (_instead(_by_padding),),
    "check_planted": (_instead(_worst),),
    "check_pays_first": (_that(_pay_later), _with_context(spend=lambda *_: None)),
    "check_stops_on_request": (_with_context(stop_requested=lambda: False),),
    "check_notes": (_picks(notes={"sources": {1, 2}}), _picks(notes={"mean": float("nan")})),
    "check_store_is_optional": (_instead(_otherwise_with_store),),
}
