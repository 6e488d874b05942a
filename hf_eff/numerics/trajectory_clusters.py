"""Rows with like loss trajectories, source by source, and an even choice among them (arXiv:2403.07384).

Rows whose losses move together along a training have like gradients along it, so one stands for the others. Each
source is clustered on its own. Sources share a budget by water-filling, clusters share their source's in the same way,
and inside a cluster rows are drawn at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from hf_eff.errors import OptionError
from hf_eff.numerics.kmeans import kmeans
from hf_eff.numerics.verified_bins import coverage_order

# N rows, E checkpoints, K clusters of a source

NORMALIZATIONS = ("none", "center", "zscore")
_TINY_CLUSTER = 2
"""Rows of a cluster that comes last: such clusters hold what is like nothing else, noise included."""


class TrajectoryOrder(NamedTuple):
    """An order of all rows, any beginning of which is a choice, and the clusters behind it.

    Attributes:
        positions: [N] rows in order.
        clusters: [N] cluster of each row; no two sources share one.
    """

    positions: np.ndarray
    clusters: np.ndarray


def choose_by_trajectory(
    trajectories: np.ndarray,
    sources: Sequence[str] | np.ndarray | None,
    budget: int,
    generator: torch.Generator,
    **options: int | str,
) -> np.ndarray:
    """The first ``budget`` rows of ``order_by_trajectory``; options as there.

    Returns:
        [min(budget, N)] positions.
    """
    return order_by_trajectory(trajectories, sources, generator, **options).positions[:budget]  # type: ignore[arg-type]


def order_by_trajectory(
    trajectories: np.ndarray,
    sources: Sequence[str] | np.ndarray | None,
    generator: torch.Generator,
    *,
    clusters: int = 100,
    iterations: int = 20,
    normalize: str = "none",
) -> TrajectoryOrder:
    """Deal rows out evenly over sources, and over the clusters of each source.

    Memory grows with N*E and not with N*K. The result depends on the order of the rows; sort them by
    content first to make it a function of the set.

    Args:
        trajectories: [N, E] finite losses.
        sources: [N] source of each row; None for one source.
        generator: Draws the first centres and the rows of a cluster.
        clusters: Clusters of a source, K; a source of fewer rows has fewer.
        iterations: Most rounds of k-means.
        normalize: ``"none"`` compares losses as they are, which the theory is about; ``"center"`` takes
            the mean of each trajectory out, ``"zscore"`` also its spread.

    Returns:
        The order. Of its first k rows every source has its share by water-filling, sources ascending by
        size; of a source's rows every cluster of more than 2 rows has its share, and smaller clusters
        give rows only when those are used up.

    Raises:
        OptionError: ``normalize`` is unknown.
    """
    values = _normalized(np.asarray(trajectories), normalize)
    names = np.zeros(len(values), dtype=np.int64) if sources is None else np.asarray(sources)
    members = np.unique(names, return_inverse=True)[1].reshape(-1)
    labels, dealt, used = np.zeros(len(values), dtype=np.int64), [], 0
    for source in range(int(members.max()) + 1 if len(members) else 0):
        rows = np.flatnonzero(members == source)
        found = kmeans(values[rows], min(clusters, len(rows)), generator, iterations)[1]
        labels[rows] = used + found
        used += int(found.max()) + 1
        dealt.append(rows[_within_source(found, generator)])
    preference = np.concatenate(dealt) if dealt else np.zeros(0, dtype=np.int64)
    return TrajectoryOrder(coverage_order(members, preference), labels)


def _within_source(labels: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """[n] rows of one source, dealt out over its clusters, the tiny ones last."""
    shuffled = torch.randperm(len(labels), generator=generator).numpy()
    tiny = np.bincount(labels)[labels] <= _TINY_CLUSTER
    parts = [shuffled[~tiny[shuffled]], shuffled[tiny[shuffled]]]
    return np.concatenate([coverage_order(labels, part) for part in parts])


def _normalized(values: np.ndarray, normalize: str) -> np.ndarray:
    if normalize not in NORMALIZATIONS:
        raise OptionError(f"normalize must be one of {list(NORMALIZATIONS)}, got {normalize!r}.")
    exact = values if values.dtype == np.float64 else values.astype(np.float32, copy=False)
    if normalize == "none" or not len(exact):
        return exact
    centred: np.ndarray = exact - exact.mean(axis=1, keepdims=True)
    if normalize == "center":
        return centred
    spread = centred.std(axis=1, keepdims=True)
    flat: np.ndarray = np.divide(centred, spread, out=np.zeros_like(centred), where=spread > 0)
    return flat
