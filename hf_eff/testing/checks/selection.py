"""A choice is valid, of the size asked for, and rests on the rows' content alone."""

from __future__ import annotations

import dataclasses
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from hf_eff.contracts.selection import Picks, Pool, SelectionContext
from hf_eff.contracts.spec import MethodSpec
from hf_eff.errors import BudgetExceededError, EffError
from hf_eff.testing.check import Check, CheckFailedError, expect
from hf_eff.testing.selection_scene import chosen_hashes, make_context, pick, toy_pool

MARGIN = 0.25
"""How far above chance the share of target-like rows must lie on the planted pool."""


def expect_valid(spec: MethodSpec, picks: Picks, context: SelectionContext) -> None:
    """Positions are distinct and in range; weights, scores and reasons have the form the contract gives."""
    positions, size = np.asarray(picks.positions), len(context.pool)
    expect(positions.ndim == 1 and positions.dtype.kind in "iu", f"{spec.address}: positions are no integer vector.")
    expect(len(set(positions.tolist())) == len(positions), f"{spec.address} chose a row twice.")
    expect(((positions >= 0) & (positions < size)).all(), f"{spec.address} chose rows outside of 0..{size - 1}.")
    if picks.weights is not None:
        weights = np.asarray(picks.weights)
        valid = weights.shape == positions.shape and np.isfinite(weights).all() and (weights >= 0).all()
        expect(valid, f"{spec.address}: weights must be one finite number, zero or more, a choice; got {weights}.")
    if picks.scores is not None:
        expect(np.asarray(picks.scores).shape == (size,), f"{spec.address}: there must be one score a candidate.")
    expect(_reasons_given(picks, len(positions)), f"{spec.address} gives no reason for (some of) its choices.")


def _reasons_given(picks: Picks, count: int) -> bool:
    if isinstance(picks.reasons, str):
        return bool(picks.reasons.strip()) or not count
    return len(picks.reasons) == count and all(str(reason).strip() for reason in picks.reasons)


def check_picks(spec: MethodSpec) -> None:
    """The choice with toy options is valid and not empty."""
    context = make_context(spec)
    picks = pick(spec, context)
    expect_valid(spec, picks, context)
    expect(len(picks.positions) > 0, f"{spec.address} chose nothing from a pool of {len(context.pool)}.")


def _same_rows(spec: MethodSpec, change: str, **changes: Any) -> None:
    plain = make_context(spec)
    expected = chosen_hashes(pick(spec, plain), plain.pool)
    changed = make_context(spec, **changes)
    found = chosen_hashes(pick(spec, changed), changed.pool)
    expect(found == expected, f"{spec.address} chose {len(found - expected)} other rows with {change}.")


def check_order_free(spec: MethodSpec) -> None:
    """The same rows in another order: the same choice."""
    order = list(range(len(toy_pool())))
    random.Random(3).shuffle(order)
    _same_rows(spec, "the pool in another order", pool=toy_pool(order=order))


def check_batch_free(spec: MethodSpec) -> None:
    """Other scoring batches: the same choice."""
    _same_rows(spec, "smaller scoring batches", batch_tokens=64)


def check_padding_free(spec: MethodSpec) -> None:
    """More padding in every batch: the same choice."""
    _same_rows(spec, "more padding", extra_padding=5)


def _on_target(pool: Pool, positions: np.ndarray) -> float:
    """Share of the positions that come from the source the target is made of."""
    sources = pool.sources or []
    return float(np.mean([sources[int(position)] == "sum" for position in positions]))


def check_planted(spec: MethodSpec) -> None:
    """Half of the pool is of the target's kind: the choice has clearly more than half, a shuffled one has not."""
    context = make_context(spec, pool=toy_pool(64))
    picks = pick(spec, context)
    chance = _on_target(context.pool, np.arange(len(context.pool)))
    share = _on_target(context.pool, picks.positions)
    shuffled = np.random.default_rng(0).permutation(len(context.pool))[: len(picks.positions)]
    control = _on_target(context.pool, shuffled)
    expect(abs(control - chance) < MARGIN, f"the control is off chance: {control:.2f} against {chance:.2f}.")
    expect(
        share >= chance + MARGIN,
        f"{spec.address}: {share:.2f} of the choice is like the target, chance is {chance:.2f}.",
    )


class _ForwardCounter:
    """Counts forwards of a model, whichever of its wrappers is called."""

    def __init__(self, model: Any) -> None:
        self.calls = 0
        self.handle = model.get_input_embeddings().register_forward_pre_hook(self._count)

    def _count(self, *_: object) -> None:
        self.calls += 1


def check_pays_first(spec: MethodSpec) -> None:
    """Compute is charged before it is spent: with nothing to spend, no forward runs."""

    def refuse(_flops: float, _tokens: float) -> None:
        raise BudgetExceededError("this test grants nothing.")

    context = make_context(spec, spend=refuse)
    counter = _ForwardCounter(context.model)
    try:
        pick(spec, context)
    except BudgetExceededError:
        expect(counter.calls == 0, f"{spec.address} ran {counter.calls} forwards before it asked whether it may.")
    else:
        raise CheckFailedError(f"{spec.address} scored with the model without charging anything.")
    finally:
        counter.handle.remove()


def check_stops_on_request(spec: MethodSpec) -> None:
    """When a stop is requested it gives up early, with an error of ours, and leaves no half result."""
    context = make_context(spec, stop_requested=lambda: True)
    counter = _ForwardCounter(context.model)
    try:
        pick(spec, context)
    except EffError:
        limit = 4
        expect(counter.calls <= limit, f"{spec.address} ran {counter.calls} forwards after a stop was requested.")
    else:
        raise CheckFailedError(f"{spec.address} selected although a stop was requested.")
    finally:
        counter.handle.remove()


def check_notes(spec: MethodSpec) -> None:
    """Notes are JSON and name the variant that ran, where the method has one."""
    picks = pick(spec, make_context(spec))
    try:
        json.dumps(dict(picks.notes), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckFailedError(f"the notes of {spec.address} are not JSON: {error}.") from error
    if any(field.name == "variant" for field in dataclasses.fields(spec.config)):
        expect("variant" in picks.notes, f"{spec.address} has variants and its notes do not say which one ran.")


def check_store_is_optional(spec: MethodSpec) -> None:
    """With a folder for intermediate results and without, the choice is the same."""
    with tempfile.TemporaryDirectory() as folder:
        _same_rows(spec, "a folder for intermediate results", folder=Path(folder))


def _needs_target(spec: MethodSpec) -> bool:
    return spec.traits.needs_reference_set


def _scores_with_model(spec: MethodSpec) -> bool:
    return spec.traits.needs_model


_SELECTION = ("selection",)
CHECKS = (
    Check(check_picks, kinds=_SELECTION),
    Check(check_order_free, kinds=_SELECTION),
    Check(check_batch_free, kinds=_SELECTION, when=_scores_with_model),
    Check(check_padding_free, kinds=_SELECTION, when=_scores_with_model),
    Check(check_planted, kinds=_SELECTION, when=_needs_target),
    Check(check_pays_first, kinds=_SELECTION, when=_scores_with_model),
    Check(check_stops_on_request, kinds=_SELECTION, when=_scores_with_model),
    Check(check_notes, kinds=_SELECTION),
    Check(check_store_is_optional, kinds=_SELECTION, when=_scores_with_model),
)
