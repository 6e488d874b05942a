"""Most similar rows of each row by cosine: exact for thousands of rows, approximate for more.

The approximate search is an inverted file. Rows are put into about sqrt(N) cells by k-means, and a row
looks into the few cells whose centres are nearest to it: work grows with N^1.5 instead of N^2. Cells
are cut to twice the mean size or less, so that a pool of many equal rows costs no more.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hf_eff.numerics.kmeans import kmeans, nearest_centres

# N rows, h numbers a row, k neighbours, C cells, P parts of cells

EXACT_BELOW = 20_000
PROBES = 16
_ROUNDS = 8
_SAMPLE = 32
"""Rows a cell that k-means learns from."""
_CUT = 2
_TILE_NUMBERS = 2**22


def nearest_neighbours(
    vectors: np.ndarray,
    k: int,
    *,
    generator: torch.Generator,
    exact_below: int = EXACT_BELOW,
    probes: int = PROBES,
    between: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows most similar to each row, itself left out.

    Args:
        vectors: [N, h] finite rows of length one.
        k: Neighbours a row; at most N - 1 are given.
        generator: Draws the first centres of the cells; unused by the exact search.
        exact_below: Pools of more rows than this are searched approximately.
        probes: Cells a row looks into.
        between: Called between tiles of work; what it raises ends the search.

    Returns:
        indices: [N, k] int32, most similar first; -1 where the cells looked into hold too few rows.
        similarities: [N, k] float32 cosines; -1 there.
    """
    rows = torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float32))
    wanted = max(0, min(k, len(rows) - 1))
    if not wanted:
        return np.zeros((len(rows), 0), dtype=np.int32), np.zeros((len(rows), 0), dtype=np.float32)
    if len(rows) <= exact_below:
        indices, similarities = _exact(rows, wanted, between)
    else:
        indices, similarities = _by_cells(rows, wanted, generator, probes, between)
    return indices.int().numpy(), similarities.numpy()


def neighbour_flops(rows: int, width: int, *, exact_below: int = EXACT_BELOW, probes: int = PROBES) -> float:
    """FLOPs of the matrix products of ``nearest_neighbours``; above ``exact_below`` for cells of equal size."""
    if rows <= exact_below:
        return 2.0 * rows * rows * width
    cells = _num_cells(rows)
    learning = (_ROUNDS + 1) * min(rows, _SAMPLE * cells) * cells
    return 2.0 * width * (learning + 2 * rows * cells + rows * probes * (rows / cells))


def _exact(rows: Tensor, k: int, between: Callable[[], None]) -> tuple[Tensor, Tensor]:
    indices, similarities = _nothing_yet(len(rows), k)
    tile = max(1, _TILE_NUMBERS // len(rows))
    for start in range(0, len(rows), tile):
        between()
        part = rows[start : start + tile] @ rows.T
        part[torch.arange(len(part)), torch.arange(start, start + len(part))] = -torch.inf
        found = part.topk(k, dim=1)
        indices[start : start + tile], similarities[start : start + tile] = found.indices, found.values
    return indices, similarities


def _by_cells(
    rows: Tensor, k: int, generator: torch.Generator, probes: int, between: Callable[[], None]
) -> tuple[Tensor, Tensor]:
    """Part by part, each row that looks into it merges what it holds with the best so far."""
    centres, members = _cells(rows, generator, between)
    visits = _visits(rows, centres, min(probes, len(members)), between)
    indices, similarities = _nothing_yet(len(rows), k)
    for held, visitors in zip(members, visits, strict=True):
        inside, tile = rows[held], max(1, _TILE_NUMBERS // (len(held) + k))
        for start in range(0, len(visitors), tile):
            between()
            asking = visitors[start : start + tile]
            found = rows[asking] @ inside.T
            found[asking[:, None] == held] = -1.0
            best = torch.cat([similarities[asking], found], dim=1).topk(k, dim=1)
            known = torch.cat([indices[asking], held.expand(len(asking), -1)], dim=1)
            indices[asking], similarities[asking] = known.gather(1, best.indices), best.values
    indices[similarities <= -1.0] = -1
    return indices, similarities


def _cells(rows: Tensor, generator: torch.Generator, between: Callable[[], None]) -> tuple[Tensor, list[Tensor]]:
    """Centre [P, h] and rows of each part of a cell."""
    count = _num_cells(len(rows))
    between()
    sample = rows[torch.randperm(len(rows), generator=generator)[: _SAMPLE * count]]
    found, _ = kmeans(sample.numpy(), count, generator, _ROUNDS, init="random")
    centres = torch.from_numpy(found)
    between()
    labels, _ = nearest_centres(rows, centres)
    order = torch.argsort(labels, stable=True)
    limit = _CUT * math.ceil(len(rows) / count)
    sizes = torch.bincount(labels, minlength=count).tolist()
    parts: list[Tensor] = []
    owners: list[int] = []
    for cell, members in enumerate(order.split(sizes)):
        for part in members.split(limit) if len(members) else ():
            parts.append(part)
            owners.append(cell)
    return centres[torch.tensor(owners)], parts


def _visits(rows: Tensor, centres: Tensor, probes: int, between: Callable[[], None]) -> list[Tensor]:
    """Rows that look into each part, in order."""
    nearest = torch.empty(len(rows), probes, dtype=torch.int64)
    lengths = centres.square().sum(dim=1)
    tile = max(1, _TILE_NUMBERS // len(centres))
    for start in range(0, len(rows), tile):
        between()
        away = torch.addmm(lengths, rows[start : start + tile], centres.T, alpha=-2.0)
        nearest[start : start + tile] = away.topk(probes, dim=1, largest=False).indices
    flat = nearest.flatten()
    order = torch.argsort(flat, stable=True)
    sizes = torch.bincount(flat, minlength=len(centres)).tolist()
    return list((order // probes).split(sizes))


def _nothing_yet(rows: int, k: int) -> tuple[Tensor, Tensor]:
    return torch.full((rows, k), -1, dtype=torch.int64), torch.full((rows, k), -1.0)


def _num_cells(rows: int) -> int:
    return max(1, round(math.sqrt(rows)))
