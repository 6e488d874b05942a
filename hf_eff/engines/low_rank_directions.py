"""Directions U V^T of rank r (LOZO): U is drawn at every step, V for a window of steps; neither is kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_eff.engines.matrix_directions import MatrixDirections, Shape


class LowRank(MatrixDirections):
    """U V^T with independent normal entries in U, [m, r], and V, [n, r].

    U belongs to (step, draw), V to the window that the step lies in, each with a stream of its own. All directions of
    a window share V, so that their sum has rank r.

    Args:
        seed: Seed of the run.
        rank: Columns of U and V.
        window: Steps for which V stays.
    """

    name = "low_rank"

    @classmethod
    def from_description(cls, seed: int, described: Mapping[str, Any]) -> LowRank:
        """Inverse of ``describe``."""
        return cls(seed, described["rank"], described["window"])

    def factors(
        self, name: str, step: int, draw: int, shape: Shape, device: torch.device
    ) -> tuple[Tensor, Tensor, float]:
        """U, V and 1."""
        return self.left(name, step, draw, shape[0], device), self.right(name, step, shape[1], device), 1.0

    def left(self, name: str, step: int, draw: int, rows: int, device: torch.device) -> Tensor:
        """[m, r] U of a step."""
        return self.normal(f"{name}/left", step, draw, (rows, self.rank), device)

    def right(self, name: str, step: int, columns: int, device: torch.device) -> Tensor:
        """[n, r] V of the window that a step lies in."""
        return self.normal(f"{name}/right", step // self.window, 0, (columns, self.rank), device)

    def update_scale(self, name: str, part: Tensor) -> float:
        """1 / r for a matrix: the mean of <U V^T, G> U V^T is r G."""
        return 1.0 if self.matrix_shape(name, part) is None else 1.0 / self.rank
