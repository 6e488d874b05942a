"""staff: equal models make it coverage by score, few rows see the model, and the size is always met."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_eff.contracts.cost import Facts
from hf_eff.contracts.selection import Scorer
from hf_eff.engines.facts import model_facts
from hf_eff.engines.value_gradients import value_gradient_norms
from hf_eff.errors import BudgetExceededError, DataError
from hf_eff.numerics.verified_bins import equal_width_bins
from hf_eff.numerics.water_filling import water_fill
from hf_eff.registry import get_method
from hf_eff.selection import staff
from hf_eff.testing.selection_scene import chosen_hashes, make_context, pick, pool_facts_of, pool_of, toy_pool

SPEC = get_method("selection", "staff")


def same_models(**changes):
    """A scene in which the proxy is the model."""
    context = make_context(SPEC, **changes)
    return replace(context, proxy=Scorer(context.model, context.forward_flops))


def test_scores_are_the_gradients_of_the_proxy():
    context = make_context(SPEC)
    factor = SPEC.config.from_dict(dict(SPEC.tiny)).factor(context.seed)
    expected = value_gradient_norms(context.by_proxy(), context.pool, factor)
    assert np.array_equal(pick(SPEC, context).scores, expected)


@pytest.mark.parametrize("count", [5, 20, 33])
def test_equal_models_are_coverage_by_score(count):
    options = {"fraction": None, "num_examples": count, "bins": 6}
    picks = pick(SPEC, same_models(pool=toy_pool(40)), **options)
    assert picks.notes["verified"] > 0
    assert set(picks.notes["bins"]["ratio"]) == {1.0}
    bins = equal_width_bins(picks.scores, 6)
    found = np.bincount(bins[picks.positions], minlength=6)
    assert found.tolist() == water_fill(np.bincount(bins, minlength=6), count).tolist()


def test_without_a_proxy_nothing_is_verified():
    context = make_context(SPEC, pool=toy_pool(40), proxy=None)
    picks = pick(SPEC, context, bins=6)
    bins = equal_width_bins(picks.scores, 6)
    found = np.bincount(bins[picks.positions], minlength=6)
    assert found.tolist() == water_fill(np.bincount(bins, minlength=6), 20).tolist()
    assert picks.notes["verified"] == 0


def scaled_target(monkeypatch, factor):
    """The model's gradients come out this many times as long."""

    def scaled(context, pool, about, *, name, **options):
        lengths = value_gradient_norms(context, pool, about, name=name, **options)
        return lengths * factor if name == "target" else lengths

    monkeypatch.setattr(staff, "value_gradient_norms", scaled)


def ratios(monkeypatch, factor, **options):
    scaled_target(monkeypatch, factor)
    picks = pick(SPEC, make_context(SPEC, pool=toy_pool(40)), **{"verify_rows": 3, **options})
    return picks, np.asarray(picks.notes["bins"]["ratio"])


def test_scaling_the_models_scores_scales_the_papers_ratios_only(monkeypatch):
    plain, before = ratios(monkeypatch, 0.5, rule="paper")
    assert ((before > 0.1) & (before < 5)).all()
    scaled, after = ratios(monkeypatch, 1.0, rule="paper")
    assert after == pytest.approx(2 * before, abs=2e-4)
    plain, before = ratios(monkeypatch, 1.0, rule="repo")
    scaled, after = ratios(monkeypatch, 4.0, rule="repo")
    assert np.array_equal(before, after)
    assert np.array_equal(plain.positions, scaled.positions)


@pytest.mark.parametrize("rule", ["paper", "repo"])
def test_few_rows_see_the_model(rule):
    context, bills, calls = make_context(SPEC, pool=toy_pool(64), batch_tokens=1), [], []
    context.model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    spending = replace(context, spend=lambda flops, tokens: bills.append(flops))
    picks = pick(SPEC, spending, rule=rule, bins=5, verify_rows=4)
    sizes = np.asarray(picks.notes["bins"]["rows"])
    wanted = np.minimum(sizes, 4) if rule == "paper" else 4 * (sizes > 4)
    assert sum(calls) == picks.notes["verified"] == wanted.sum() <= 5 * 4
    assert len(bills) == 64 + sum(calls)


