"""el2n: equals softmax minus one-hot token by token, averages its checkpoints, and skips or covers as asked."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_eff.contracts.cost import Facts
from hf_eff.engines.facts import model_facts
from hf_eff.engines.signal_pass import trace_signal
from hf_eff.errors import BudgetExceededError, DataError
from hf_eff.numerics.verified_bins import equal_width_bins
from hf_eff.numerics.water_filling import water_fill
from hf_eff.registry import get_method
from hf_eff.testing.selection_scene import chosen_hashes, make_context, pick, pool_facts_of, pool_of, toy_pool
from hf_eff.testing.tiny import tiny_model

SPEC = get_method("selection", "el2n")
AS_IS = {"checkpoints": 0}


def sharp_model():
    model = tiny_model(layers=2, width=32, attn_implementation="eager")
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def literal(model, row, reduction):
    """Lengths of softmax minus one-hot over the answer's tokens, reduced."""
    with torch.no_grad():
        p = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double().softmax(1)
    labels = [(t, y) for t, y in enumerate(row["labels"]) if t and y != -100]
    errors = [float((p[t - 1] - torch.nn.functional.one_hot(torch.tensor(y), 262)).norm()) for t, y in labels]
    return {
        "mean": np.mean(errors),
        "rms": math.sqrt(np.mean(np.square(errors))),
        "max": max(errors),
    }[reduction]


@pytest.mark.parametrize("reduction", ["mean", "rms", "max"])
def test_scores_are_the_definition_row_by_row(reduction):
    model, pool = sharp_model(), toy_pool(12)
    picks = pick(SPEC, make_context(SPEC, proxy=None, model=model, pool=pool), reduction=reduction, **AS_IS)
    np.testing.assert_allclose(picks.scores, [literal(model, row, reduction) for row in pool.rows], rtol=1e-4)
    assert picks.positions.tolist() == np.argsort(-picks.scores)[:6].tolist()


def test_a_uniform_model_errs_by_the_closed_form():
    model = tiny_model(layers=2, width=32).double()
    torch.nn.init.zeros_(model.lm_head.weight)
    picks = pick(SPEC, make_context(SPEC, proxy=None, model=model), **AS_IS)
    np.testing.assert_allclose(picks.scores, math.sqrt(1 - 1 / 262), rtol=1e-12)


@pytest.mark.parametrize("options", [AS_IS, {}])
def test_the_batch_size_and_padding_do_not_matter(options):
    alone = pick(SPEC, make_context(SPEC, proxy=None, model=sharp_model(), batch_tokens=1), **options)
    other = pick(SPEC, make_context(SPEC, proxy=None, model=sharp_model(), extra_padding=7), **options)
    np.testing.assert_allclose(other.scores, alone.scores, rtol=1e-3)
    assert other.positions.tolist() == alone.positions.tolist()


def test_checkpoints_are_averaged():
    context = make_context(SPEC, proxy=None)
    config = SPEC.config.from_dict(dict(SPEC.tiny))
    picks = pick(SPEC, context)
    values, facts = trace_signal(context, config.trace(context.learning_rate, context.seed))
    assert picks.notes["checkpoint_steps"] == facts["checkpoint_steps"] == [2, 3]
    np.testing.assert_allclose(picks.scores, values.mean(axis=1, dtype=np.float64), rtol=1e-6)
    assert not np.allclose(picks.scores, pick(SPEC, context, **AS_IS).scores, atol=1e-4)


def test_no_warm_up_rows_score_the_model_as_it_is():
    context = make_context(SPEC, proxy=None)
    assert np.array_equal(pick(SPEC, context, warmup_fraction=0.0).scores, pick(SPEC, context, **AS_IS).scores)


def test_the_hardest_are_skipped():
    context = make_context(SPEC, proxy=None, model=sharp_model())
    picks = pick(SPEC, context, fraction=0.5, skip_hardest=0.25, **AS_IS)
    assert picks.positions.tolist() == np.argsort(-picks.scores)[6:18].tolist()
    assert picks.notes["skipped"] == 6


