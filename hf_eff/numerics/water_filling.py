"""Sharing an amount among bins of limited size: as evenly as possible, or in proportion."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def water_fill(sizes: Sequence[int] | np.ndarray, total: int) -> np.ndarray:
    """Give every bin the same, and what small bins cannot hold to the others.

    Args:
        sizes: [S] capacity of each bin.
        total: Amount to share; what exceeds the sum of the sizes stays unshared.

    Returns:
        [S] shares. They sum to ``min(total, sum(sizes))``; bins that are not full differ by at most 1.

    >>> water_fill([2, 10, 10], 13).tolist()
    [2, 5, 6]
    """
    shares = np.zeros(len(sizes), dtype=np.int64)
    left = total
    for served, bin_ in enumerate(np.argsort(sizes, kind="stable")):
        shares[bin_] = min(int(sizes[bin_]), left // (len(sizes) - served))
        left -= int(shares[bin_])
    return shares


def largest_remainder(sizes: Sequence[int] | np.ndarray, total: int) -> np.ndarray:
    """Give every bin its proportional share, rounded so that the sum is kept (Hamilton's method).

    Args:
        sizes: [S] weight and capacity of each bin.
        total: Amount to share, at most the sum of the sizes.

    Returns:
        [S] shares, each the exact share rounded down or up; equal remainders favour earlier bins.

    >>> largest_remainder([50, 30, 20], 7).tolist()
    [4, 2, 1]
    """
    weights = [int(size) for size in sizes]
    whole = sum(weights)
    if not whole:
        return np.zeros(len(weights), dtype=np.int64)
    # Integers throughout: a float share of a large pool can round past the next integer.
    shares = np.array([weight * min(total, whole) // whole for weight in weights], dtype=np.int64)
    remainders = [weight * min(total, whole) % whole for weight in weights]
    for bin_ in sorted(range(len(weights)), key=lambda b: -remainders[b])[: min(total, whole) - int(shares.sum())]:
        shares[bin_] += 1
    return shares
