"""Similarity of stored gradients to the gradients of a target, group by group or row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_eff.engines.datastore import FeatureStore
from hf_eff.errors import DataError

# N pool rows, V target rows, G groups, D numbers of a feature

_TILE = 8192


@dataclass(frozen=True)
class Influence:
    """How a row is compared with the target.

    Attributes:
        similarity: ``"cosine"``, or ``"dot"`` for inner products.
        val_agg: With cosines, ``"mean_cos"`` averages a group's cosines; ``"cos_of_mean"`` takes the
            cosine with its mean gradient.
        group_reduce: ``"max"`` or ``"mean"`` over groups.
    """

    similarity: str = "cosine"
    val_agg: str = "mean_cos"
    group_reduce: str = "max"

    def queries(self, target: FeatureStore, groups: Sequence[str]) -> dict[str, Tensor]:
        """One vector a group, whose inner product with a row's feature is the group's score.

        Both aggregations are linear in the row's feature: a mean of cosines is the inner product
        with the mean of unit vectors.

        Args:
            target: Features of the V target rows.
            groups: [V] group of each.

        Returns:
            [D] float32 by group, sorted by name; groups without a finite gradient are left out.

        Raises:
            DataError: No target row has a gradient that is finite and not zero.
        """
        norms = target.norms
        usable = target.done & np.isfinite(norms)
        if not (norms[usable] > 0).any():
            raise DataError("no row of the target has a finite gradient that is not zero; check the target's labels.")
        names = np.asarray(groups, dtype=object)
        return {name: self._query(target, norms, usable & (names == name)) for name in sorted(set(names[usable]))}

    def _query(self, target: FeatureStore, norms: np.ndarray, members: np.ndarray) -> Tensor:
        vectors = target.unit_rows(slice(None)).double()[torch.from_numpy(members)]
        if self.similarity == "dot" or self.val_agg == "cos_of_mean":
            vectors = vectors * torch.from_numpy(norms[members]).double()[:, None]
        mean = vectors.mean(dim=0)
        if self.similarity == "cosine" and self.val_agg == "cos_of_mean":
            mean = torch.nn.functional.normalize(mean, dim=0)
        return mean.float()

    def scores(
        self, pools: Sequence[FeatureStore], queries: Sequence[Tensor], weights: Sequence[float]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Score of every row, a tile of rows at a time.

        Args:
            pools: Features of the N pool rows, one store a checkpoint.
            queries: [G, D] of each checkpoint.
            weights: Weight of each checkpoint.

        Returns:
            scores: [N] float64, NaN for rows without a finite feature at every checkpoint.
            closest: [N] group that each row is most similar to.
        """
        usable = np.logical_and.reduce([store.done & np.isfinite(store.norms) for store in pools])
        best, closest = np.full(len(usable), np.nan), np.zeros(len(usable), dtype=np.int64)
        for start in range(0, len(usable), _TILE):
            rows = slice(start, min(start + _TILE, len(usable)))
            by_group = torch.zeros(rows.stop - rows.start, len(queries[0]), dtype=torch.float64)
            for store, query, weight in zip(pools, queries, weights, strict=True):
                by_group += weight * self._similarities(store, query, rows)
            reduced = by_group.max(dim=1).values if self.group_reduce == "max" else by_group.mean(dim=1)
            best[rows], closest[rows] = reduced.numpy(), by_group.argmax(dim=1).numpy()
        return np.where(usable, best, np.nan), closest

    def matrix(
        self, pools: Sequence[FeatureStore], targets: Sequence[FeatureStore], weights: Sequence[float]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Similarity of every row to every target row, summed over checkpoints.

        Neither ``val_agg`` nor ``group_reduce`` plays a part.

        Args:
            pools: Features of the N pool rows, one store a checkpoint.
            targets: Features of the V target rows, one store a checkpoint.
            weights: Weight of each checkpoint.

        Returns:
            similarities: [N, V'] float32, NaN in rows of the pool without a finite feature at every
                checkpoint; target rows without one, or with gradient zero, are left out.
            members: [V'] positions of the target rows that are not.

        Raises:
            DataError: No target row has a gradient that is finite and not zero.
        """
        usable = np.logical_and.reduce([store.done & np.isfinite(store.norms) for store in pools])
        members = np.logical_and.reduce([store.done & (store.norms > 0) for store in targets])
        if not members.any():
            raise DataError("no row of the target has a finite gradient that is not zero; check the target's labels.")
        chosen = torch.from_numpy(members)
        queries = [store.unit_rows(slice(None))[chosen] for store in targets]
        if self.similarity == "dot":
            lengths = [torch.from_numpy(store.norms[members])[:, None] for store in targets]
            queries = [query * length for query, length in zip(queries, lengths, strict=True)]
        result = np.full((len(usable), int(members.sum())), np.nan, dtype=np.float32)
        for start in range(0, len(usable), _TILE):
            rows = slice(start, min(start + _TILE, len(usable)))
            parts = [w * self._similarities(s, q, rows) for s, q, w in zip(pools, queries, weights, strict=True)]
            result[rows] = torch.stack(parts).sum(dim=0).numpy()
        result[~usable] = np.nan
        return result, np.flatnonzero(members)

    def _similarities(self, store: FeatureStore, query: Tensor, rows: slice) -> Tensor:
        """[rows, G]."""
        cosines = store.products(rows, query).double()
        return cosines if self.similarity == "cosine" else cosines * torch.from_numpy(store.norms[rows])[:, None]
