"""At the edges a method gives a result or one clear error of ours, never a crash and never a wrong result."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from hf_eff.contracts.governor import ProbeReading, Telemetry
from hf_eff.contracts.selection import Picks, Pool
from hf_eff.contracts.spec import MethodSpec
from hf_eff.errors import EffError
from hf_eff.testing.check import Check, CheckFailedError, expect
from hf_eff.testing.checks.selection import expect_valid
from hf_eff.testing.rehearsal import Rehearsal, toy_batches
from hf_eff.testing.selection_scene import make_context, pick, pool_of, toy_pool, unlabelled
from hf_eff.testing.tapes import Tape, play
from hf_eff.testing.tasks import new_governor


def _result_or_error(spec: MethodSpec, situation: str, act: Callable[[], Any]) -> Any:
    """Result of ``act``, or None where it raised an error of ours that says something."""
    try:
        return act()
    except EffError as error:
        expect(len(str(error).split()) >= 5, f"{spec.address} on {situation}: the error says only {str(error)!r}.")
        return None
    except Exception as error:
        raise CheckFailedError(f"{spec.address} on {situation}: {type(error).__name__}: {error}.") from error


def _select(spec: MethodSpec, situation: str, **changes: Any) -> None:
    context = make_context(spec, **changes)
    picks: Picks | None = _result_or_error(spec, situation, lambda: pick(spec, context))
    if picks is not None:
        expect_valid(spec, picks, context)


def check_empty_pool(spec: MethodSpec) -> None:
    """No candidates: an error of ours, or no choice."""
    _select(spec, "an empty pool", pool=pool_of([], []))


def check_one_example(spec: MethodSpec) -> None:
    """One candidate: it is chosen, or an error of ours."""
    _select(spec, "a pool of one row", pool=toy_pool(1))


def check_equal_rows(spec: MethodSpec) -> None:
    """Rows that all score the same: a valid choice all the same."""
    row = toy_pool(2).rows[0]
    _select(spec, "a pool of equal rows", pool=pool_of([row] * 8, ["one"] * 8))


def check_long_row(spec: MethodSpec) -> None:
    """One row far longer than a scoring batch: a valid choice all the same."""
    pool = toy_pool(8)
    long = {"input_ids": pool.rows[0]["input_ids"] * 10, "labels": pool.rows[0]["labels"] * 10}
    _select(spec, "a row longer than a batch", pool=pool_of([*pool.rows, long], ["one"] * 9), batch_tokens=64)


def check_rows_without_loss(spec: MethodSpec) -> None:
    """Rows that carry no loss are never chosen as if they did; a pool of nothing else is refused or empty."""
    pool = toy_pool(8)
    silent = unlabelled(pool)
    mixed = pool_of([*silent.rows[:4], *pool.rows[4:]], ["one"] * 8)
    context = make_context(spec, pool=mixed)
    picks: Picks | None = _result_or_error(spec, "rows without loss", lambda: pick(spec, context))
    if picks is not None:
        expect_valid(spec, picks, context)
        chosen = np.asarray(picks.positions)
        expect(not (chosen < 4).any(), f"{spec.address} chose rows that carry no loss: {chosen[chosen < 4]}.")
    _select(spec, "a pool without any loss", pool=silent)


def check_missing_target(spec: MethodSpec) -> None:
    """A method that needs a target says so when there is none, or an empty one."""
    for reference in (None, _empty_target()):
        context = make_context(spec, reference=reference)
        picks = _result_or_error(spec, "a missing target", functools.partial(pick, spec, context))
        expect(picks is None, f"{spec.address} needs a reference set and selected without one.")


def _empty_target() -> Pool:
    target = pool_of([], [])
    return dataclasses.replace(target, groups=[])


def _size_names(spec: MethodSpec) -> list[str]:
    names = {field.name for field in dataclasses.fields(spec.config)}
    return [name for name in ("fraction", "num_examples", "num_tokens") if name in names]


def _sizes(spec: MethodSpec) -> list[tuple[dict[str, Any], int]]:
    """Option values for no, one, some, all and more rows than there are, with the number they ask for."""
    names, total = _size_names(spec), len(toy_pool())
    unset = dict.fromkeys(names)
    sizes: list[tuple[dict[str, Any], int]] = []
    if "num_examples" in names:
        sizes += [({**unset, "num_examples": count}, count) for count in (0, 1, total, total + 5)]
    if "fraction" in names:
        sizes += [({**unset, "fraction": share}, int(share * total)) for share in (0.0, 0.5, 1.0)]
    return sizes


def check_sizes(spec: MethodSpec) -> None:
    """Asked for 0, 1, some, N or more than N rows, it gives that many (at most N) or an error of ours."""
    for options, wanted in _sizes(spec):
        context, act = make_context(spec), functools.partial(pick, spec, **options)
        picks: Picks | None = _result_or_error(spec, f"{options}", functools.partial(act, context))
        if picks is not None:
            expect_valid(spec, picks, context)
            found, possible = len(picks.positions), min(wanted, len(context.pool))
            expect(found == possible, f"{spec.address} with {options} chose {found} rows instead of {possible}.")
        else:
            expect(wanted == 0 or wanted > len(context.pool), f"{spec.address} refuses {options} on a pool that fits.")


def check_token_limit(spec: MethodSpec) -> None:
    """A limit in tokens is never passed, and used as far as whole rows allow."""
    context = make_context(spec)
    lengths = np.asarray(context.pool.lengths)
    for limit in (int(lengths.max()), int(lengths.sum() // 2), int(lengths.sum())):
        picks = pick(spec, context, **{**dict.fromkeys(_size_names(spec)), "num_tokens": limit})
        expect_valid(spec, picks, context)
        used = int(lengths[np.asarray(picks.positions)].sum())
        expect(used <= limit, f"{spec.address} chose {used} tokens with num_tokens={limit}.")
        expect(used > limit - lengths.max(), f"{spec.address} uses {used} of num_tokens={limit}; another row fits.")


def _has_size(spec: MethodSpec) -> bool:
    return bool(_sizes(spec))


def _has_token_limit(spec: MethodSpec) -> bool:
    return "num_tokens" in _size_names(spec)


def check_broken_model(spec: MethodSpec) -> None:
    """A model whose outputs are NaN draws an error of ours, or no score that is not NaN."""
    context = make_context(spec)
    scorers = [context.model, *([context.proxy.model] if context.proxy else [])]
    with torch.no_grad():
        for parameter in (each for model in scorers for each in model.parameters()):
            parameter.fill_(float("nan"))
    picks: Picks | None = _result_or_error(spec, "a model that gives NaN", lambda: pick(spec, context))
    if picks is not None and picks.scores is not None:
        finite = np.isfinite(np.asarray(picks.scores)[np.asarray(picks.positions)])
        expect(not finite.any(), f"{spec.address} turned NaN outputs into finite scores.")


def check_one_token_batch(spec: MethodSpec) -> None:
    """A micro-batch without any loss token, beside an ordinary one, does not spoil the step."""
    ordinary = toy_batches(1)[0]
    silent = {**ordinary, "labels": torch.full_like(ordinary["labels"], -100)}
    run = Rehearsal(spec)
    loss = run.step([ordinary, silent])
    expect(math.isfinite(loss), f"{spec.address}: the loss is {loss} with a micro-batch without loss tokens.")
    bad = [name for name, weight in run.weights().items() if not torch.isfinite(weight).all()]
    expect(not bad, f"{spec.address}: weights {bad[:3]} are not finite after a micro-batch without loss tokens.")


def check_bad_reading(spec: MethodSpec) -> None:
    """A NaN loss or probe reading is answered by a decision with a reason."""
    governor = new_governor(spec)
    last: Telemetry = play(governor, Tape(steps=20)).telemetry[-1]
    nan = float("nan")
    look = dataclasses.replace(
        last, step=21, compute=last.compute + 1, loss=nan, probe=ProbeReading(nan, nan, nan, num_examples=32)
    )
    decision = _result_or_error(spec, "a NaN reading", lambda: governor.observe(look))
    if decision is not None:
        expect(decision.action in ("continue", "stop") and decision.reason, f"{spec.address} gave {decision}.")


def _needs_target(spec: MethodSpec) -> bool:
    return spec.traits.needs_reference_set


def _scores_with_model(spec: MethodSpec) -> bool:
    return spec.traits.needs_model


_SELECTION = ("selection",)
CHECKS = (
    Check(check_empty_pool, kinds=_SELECTION),
    Check(check_one_example, kinds=_SELECTION),
    Check(check_equal_rows, kinds=_SELECTION),
    Check(check_long_row, kinds=_SELECTION),
    Check(check_rows_without_loss, kinds=_SELECTION),
    Check(check_missing_target, kinds=_SELECTION, when=_needs_target),
    Check(check_sizes, kinds=_SELECTION, when=_has_size),
    Check(check_token_limit, kinds=_SELECTION, when=_has_token_limit),
    Check(check_broken_model, kinds=_SELECTION, when=_scores_with_model),
    Check(check_one_token_batch, kinds=("memory",)),
    Check(check_bad_reading, kinds=("governor",)),
)