@pytest.mark.parametrize("skip", [0.0, 0.25])
@pytest.mark.parametrize("count", [5, 12])
def test_coverage_is_water_filling_over_bins_of_one_width(skip, count):
    context = make_context(SPEC, proxy=None, pool=toy_pool(40), model=sharp_model())
    options = {"coverage": "ccs", "bins": 7, "skip_hardest": skip, "fraction": None, "num_examples": count}
    picks = pick(SPEC, context, **options, **AS_IS)
    window = np.argsort(-picks.scores)[int(skip * 40) :]
    bins = np.full(40, -1)
    bins[window] = equal_width_bins(picks.scores[window], 7)
    assert (bins[picks.positions] >= 0).all()
    found = np.bincount(bins[picks.positions], minlength=7)
    assert found.tolist() == water_fill(np.bincount(bins[window], minlength=7), count).tolist()
    other = pick(
        SPEC, make_context(SPEC, proxy=None, pool=toy_pool(40), model=sharp_model(), seed=8), **options, **AS_IS
    )
    assert set(other.positions.tolist()) != set(picks.positions.tolist())


def test_coverage_depends_on_content_not_on_order():
    order = np.random.default_rng(1).permutation(40)
    plain, turned = (
        make_context(SPEC, proxy=None, pool=pool, model=sharp_model()) for pool in (toy_pool(40), toy_pool(40, order))
    )
    options = {"coverage": "ccs", "bins": 5, **AS_IS}
    assert chosen_hashes(pick(SPEC, plain, **options), plain.pool) == chosen_hashes(
        pick(SPEC, turned, **options), turned.pool
    )


def test_noise_scores_high_after_a_warm_up():
    """Answers that follow from the prompt are learnt; random ones are not."""
    rng = np.random.default_rng(0)
    clean = [[10, 20 + i % 3, 30 + i % 3, 30 + i % 3] for i in range(40)]
    noise = [[10, 20 + i % 3, *rng.integers(100, 250, 2)] for i in range(8)]
    rows = [
        {"input_ids": [int(t) for t in ids], "labels": [-100, -100, *map(int, ids[2:])]} for ids in [*clean, *noise]
    ]
    context = make_context(SPEC, proxy=None, pool=pool_of(rows))
    options = {"checkpoints": 1, "warmup_epochs": 8, "warmup_fraction": 1.0, "target_modules": ("down_proj", "q_proj")}
    picks = pick(SPEC, context, fraction=None, num_examples=8, lora_r=8, learning_rate=2e-2, **options)
    assert set(picks.positions.tolist()) == set(range(40, 48))


def test_impossible_windows_and_sizes_cost_nothing():
    def spend(flops, tokens):
        raise BudgetExceededError("computed")

    for options, message in (
        ({"fraction": 0.8, "skip_hardest": 0.3}, "skip_hardest=0.3 leaves 17 of 24 rows and 19 are to be kept"),
        ({"fraction": None, "num_tokens": 50, "skip_hardest": 1.0}, "leaves 0 of 24"),
        ({"fraction": None, "num_examples": 99}, "more than the 24 valid rows"),
    ):
        with pytest.raises(DataError, match=message):
            pick(SPEC, make_context(SPEC, proxy=None, spend=spend), **options)


@pytest.mark.parametrize("options", [AS_IS, {}])
def test_the_predicted_cost_is_what_is_spent(options):
    rows = [{"input_ids": [5 + i] * 20, "labels": [5 + i] * 20} for i in range(16)]
    pool, bills = pool_of(rows), []
    context = make_context(SPEC, proxy=None, pool=pool, spend=lambda flops, tokens: bills.append((flops, tokens)))
    pick(SPEC, context, **options)
    facts = Facts(model=model_facts(context.model), pool=pool_facts_of(pool, None))
    predicted = SPEC.cost(SPEC.config.from_dict({**SPEC.tiny, **options}), facts)
    assert sum(flops for flops, _ in bills) == pytest.approx(predicted.flops, rel=0.03)
    assert sum(tokens for _, tokens in bills) == predicted.tokens
