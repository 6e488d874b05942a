"""Lloyd's k-means, in tiles: memory grows with rows and clusters, never with their product.

The result depends on the rows, their order and the generator's state alone; put rows in an order of
their content to make it independent of how a dataset is sorted.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hf_eff.errors import OptionError

# N rows, K clusters, h numbers a row

INITS = ("plusplus", "random")
_TILE_NUMBERS = 2**22
"""Distances held at a time: 16 MiB in float32."""


def kmeans(
    vectors: np.ndarray,
    clusters: int,
    generator: torch.Generator,
    iterations: int = 20,
    *,
    init: str = "plusplus",
) -> tuple[np.ndarray, np.ndarray]:
    """Cluster rows by Euclidean distance.

    A cluster that loses its last row takes the row farthest from its own centre, as long as there is
    one away from it: fewer distinct rows than clusters leave clusters empty.

    Args:
        vectors: [N, h] finite; float64 is computed in float64, all else in float32.
        clusters: K; more than N counts as N.
        generator: Draws the first centres.
        iterations: Most rounds; ends early when no label changes.
        init: ``"plusplus"`` draws each next centre in proportion to its squared distance from those
            before (K passes over the rows), ``"random"`` draws all at once.

    Returns:
        centres: [K, h] in the type of the computation.
        labels: [N] int64, the nearest centre of each row; ties go to the lower one.

    Raises:
        OptionError: There are no rows, no clusters, or the init is unknown.
    """
    if init not in INITS:
        raise OptionError(f"init must be one of {list(INITS)}, got {init!r}.")
    if clusters < 1 or not len(vectors):
        raise OptionError(f"k-means needs rows and at least 1 cluster, got {len(vectors)} rows, {clusters} clusters.")
    kind = np.float64 if vectors.dtype == np.float64 else np.float32
    rows = torch.from_numpy(np.ascontiguousarray(vectors, dtype=kind))
    # Distances do not change, and lose fewer digits when a common offset is gone.
    offset = rows.double().mean(dim=0).to(rows.dtype)
    rows = rows - offset
    starts = _spread(rows, clusters, generator) if init == "plusplus" else _drawn(len(rows), clusters, generator)
    centres = rows[starts].clone()
    labels, distances = nearest_centres(rows, centres)
    for _ in range(iterations):
        centres = _means(rows, labels, distances, centres)
        before = labels
        labels, distances = nearest_centres(rows, centres)
        if torch.equal(labels, before):
            break
    return (centres + offset).numpy(), labels.numpy()


def nearest_centres(rows: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Label [N] and squared distance [N] of each row to its nearest centre, a tile of rows at a time."""
    labels = torch.empty(len(rows), dtype=torch.int64)
    distances = torch.empty(len(rows), dtype=rows.dtype)
    lengths = centres.square().sum(dim=1)
    tile = max(1, _TILE_NUMBERS // len(centres))
    for start in range(0, len(rows), tile):
        part = rows[start : start + tile]
        found = torch.addmm(lengths, part, centres.T, alpha=-2.0).min(dim=1)
        labels[start : start + tile] = found.indices
        distances[start : start + tile] = (found.values + part.square().sum(dim=1)).clamp(min=0.0)
    return labels, distances


def _drawn(count: int, clusters: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(count, generator=generator)[: min(clusters, count)]


def _spread(rows: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """k-means++: rows far from the centres so far are likely next ones."""
    first = int(torch.randint(len(rows), (1,), generator=generator))
    chosen, lengths = [first], rows.square().sum(dim=1)
    distances = torch.full((len(rows),), float("inf"), dtype=rows.dtype)
    for _ in range(min(clusters, len(rows)) - 1):
        newest = rows[chosen[-1]]
        distances = torch.minimum(distances, (lengths - 2.0 * (rows @ newest) + newest.square().sum()).clamp(min=0.0))
        distances[chosen[-1]] = 0.0
        reach = distances.double().cumsum(dim=0)
        point = torch.rand(1, generator=generator, dtype=torch.float64) * reach[-1]
        chosen.append(min(int(torch.searchsorted(reach, point, right=True)), len(rows) - 1))
    return torch.tensor(chosen)


def _means(rows: Tensor, labels: Tensor, distances: Tensor, centres: Tensor) -> Tensor:
    """Mean of each cluster's rows; empty clusters move to the rows farthest from their centres."""
    counts = torch.bincount(labels, minlength=len(centres))
    sums = torch.zeros(centres.shape, dtype=torch.float64)
    tile = max(1, _TILE_NUMBERS // rows.shape[1])
    for start in range(0, len(rows), tile):
        sums.index_add_(0, labels[start : start + tile], rows[start : start + tile].double())
    means = (sums / counts.clamp(min=1)[:, None]).to(rows.dtype)
    empty = torch.nonzero(counts == 0).flatten()
    means[empty] = centres[empty]
    farthest = torch.argsort(distances, descending=True, stable=True)[: len(empty)]
    for cluster, row in zip(empty.tolist(), farthest.tolist(), strict=True):
        if distances[row] > 0:
            means[cluster] = rows[row]
    return means
