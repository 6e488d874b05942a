"""Directions in random subspaces (SubZero): kappa U Z V^T with orthonormal U and V that stay for a window of steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_eff.engines.directions import Shard
from hf_eff.engines.matrix_directions import MatrixDirections, Shape, one_thread
from hf_eff.numerics.subspace_matrices import CACHE_BYTES, RESHAPE_BELOW, squared


class Subspace(MatrixDirections):
    """kappa U Z V^T: U, [m, r], and V, [n, r], from QR of normal matrices, Z, [r, r], drawn at every step.

    kappa = sqrt(m n) / r gives the direction the norm that independent normal entries have, on average.

    Args:
        seed: Seed of the run.
        rank: Dimensions r of both subspaces.
        window: Steps for which U and V stay.
    """

    name = "subspace"

    def __init__(self, seed: int, rank: int, window: int) -> None:
        super().__init__(seed, rank, window)
        self._cache: dict[str, tuple[int, Tensor, Tensor]] = {}

    @classmethod
    def from_description(cls, seed: int, described: Mapping[str, Any]) -> Subspace:
        """Inverse of ``describe``."""
        return cls(seed, described["rank"], described["window"])

    def factors(
        self, name: str, step: int, draw: int, shape: Shape, device: torch.device
    ) -> tuple[Tensor, Tensor, float]:
        """U Z, V and kappa."""
        left, right = self.bases(name, step // self.window, shape, device)
        core = self.normal(f"{name}/core", step, draw, (self.rank, self.rank), device)
        with one_thread():
            return left @ core, right, math.sqrt(shape[0] * shape[1]) / self.rank

    def bases(self, name: str, index: int, shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
        """[m, r] and [n, r] with orthonormal columns, of window ``index``."""
        held = self._cache.get(name)
        if held is not None and held[0] == index and held[1].device == device:
            return held[1], held[2]
        self._cache.pop(name, None)
        left, right = (self._basis(f"{name}/{side}", index, size) for side, size in zip("lr", shape, strict=True))
        left, right = left.to(device), right.to(device)
        if self.held_bytes() + left.nbytes + right.nbytes <= CACHE_BYTES:
            self._cache[name] = (index, left, right)
        return left, right

    def held_bytes(self) -> int:
        """Bytes of the factors that are kept now."""
        return sum(left.nbytes + right.nbytes for _, left, right in self._cache.values())

    def _basis(self, key: str, index: int, size: int) -> Tensor:
        """Made on the CPU and by one thread, so that it is the same on every kind of device."""
        normal = self.normal(key, index, 0, (size, self.rank), torch.device("cpu")).double()
        with one_thread():
            return torch.linalg.qr(normal).Q.float()

    def shape_of(self, place: Shard) -> Shape | None:
        """Thin matrices, such as those of adapters, are taken for a squarer one of as many entries."""
        if len(place.shape) < 2:
            return None
        shape = squared((place.shape[0], math.prod(place.shape[1:])), self.rank)
        return shape if min(shape) > self.rank else None

    def describe(self, device: torch.device) -> dict[str, Any]:
        """Name, rank, window, scale, rule of reshaping, and what the normal entries depend on."""
        rules = {"kappa": "sqrt(m n) / r", "reshape_below": RESHAPE_BELOW}
        return {**super().describe(device), **rules, "basis": self.dense.describe(torch.device("cpu"))}
