"""How far two scorings of the same rows agree, and how one is brought to the scale of the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def average_ranks(values: np.ndarray) -> np.ndarray:
    """[n] ranks from 0; equal values share the mean of their places."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    middles = ends - (counts + 1) / 2
    return np.asarray(middles[inverse.reshape(-1)])


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation in [-1, 1]; 0 where either side is constant or there are fewer than two rows.

    >>> spearman(np.array([1.0, 2.0, 3.0]), np.array([10.0, 20.0, 15.0]))
    0.5
    """
    if len(first) < 2:
        return 0.0
    ranks = [average_ranks(np.asarray(values, dtype=np.float64)) for values in (first, second)]
    a, b = (each - each.mean() for each in ranks)
    scale = float(np.sqrt(np.square(a).sum() * np.square(b).sum()))
    return float(a @ b) / scale if scale else 0.0


def jaccard(first: Sequence[int] | np.ndarray, second: Sequence[int] | np.ndarray) -> float:
    """Share of the union that both hold; 1 for two empty sets."""
    a, b = set(np.asarray(first).tolist()), set(np.asarray(second).tolist())
    return len(a & b) / len(a | b) if a | b else 1.0


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float], size: int, generator: np.random.Generator, *, draws: int = 200
) -> tuple[float, float]:
    """The middle 95 % of a statistic over samples with replacement.

    Args:
        statistic: Called with [n] positions.
        size: n.
        generator: Draws the samples.
        draws: Number of samples.
    """
    values = [statistic(generator.integers(size, size=size)) for _ in range(draws)]
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def isotonic(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Least-squares increasing fit of y over x (pool adjacent violators), read off at other points.

    Between fitted points it is linear, beyond them constant.

    Args:
        x: [n] finite.
        y: [n] finite.
        at: [m] where to read the fit.
    """
    order = np.lexsort((y, x))
    blocks: list[tuple[float, int]] = []
    for value in y[order]:
        mean, count = float(value), 1
        while blocks and blocks[-1][0] >= mean:
            last, size = blocks.pop()
            mean, count = (last * size + mean * count) / (size + count), size + count
        blocks.append((mean, count))
    fitted = np.repeat([mean for mean, _ in blocks], [count for _, count in blocks])
    return np.asarray(np.interp(at, x[order], fitted))
