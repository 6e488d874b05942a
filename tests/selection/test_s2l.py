"""s2l: the proxy's trajectories are clustered source by source, and every cluster gives its share."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_eff.contracts.cost import Facts
from hf_eff.engines.facts import model_facts
from hf_eff.engines.signal_pass import trace_signal
from hf_eff.errors import BudgetExceededError, DataError, ManifestError
from hf_eff.numerics.trajectory_clusters import order_by_trajectory
from hf_eff.numerics.water_filling import water_fill
from hf_eff.registry import get_method
from hf_eff.testing.selection_scene import chosen_hashes, make_context, pick, pool_facts_of, pool_of, toy_pool

SPEC = get_method("selection", "s2l")


class Tally:
    """Counts charges, and refuses the one after ``limit``."""

    def __init__(self, limit=math.inf):
        self.flops, self.tokens, self.limit = [], [], limit

    def __call__(self, flops, tokens):
        if len(self.flops) >= self.limit:
            raise BudgetExceededError("enough")
        self.flops.append(flops)
        self.tokens.append(tokens)


def literal(context):
    """Trajectories of the proxy, and the order dealt out of them, over rows sorted by content."""
    config = SPEC.config.from_dict(dict(SPEC.tiny))
    trajectories, _ = trace_signal(context.by_proxy(), config.trace(context.seed))
    rows = np.argsort(np.asarray(context.pool.row_hash), kind="stable")
    generator = torch.Generator().manual_seed(context.seed)
    order = order_by_trajectory(trajectories[rows], np.asarray(context.pool.sources)[rows], generator, clusters=3)
    return trajectories, rows[order.positions]


def test_the_choice_is_the_literal_one():
    picks = pick(SPEC, make_context(SPEC))
    trajectories, order = literal(make_context(SPEC))
    assert picks.positions.tolist() == order[:12].tolist()
    np.testing.assert_allclose(picks.scores, trajectories.mean(axis=1), rtol=1e-6)
    assert picks.notes["checkpoint_steps"] == [2, 4, 6]
    assert picks.notes["trained"] == "a proxy"
    assert json.loads(json.dumps(picks.notes)) == picks.notes


@pytest.mark.parametrize("count", [3, 11, 24])
def test_sources_share_by_water_filling(count):
    pool = toy_pool()
    pool.sources = ["small"] * 4 + ["large"] * 13 + ["middle"] * 7
    picks = pick(SPEC, make_context(SPEC, pool=pool), fraction=None, num_examples=count)
    found = {name: sum(pool.sources[i] == name for i in picks.positions) for name in ("small", "large", "middle")}
    assert list(found.values()) == water_fill([4, 13, 7], count).tolist()
    assert picks.notes["rows_by_source"] == {name: number for name, number in found.items() if number}
    whole = pick(SPEC, make_context(SPEC, pool=pool), source_column=None)
    assert "rows_by_source" not in whole.notes
    assert whole.notes["num_clusters"] <= 3 < picks.notes["num_clusters"]


def test_the_proxy_is_trained_and_the_model_never_run():
    context = make_context(SPEC)
    before = {name: value.clone() for name, value in context.proxy.model.state_dict().items()}
    calls = []
    context.model.register_forward_pre_hook(lambda *_: calls.append(1))
    picks = pick(SPEC, context)
    assert not calls
    assert all(torch.equal(value, before[name]) for name, value in context.proxy.model.state_dict().items())
    alone = make_context(SPEC)
    same = pick(SPEC, replace(alone, model=alone.proxy.model, forward_flops=alone.proxy.forward_flops, proxy=None))
    assert np.array_equal(same.scores, picks.scores)
    assert same.notes["trained"] == "model"


def test_choice_is_the_rows_whatever_their_order():
    order = np.random.default_rng(2).permutation(24).tolist()
    plain, turned = make_context(SPEC), make_context(SPEC, pool=toy_pool(order=order))
    assert chosen_hashes(pick(SPEC, plain), plain.pool) == chosen_hashes(pick(SPEC, turned), turned.pool)


def test_rows_without_a_finite_loss_are_left_out_and_not_learnt():
    from hf_eff.testing.tiny import tiny_model

    model = tiny_model(layers=1, width=32, tie_word_embeddings=False)
    pool = toy_pool(12)
    pool.rows[5]["input_ids"][0] = 261
    with torch.no_grad():
        model.model.embed_tokens.weight[261] = float("nan")
    context = make_context(SPEC, pool=pool, proxy=None, model=model)
    # Trained on the other rows: a loss that is not finite stops a training.
    options = {"train_fraction": 0.5, "fraction": 1.0}
    seeds = (seed for seed in range(20) if _trains_without(context, seed))
    picks = pick(SPEC, replace(context, seed=next(seeds)), **options)
    assert np.flatnonzero(np.isnan(picks.scores)).tolist() == [5]
    assert sorted(picks.positions.tolist()) == [row for row in range(12) if row != 5]


def _trains_without(context, seed):
    from hf_eff.engines.signal_pass import _trained_rows

    trace = SPEC.config.from_dict({**SPEC.tiny, "train_fraction": 0.5}).trace(seed)
    return 5 not in _trained_rows(context, trace)


KILLED = """
import os, signal, sys
from pathlib import Path
from hf_eff.registry import get_method
from hf_eff.testing.selection_scene import make_context, pick
spec, left = get_method("selection", "s2l"), [int(sys.argv[2])]
def spend(flops, tokens):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
pick(spec, make_context(spec, folder=Path(sys.argv[1]), spend=spend))
"""


def test_killed_and_run_again_is_bit_identical(tmp_path):
    whole, rest = Tally(), Tally()
    expected = pick(SPEC, make_context(SPEC, spend=whole))
    killed_at = len(whole.flops) - 2
    arguments = [sys.executable, "-c", KILLED, str(tmp_path / "s"), str(killed_at)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(arguments, check=False, timeout=300, env=environment)
    assert done.returncode == -signal.SIGKILL
    found = pick(SPEC, make_context(SPEC, folder=tmp_path / "s", spend=rest))
    assert len(rest.flops) == 2
    assert np.array_equal(found.scores, expected.scores)
    assert np.array_equal(found.positions, expected.positions)
    with pytest.raises(ManifestError, match="another selection"):
        pick(SPEC, make_context(SPEC, folder=tmp_path / "s"), learning_rate=1e-3)
    again = pick(SPEC, make_context(SPEC, folder=tmp_path / "s", spend=Tally(0)), clusters=2, normalize="center")
    assert again.notes["normalize"] == "center"


def test_impossible_sizes_cost_nothing_and_a_broken_proxy_is_named():
    with pytest.raises(DataError, match="more than the 24 valid rows"):
        pick(SPEC, make_context(SPEC, spend=Tally(0)), fraction=None, num_examples=99)


def test_the_predicted_cost_is_what_is_spent():
    pool = pool_of([{"input_ids": [5 + i] * 20, "labels": [5 + i] * 20} for i in range(16)])
    tally = Tally()
    context = make_context(SPEC, pool=pool, spend=tally)
    pick(SPEC, context)
    facts = Facts(model=model_facts(context.proxy.model), pool=pool_facts_of(pool, None))
    predicted = SPEC.cost(SPEC.config.from_dict(dict(SPEC.tiny)), facts)
    assert sum(tally.flops) == pytest.approx(predicted.flops, rel=0.03)
    assert sum(tally.tokens) == predicted.tokens
