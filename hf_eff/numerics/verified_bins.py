"""Equal-width bins of a score, and how many rows each of them gives.

Bins by score keep a choice from crowding where scores are high, which is where wrong labels are. Coverage shares a
budget evenly over the bins (arXiv:2210.15809). Verification on a second model tells how much a bin is worth to that
one, and shifts the budget towards bins that the first model underrates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hf_eff.errors import OptionError

# N rows, K bins

RULES = ("paper", "repo")
_EPS = 1e-12
RATIO_BOUNDS = (0.1, 10.0)


def equal_width_bins(scores: Sequence[float] | np.ndarray, bins: int) -> np.ndarray:
    """Bin of each score: K intervals of one width from the lowest score to the highest.

    Args:
        scores: [N] finite.
        bins: K.

    Returns:
        [N] int64 in 0..K-1; the highest score belongs to the last bin, equal scores all to the first.

    >>> equal_width_bins([0.0, 0.4, 0.5, 1.0], 2).tolist()
    [0, 0, 1, 1]
    """
    values = np.asarray(scores, dtype=np.float64)
    if not len(values):
        return np.zeros(0, dtype=np.int64)
    width = (values.max() - values.min()) / bins
    if not width > 0:
        return np.zeros(len(values), dtype=np.int64)
    return np.minimum((values - values.min()) / width, bins - 1).astype(np.int64)


def coverage_order(bins: np.ndarray, preference: np.ndarray) -> np.ndarray:
    """An order whose every beginning shares its length among the bins by water-filling.

    Rows are dealt round by round, one a bin; in a round that ends early the larger bins come first.

    Args:
        bins: [N] bin of each row, any integers.
        preference: [N] places of the rows in order of preference, a permutation; rows of a bin keep it.

    Returns:
        [N] positions.

    >>> coverage_order(np.array([0, 1, 1, 1, 2, 2]), np.arange(6)).tolist()
    [1, 4, 0, 2, 5, 3]
    """
    _, members, sizes = np.unique(bins[preference], return_inverse=True, return_counts=True)
    members = members.reshape(-1)
    # Bins in descending order of size, of equal ones the later first: the reverse of ``water_fill``'s order.
    turn = np.empty(len(sizes), dtype=np.int64)
    turn[np.argsort(sizes, kind="stable")[::-1]] = np.arange(len(sizes))
    grouped = np.argsort(members, kind="stable")
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]) if len(sizes) else np.zeros(0, dtype=np.int64)
    rounds = np.empty(len(preference), dtype=np.int64)
    rounds[grouped] = np.arange(len(preference)) - np.repeat(starts, sizes)
    return preference[np.lexsort((turn[members], rounds))]


def verification_ratios(
    proxy: Sequence[float] | np.ndarray, target: Sequence[float] | np.ndarray, bins: np.ndarray, num_bins: int
) -> np.ndarray:
    """How much larger the target's scores are than the proxy's, bin by bin.

    Args:
        proxy: [M] proxy's scores of the verified rows, zero or more.
        target: [M] target's scores of the same rows; rows with a score that is not finite do not count.
        bins: [M] bin of each.
        num_bins: K.

    Returns:
        [K] ratio of the sums, within 0.1 to 10; 1 where nothing was verified.
    """
    small, large = np.asarray(proxy, dtype=np.float64), np.asarray(target, dtype=np.float64)
    known = np.isfinite(small) & np.isfinite(large)
    below = np.bincount(bins[known], weights=small[known], minlength=num_bins)
    above = np.bincount(bins[known], weights=large[known], minlength=num_bins)
    # Where both vanish the models agree; where only the proxy's does, the bound speaks.
    ratios = (above + _EPS) / (below + _EPS)
    return np.where(np.bincount(bins[known], minlength=num_bins) > 0, np.clip(ratios, *RATIO_BOUNDS), 1.0)


def verified_shares(
    sizes: Sequence[int] | np.ndarray, ratios: Sequence[float] | np.ndarray, total: int, rule: str = "paper"
) -> np.ndarray:
    """Share a budget among bins by how much verification found them worth.

    Bins are served from the smallest to the largest; with L left of the budget, u bins left and V their ratios,

        paper  min(size, floor(L * V_b / u)), and never more than L
        repo   min(size, floor(L * V_b / sum of V over the bins left))

    Ratios of 1 make both the same as water-filling.

    Args:
        sizes: [K] capacity of each bin; empty bins do not count as left.
        ratios: [K] positive.
        total: Budget.
        rule: ``"paper"`` or ``"repo"``.

    Returns:
        [K] shares. Their sum is at most ``total``, and may be less where ratios are below 1.

    Raises:
        OptionError: The rule is unknown.

    >>> verified_shares([2, 10, 10], [1, 1, 1], 13).tolist()
    [2, 5, 6]
    >>> verified_shares([2, 10, 10], [1, 0.5, 2], 13).tolist()
    [2, 2, 9]
    """
    if rule not in RULES:
        raise OptionError(f"rule must be one of {list(RULES)}, got {rule!r}.")
    capacity, worth = np.asarray(sizes, dtype=np.int64), np.asarray(ratios, dtype=np.float64)
    shares = np.zeros(len(capacity), dtype=np.int64)
    served = [int(bin_) for bin_ in np.argsort(capacity, kind="stable") if capacity[bin_]]
    left = int(total)
    for place, bin_ in enumerate(served):
        whole = float(len(served) - place) if rule == "paper" else float(worth[served[place:]].sum())
        # A product of floats may land just below the whole number that it is.
        wanted = int(np.floor(left * worth[bin_] / whole + 1e-9))
        shares[bin_] = min(int(capacity[bin_]), wanted, left)
        left -= int(shares[bin_])
    return shares
