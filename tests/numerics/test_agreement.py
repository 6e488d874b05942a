"""Rank correlation, overlap and isotonic fits, against other implementations and brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_eff.numerics.agreement import average_ranks, bootstrap_interval, isotonic, jaccard, spearman

SMALL = st.lists(st.integers(-3, 3), min_size=2, max_size=12)


@given(SMALL)
def test_ranks_are_mean_places(values):
    array = np.array(values, dtype=float)
    literal = [np.mean([place for place, v in enumerate(sorted(values)) if v == value]) for value in values]
    np.testing.assert_allclose(average_ranks(array), literal)


@given(SMALL, st.randoms(use_true_random=False))
def test_spearman_is_pearson_of_the_ranks(values, random):
    other = [random.randint(-3, 3) for _ in values]
    a, b = average_ranks(np.array(values, float)), average_ranks(np.array(other, float))
    expected = np.corrcoef(a, b)[0, 1] if a.std() and b.std() else 0.0
    assert spearman(np.array(values, float), np.array(other, float)) == pytest.approx(expected, abs=1e-12)


def test_spearman_sees_ranks_only():
    x = np.random.default_rng(0).normal(size=50)
    assert spearman(x, np.exp(3 * x)) == pytest.approx(1.0)
    assert spearman(x, -x) == pytest.approx(-1.0)
    assert spearman(x, np.zeros(50)) == 0.0


def test_jaccard():
    assert jaccard([1, 2, 3], [2, 3, 4]) == 0.5
    assert jaccard([], []) == 1.0
    assert jaccard([1], [2]) == 0.0


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    values = np.random.default_rng(1).normal(size=400)
    low, high = bootstrap_interval(lambda drawn: values[drawn].mean(), 400, np.random.default_rng(2), draws=2000)
    half = 1.96 * values.std() / 20
    assert (low, high) == (
        pytest.approx(values.mean() - half, abs=0.015),
        pytest.approx(values.mean() + half, abs=0.015),
    )


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=7))
def test_isotonic_is_the_best_increasing_fit(values):
    y = np.array(values, dtype=float)
    x = np.arange(len(y), dtype=float)
    fitted = isotonic(x, y, x)
    assert (np.diff(fitted) >= -1e-12).all()
    # The optimum is constant on blocks, each at its mean: try every way to cut.
    best = min(
        (cost for cut in itertools.product([0, 1], repeat=len(y) - 1) if (cost := _cost_of_blocks(y, cut)) is not None),
    )
    assert ((fitted - y) ** 2).sum() == pytest.approx(best, abs=1e-9)


def _cost_of_blocks(y, cut):
    edges = [0, *[i + 1 for i, c in enumerate(cut) if c], len(y)]
    means = [y[a:b].mean() for a, b in itertools.pairwise(edges)]
    if any(b < a for a, b in itertools.pairwise(means)):
        return None
    return sum(((y[a:b] - m) ** 2).sum() for (a, b), m in zip(itertools.pairwise(edges), means, strict=True))


def test_isotonic_reads_between_and_beyond():
    fitted = isotonic(np.array([0.0, 1.0]), np.array([2.0, 4.0]), np.array([-5.0, 0.5, 9.0]))
    np.testing.assert_allclose(fitted, [2.0, 3.0, 4.0])