@pytest.mark.parametrize("rule", ["paper", "repo"])
@pytest.mark.parametrize("in_bin", ["random", "top"])
@pytest.mark.parametrize("factor", [0.05, 20.0])
def test_the_size_is_met_whatever_the_ratios(rule, in_bin, factor, monkeypatch):
    scaled_target(monkeypatch, factor)
    for count in (1, 17, 40):
        options = {"rule": rule, "in_bin": in_bin, "fraction": None, "num_examples": count}
        picks = pick(SPEC, make_context(SPEC, pool=toy_pool(40)), **options)
        assert len(set(picks.positions.tolist())) == count
        assert json.loads(json.dumps(picks.notes)) == picks.notes


def test_a_bin_gives_its_highest_scores_or_random_rows():
    picks = pick(SPEC, same_models(pool=toy_pool(40)), in_bin="top")
    bins = equal_width_bins(picks.scores, 4)
    for number in range(4):
        members = np.flatnonzero(bins == number)
        taken = np.isin(members, picks.positions)
        if taken.any() and not taken.all():
            assert picks.scores[members[taken]].min() >= picks.scores[members[~taken]].max()
    other = pick(SPEC, same_models(pool=toy_pool(40)), in_bin="random")
    assert set(other.positions.tolist()) != set(picks.positions.tolist())


def test_the_repo_sets_the_hardest_aside():
    picks = pick(SPEC, make_context(SPEC, pool=toy_pool(40)), rule="repo")
    hardest = np.argsort(-picks.scores)[:4]
    assert picks.notes["set_aside"] == 4
    assert not set(hardest.tolist()) & set(picks.positions.tolist())
    everything = pick(SPEC, make_context(SPEC, pool=toy_pool(40)), rule="repo", fraction=1.0)
    assert set(everything.positions[-4:].tolist()) == set(hardest.tolist())
    kept = pick(SPEC, make_context(SPEC, pool=toy_pool(40)), rule="repo", discard_hardest=0.0)
    assert kept.notes["set_aside"] == 0


def test_choice_is_the_rows_whatever_their_order():
    order = np.random.default_rng(2).permutation(24).tolist()
    plain, turned = make_context(SPEC), make_context(SPEC, pool=toy_pool(order=order))
    assert chosen_hashes(pick(SPEC, plain), plain.pool) == chosen_hashes(pick(SPEC, turned), turned.pool)


def test_broken_models_are_named_and_impossible_sizes_cost_nothing():
    def spend(flops, tokens):
        raise BudgetExceededError("computed")

    with pytest.raises(DataError, match="more than the 24 valid rows"):
        pick(SPEC, make_context(SPEC, spend=spend), fraction=None, num_examples=99)
    for broken, message in (("model", "any verified row"), ("proxy", "no row of the pool has a finite gradient")):
        context = make_context(SPEC)
        model = context.model if broken == "model" else context.proxy.model
        torch.nn.init.constant_(model.model.norm.weight, float("nan"))
        with pytest.raises(DataError, match=message):
            pick(SPEC, context)


def test_an_interrupted_run_goes_on(tmp_path):
    expected = pick(SPEC, make_context(SPEC))
    left = [2]

    def spend(flops, tokens):
        left[0] -= 1
        if left[0] < 0:
            raise BudgetExceededError("enough")

    with pytest.raises(BudgetExceededError):
        pick(SPEC, make_context(SPEC, folder=tmp_path / "s", spend=spend))
    found = pick(SPEC, make_context(SPEC, folder=tmp_path / "s"))
    assert np.array_equal(found.positions, expected.positions)
    assert found.notes == expected.notes


def test_the_predicted_cost_is_what_is_spent():
    rng = np.random.default_rng(0)
    ids = [rng.integers(5, 200, 20).tolist() for _ in range(64)]
    bills = []
    context = same_models(
        pool=pool_of([{"input_ids": each, "labels": each} for each in ids]),
        spend=lambda flops, tokens: bills.append((flops, tokens)),
    )
    # Bins that are empty or small make the forecast of the verification an upper bound.
    picks = pick(SPEC, context, bins=2)
    assert picks.notes["verified"] == 4
    facts = Facts(model=model_facts(context.model), pool=pool_facts_of(context.pool, None))
    predicted = SPEC.cost(SPEC.config.from_dict({**SPEC.tiny, "bins": 2}), facts)
    assert sum(flops for flops, _ in bills) == pytest.approx(predicted.flops, rel=1e-12)
    assert sum(tokens for _, tokens in bills) == predicted.tokens
