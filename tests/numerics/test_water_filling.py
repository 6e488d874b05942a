"""Allocators against brute force."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hf_eff.numerics.water_filling import largest_remainder, water_fill


def fairest(sizes, total):
    """Of all ways to share, the one whose sorted shares are lexicographically largest (max-min fairness)."""
    ways = itertools.product(*(range(size + 1) for size in sizes))
    return max(sorted(way) for way in ways if sum(way) == min(total, sum(sizes)))


@pytest.mark.parametrize("seed", range(40))
def test_water_fill_equals_brute_force(seed):
    generator = np.random.default_rng(seed)
    sizes = generator.integers(0, 5, size=generator.integers(1, 7)).tolist()
    for total in range(sum(sizes) + 2):
        shares = water_fill(sizes, total)
        assert sorted(shares.tolist()) == fairest(sizes, total)
        assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=30), st.integers(0, 10**7))
@example([1, 1], 1)
def test_water_fill_spends_all_it_can_evenly(sizes, total):
    shares = water_fill(sizes, total)
    assert shares.sum() == min(total, sum(sizes))
    open_bins = [share for share, size in zip(shares.tolist(), sizes, strict=True) if share < size]
    if open_bins:
        assert max(shares) <= min(open_bins) + 1  # by the indivisible rest: of [1, 1] one bin is full when 1 is shared


def hamilton(sizes, total):
    exact = [Fraction(size * total, sum(sizes)) for size in sizes]
    shares = [int(share) for share in exact]
    order = sorted(range(len(sizes)), key=lambda b: (-(exact[b] - shares[b]), b))
    for bin_ in order[: total - sum(shares)]:
        shares[bin_] += 1
    return shares


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=12), st.floats(0, 1))
def test_largest_remainder_equals_exact_fractions(sizes, part):
    total = int(sum(sizes) * part)
    shares = largest_remainder(sizes, total).tolist()
    assert shares == (hamilton(sizes, total) if sum(sizes) else [0] * len(sizes))
    assert all(share <= size for share, size in zip(shares, sizes, strict=True))
