"""bids: LESS influences, row by row, balanced."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from hf_eff.contracts.cost import Facts
from hf_eff.engines.facts import model_facts
from hf_eff.errors import BudgetExceededError, DataError
from hf_eff.registry import build, get_method
from hf_eff.testing.selection_scene import (
    chosen_hashes,
    make_context,
    pick,
    pool_facts_of,
    pool_of,
    toy_pool,
    toy_target,
)

pytest.importorskip("peft")

SPEC = get_method("selection", "bids")
LESS = get_method("selection", "less")


def alone(target, row):
    return replace(pool_of([target.rows[row]]), groups=None)


def influences(pool, target):
    """[N, V] by LESS with one target row at a time."""
    less = {**SPEC.tiny, "store_dtype": "float32"}
    return np.stack(
        [
            build(LESS, less).select(make_context(LESS, proxy=None, pool=pool, reference=alone(target, row))).scores
            for row in range(len(target))
        ],
        axis=1,
    )


def literal(influence, count, mode):
    """Standardise, cut, take one by one, looking at everything every time."""
    table = np.clip((influence - influence.mean(axis=0)) / influence.std(axis=0), -6, 6)
    taken = []
    for step in range(count):
        mean = table[taken].mean(axis=0) if taken else np.zeros(table.shape[1])
        lead = table - mean if mode == "max_row" or not step else table[:, [mean.argmin()]]
        free = [row for row in range(len(table)) if row not in taken]
        taken.append(max(free, key=lambda row: lead[row].max()))
    return taken


@pytest.mark.parametrize("mode", ["max_row", "argmin_task"])
def test_equals_the_literal_steps_on_less_scores(mode):
    pool, target = toy_pool(40), toy_target(5)
    expected = literal(influences(pool, target), 10, mode)
    context = make_context(SPEC, proxy=None, pool=pool, reference=target)
    picks = pick(SPEC, context, mode=mode, store_dtype="float32")
    assert picks.positions.tolist() == expected


def test_one_target_row_is_less():
    pool, target = toy_pool(40), alone(toy_target(), 3)
    ours = pick(SPEC, make_context(SPEC, proxy=None, pool=pool, reference=target))
    theirs = build(LESS, dict(SPEC.tiny)).select(make_context(LESS, proxy=None, pool=pool, reference=target))
    assert ours.positions.tolist() == theirs.positions.tolist()


def test_both_tasks_of_a_mixed_target_are_served():
    """Nine target rows of one kind and three of the other: a mean over the target would serve the nine."""
    pool = toy_pool(80)
    sums = [row for row in range(80) if pool.sources[row] == "sum"]
    others = [row for row in range(80) if pool.sources[row] != "sum"]
    rows = sums[:9] + others[:3]
    target = replace(pool_of([pool.rows[row] for row in rows]), groups=None)
    rest = pool.take([row for row in range(80) if row not in rows])

    def share(method):
        picks = build(method, dict(SPEC.tiny)).select(make_context(method, pool=rest, reference=target))
        return np.mean([rest.sources[row] == "sum" for row in picks.positions])

    assert share(LESS) > 0.95
    assert 0.3 < share(SPEC) < 0.9


def test_order_of_pool_and_target_does_not_matter():
    order = np.random.default_rng(2).permutation(24).tolist()
    plain = make_context(SPEC, proxy=None)
    mixed = make_context(SPEC, proxy=None, pool=toy_pool(order=order), reference=toy_target().take(range(7, -1, -1)))
    first, second = pick(SPEC, plain), pick(SPEC, mixed)
    assert chosen_hashes(first, plain.pool) == chosen_hashes(second, mixed.pool)


def test_rows_without_loss_are_never_chosen_and_do_not_shift_the_scale():
    pool = toy_pool()
    pool.rows[3] = {**pool.rows[3], "labels": [-100] * len(pool.rows[3]["labels"])}
    pool.loss_lengths[3] = 0
    picks = pick(SPEC, make_context(SPEC, proxy=None, pool=pool), fraction=1.0)
    assert sorted(picks.positions.tolist()) == [row for row in range(24) if row != 3]
    assert np.flatnonzero(np.isnan(picks.scores)).tolist() == [3]


def test_reasons_notes_and_scores():
    picks = pick(SPEC, make_context(SPEC, proxy=None))
    notes = json.loads(json.dumps(dict(picks.notes)))
    assert (notes["variant"], notes["mode"], notes["num_scored"]) == ("fixed", "max_row", 24)
    assert sum(notes["rows_by_target"].values()) == len(picks.positions) == 6
    first = picks.positions[0]
    assert picks.scores[first] == np.nanmax(picks.scores)
    assert picks.reasons[0].startswith(f"{picks.scores[first]:.2g} deviations for target row ")
    assert "(sum)" in picks.reasons[0]
    assert picks.scores.dtype == np.float64


def test_a_tight_bound_changes_the_choice():
    pool, target = toy_pool(60), toy_target()
    free, cut = (
        pick(SPEC, make_context(SPEC, proxy=None, pool=pool, reference=target), clip=clip) for clip in (None, 0.5)
    )
    assert np.nanmax(cut.scores) == 0.5 < np.nanmax(free.scores)
    assert free.positions.tolist() != cut.positions.tolist()


def test_features_are_reused_when_mode_or_size_change(tmp_path):
    pick(SPEC, make_context(SPEC, proxy=None, folder=tmp_path / "s"))

    def refuse(flops, tokens):
        raise BudgetExceededError("nothing is left to compute")

    found = pick(
        SPEC, make_context(SPEC, proxy=None, folder=tmp_path / "s", spend=refuse), mode="argmin_task", fraction=0.5
    )
    assert len(found.positions) == 12


def test_cost_and_missing_target():
    charges = []
    context = make_context(SPEC, proxy=None, pool=toy_pool(60), spend=lambda flops, tokens: charges.append(flops))
    pick(SPEC, context)
    facts = Facts(model=model_facts(context.model), pool=pool_facts_of(context.pool, context.reference))
    forecast = SPEC.cost(SPEC.config.from_dict(dict(SPEC.tiny)), facts).flops
    assert sum(charges) / 1.2 < forecast < 1.35 * sum(charges)
    with pytest.raises(DataError, match="selection='bids' needs target rows"):
        pick(SPEC, make_context(SPEC, proxy=None, reference=None))
