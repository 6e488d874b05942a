"""Bins have one width, coverage is water-filling, and verification shifts a budget as the rule says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_eff.errors import OptionError
from hf_eff.numerics.verified_bins import coverage_order, equal_width_bins, verification_ratios, verified_shares
from hf_eff.numerics.water_filling import water_fill

SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=8)


@given(scores=st.lists(st.floats(-50, 50), min_size=1, max_size=60), bins=st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_bins_are_intervals_of_one_width(scores, bins):
    found = equal_width_bins(scores, bins)
    assert found.min() == 0
    assert found.max() <= bins - 1
    low, width = min(scores), (max(scores) - min(scores)) / bins
    for score, number in zip(scores, found, strict=True):
        if width > 1e-6:
            slack = 1e-9 * width + 1e-12
            assert low + number * width - slack <= score <= low + (number + 1) * width + slack
    if width > 1e-6:
        assert found[int(np.argmax(scores))] == bins - 1


def test_equal_scores_and_no_scores_have_bins():
    assert equal_width_bins([3.0] * 4, 5).tolist() == [0] * 4
    assert equal_width_bins([], 5).tolist() == []


@given(bins=st.lists(st.integers(0, 5), min_size=1, max_size=60), seed=st.integers(0, 100))
@settings(max_examples=100, deadline=None)
def test_every_beginning_of_a_coverage_order_is_a_water_fill(bins, seed):
    labels = np.asarray(bins)
    preference = np.random.default_rng(seed).permutation(len(labels))
    order = coverage_order(labels, preference)
    assert sorted(order.tolist()) == list(range(len(labels)))
    names, sizes = np.unique(labels, return_counts=True)
    # Of bins of one size the one first met in the order of names is served first, here as there.
    for total in range(len(labels) + 1):
        found = [int((labels[order[:total]] == name).sum()) for name in names]
        assert found == water_fill(sizes, total).tolist()
    for name in names:
        assert order[labels[order] == name].tolist() == preference[labels[preference] == name].tolist()


@given(sizes=SIZES, total=st.integers(0, 150), rule=st.sampled_from(["paper", "repo"]))
@settings(max_examples=100, deadline=None)
def test_ratios_of_one_are_water_filling(sizes, total, rule):
    assert verified_shares(sizes, np.ones(len(sizes)), total, rule).tolist() == water_fill(sizes, total).tolist()


def literal_shares(sizes, ratios, total, rule):
    """Allocation bin by bin, from the smallest on."""
    shares, left = [0] * len(sizes), total
    served = sorted((b for b in range(len(sizes)) if sizes[b]), key=lambda b: sizes[b])
    while served:
        bin_ = served[0]
        whole = len(served) if rule == "paper" else sum(ratios[b] for b in served)
        shares[bin_] = min(sizes[bin_], int(left * ratios[bin_] / whole + 1e-9), left)
        left -= shares[bin_]
        served = served[1:]
    return shares


@given(
    sizes=SIZES,
    ratios=st.lists(st.floats(0.1, 10), min_size=8, max_size=8),
    total=st.integers(0, 150),
    rule=st.sampled_from(["paper", "repo"]),
)
@settings(max_examples=200, deadline=None)
def test_shares_are_the_literal_loop_and_fit(sizes, ratios, total, rule):
    worth = ratios[: len(sizes)]
    found = verified_shares(sizes, worth, total, rule)
    assert found.tolist() == literal_shares(sizes, worth, total, rule)
    assert found.sum() <= min(total, sum(sizes))
    assert (found <= np.asarray(sizes)).all()


def test_scaling_all_ratios_moves_the_paper_rule_only():
    sizes, ratios = [20, 30, 40], np.array([1.0, 0.5, 0.8])
    for factor in (2.0, 0.5):
        repo = verified_shares(sizes, ratios * factor, 30, "repo")
        assert repo.tolist() == verified_shares(sizes, ratios, 30, "repo").tolist()
        paper = verified_shares(sizes, ratios * factor, 30, "paper")
        assert paper.tolist() != verified_shares(sizes, ratios, 30, "paper").tolist()
    first = verified_shares(sizes, ratios, 30, "paper")[0]
    assert verified_shares(sizes, ratios * 2, 30, "paper")[0] == 2 * first


def test_ratios_are_sums_over_a_bins_rows_within_bounds():
    proxy, target = [1.0, 3.0, 2.0, 1.0, 0.0, 0.0, 5.0], [2.0, 4.0, 500.0, 0.0, 1.0, 0.0, np.nan]
    found = verification_ratios(proxy, target, np.array([0, 0, 1, 2, 3, 4, 6]), 7)
    # 6/4, above the bound, below it, proxy zero, both zero, nothing verified, target unknown
    assert found.tolist() == pytest.approx([1.5, 10.0, 0.1, 10.0, 1.0, 1.0, 1.0])


def test_equal_models_have_ratios_of_one_and_scaling_the_target_scales_them():
    scores, bins = np.random.default_rng(0).random(40), np.arange(40) % 5
    assert verification_ratios(scores, scores, bins, 5).tolist() == [1.0] * 5
    assert verification_ratios(scores, 3 * scores, bins, 5) == pytest.approx([3.0] * 5)


def test_an_unknown_rule_is_refused():
    with pytest.raises(OptionError, match="rule must be one of"):
        verified_shares([1], [1.0], 1, "mine")
