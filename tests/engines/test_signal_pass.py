"""Signals of a pool equal those row by row, and a trace is the warm-up's own training looked at on the way."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_eff.contracts.cost import Facts
from hf_eff.engines.adapter import LoraShape, temporary_adapter
from hf_eff.engines.facts import model_facts
from hf_eff.engines.scoring import pool_losses, scoring_mode
from hf_eff.engines.signal_pass import SignalTrace, output_logits, pool_signals, trace_signal
from hf_eff.engines.warmup import WarmupSettings, warm_up
from hf_eff.errors import BudgetExceededError, DataError, ManifestError, PlanError, ScoringStoppedError
from hf_eff.numerics.output_signals import SIGNALS, token_signals
from hf_eff.registry import get_method
from hf_eff.testing.selection_scene import make_context, pool_facts_of, pool_of, toy_pool, unlabelled

SPEC = get_method("selection", "perplexity")
WARMUP = WarmupSettings(epochs=2, batch_size=5, learning_rate=1e-2, seed=3)
TRACE = SignalTrace(shape=LoraShape(2, 4, None), warmup=WARMUP, checkpoints=4, train_fraction=0.5)


def context(**changes):
    return make_context(SPEC, **changes)


def test_signals_are_those_of_each_row_alone():
    scene = context()
    found = pool_signals(scene, scene.pool, SIGNALS)
    for place, row in enumerate(scene.pool.rows):
        with torch.no_grad():
            logits = scene.model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
        at = [t for t, label in enumerate(row["labels"]) if t and label != -100]
        expected = token_signals(logits[[t - 1 for t in at]], torch.tensor([row["labels"][t] for t in at]))
        for name in SIGNALS:
            assert found[name][place] == pytest.approx(float(getattr(expected, name).mean()), rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("changes", [{"batch_tokens": 1}, {"extra_padding": 7}])
def test_batches_and_padding_do_not_matter(changes):
    plain, other = context(), context(**changes)
    for first, second in zip(
        pool_signals(plain, plain.pool, SIGNALS).values(),
        pool_signals(other, other.pool, SIGNALS).values(),
        strict=True,
    ):
        np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5)


def test_mean_loss_is_the_pools_loss():
    scene = context()
    np.testing.assert_allclose(
        pool_signals(scene, scene.pool, ["loss"])["loss"], pool_losses(scene, scene.pool), rtol=1e-6
    )


def test_rows_without_loss_and_broken_rows_have_no_signal():
    pool = toy_pool(8)
    pool.rows[3]["labels"] = [-100] * len(pool.rows[3]["labels"])
    pool.loss_lengths[3] = 0
    scene = context(pool=pool)
    assert np.flatnonzero(np.isnan(pool_signals(scene, pool)["el2n"])).tolist() == [3]
    torch.nn.init.constant_(scene.model.model.norm.weight, float("nan"))
    assert np.isnan(pool_signals(scene, pool)["el2n"]).all()


def test_models_without_logits_are_refused():
    scene = context()
    trunk = replace(scene, model=scene.model.model)
    with pytest.raises(DataError, match="gives no logits"):
        output_logits(trunk, {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([[1, 2]])})


@pytest.mark.parametrize("stop", ["budget", "request"])
def test_a_pass_stops_when_told(stop):
    def refuse(flops, tokens):
        raise BudgetExceededError("enough")

    scene = context(spend=refuse) if stop == "budget" else context(stop_requested=lambda: True)
    with pytest.raises(BudgetExceededError if stop == "budget" else ScoringStoppedError):
        pool_signals(scene, scene.pool)


def test_a_trace_looks_at_the_warm_ups_own_training():
    """Checkpoints at the ends of epochs are those that ``warm_up`` gives, and the last is the last."""
    scene = context()
    values, facts = trace_signal(scene, TRACE)
    # 12 of 24 rows in steps of 5: 3 steps an epoch, 6 in all.
    assert facts["checkpoint_steps"] == [2, 3, 5, 6]
    assert facts["train_rows"] == 12
    from hf_eff.engines.signal_pass import _trained_rows

    with scoring_mode(scene.model), temporary_adapter(scene.model, TRACE.shape, WARMUP.seed) as adapter:
        ends = warm_up(scene, adapter, _trained_rows(scene, TRACE), WARMUP)
        for column, checkpoint in ((1, ends[0]), (3, ends[1])):
            adapter.load(checkpoint.weights)
            np.testing.assert_allclose(values[:, column], pool_losses(scene, scene.pool), rtol=1e-5)
    assert np.abs(np.diff(values, axis=1)).min(axis=0).max() > 0


def test_training_shows_in_the_trace():
    scene = context()
    values, _ = trace_signal(scene, replace(TRACE, train_fraction=1.0, warmup=replace(WARMUP, epochs=3)))
    assert values.dtype == np.float32
    assert values.mean(axis=0)[-1] < values.mean(axis=0)[0] < np.mean(pool_losses(scene, scene.pool))


def test_more_checkpoints_than_steps_are_all_steps():
    _, facts = trace_signal(context(), replace(TRACE, checkpoints=50))
    assert facts["checkpoint_steps"] == [1, 2, 3, 4, 5, 6]


class Tally:
    def __init__(self, limit=math.inf):
        self.flops, self.tokens, self.limit = [], [], limit

    def __call__(self, flops, tokens):
        if len(self.flops) >= self.limit:
            raise BudgetExceededError("enough")
        self.flops.append(flops)
        self.tokens.append(tokens)


def test_interrupted_anywhere_and_resumed_is_bit_identical(tmp_path):
    whole, pool = Tally(), toy_pool(12)
    trace = replace(TRACE, warmup=replace(WARMUP, batch_size=3), checkpoints=3)
    expected, facts = trace_signal(context(pool=pool, spend=whole), trace)
    total = len(whole.flops)
    assert facts["checkpoint_steps"] == [2, 3, 4]
    assert total == 4 + 3 * 2
    for limit in range(total):
        folder, rest = tmp_path / str(limit), Tally()
        with pytest.raises(BudgetExceededError):
            trace_signal(context(pool=pool, spend=Tally(limit), folder=folder), trace)
        found, _ = trace_signal(context(pool=pool, spend=rest, folder=folder), trace)
        assert np.array_equal(found, expected), limit
        # An unfinished epoch of two steps is redone, a finished batch of scoring never.
        assert len(rest.flops) == total - limit + (limit % 2 if limit < 4 else 0)


def test_a_folder_of_another_trace_is_refused(tmp_path):
    trace_signal(context(folder=tmp_path / "s"), TRACE)
    again, _ = trace_signal(context(folder=tmp_path / "s", spend=Tally(0)), TRACE)
    assert np.array_equal(again, trace_signal(context(), TRACE)[0])
    for changed in (
        replace(TRACE, checkpoints=2),
        replace(TRACE, signal="el2n"),
        replace(TRACE, warmup=replace(WARMUP, learning_rate=1e-3)),
    ):
        with pytest.raises(ManifestError, match="another selection"):
            trace_signal(context(folder=tmp_path / "s"), changed)
    with pytest.raises(ManifestError, match="another selection"):
        trace_signal(context(folder=tmp_path / "s", pool=toy_pool(20)), TRACE)


def test_cost_is_what_is_charged():
    pool = pool_of([{"input_ids": [5 + i] * 20, "labels": [5 + i] * 20} for i in range(20)])
    tally = Tally()
    scene = context(pool=pool, spend=tally)
    trace_signal(scene, TRACE)
    flops, tokens, _ = TRACE.cost(Facts(model=model_facts(scene.model), pool=pool_facts_of(pool, None)))
    # The adapter is estimated from above: key and value projections are narrower.
    assert flops == pytest.approx(sum(tally.flops), rel=0.03)
    assert tokens == sum(tally.tokens)


def test_disk_forecast_is_what_is_written(tmp_path):
    pool = toy_pool(60)
    scene = context(pool=pool, folder=tmp_path / "s")
    trace_signal(scene, TRACE)
    files = [path for path in (tmp_path / "s").rglob("*") if path.suffix in (".bin", ".safetensors")]
    disk = TRACE.cost(Facts(model=model_facts(scene.model), pool=pool_facts_of(pool, None)))[2]
    assert disk / 1.4 < sum(path.stat().st_size for path in files) < 1.4 * disk


def test_what_cannot_be_traced_is_refused():
    with pytest.raises(PlanError, match="never negative"):
        trace_signal(context(), replace(TRACE, signal="margin"))
    with pytest.raises(DataError, match="none of the 24 rows"):
        trace_signal(context(pool=unlabelled(toy_pool())), TRACE)
