"""Directions of low rank for matrices: a product of two thin factors, never multiplied out on its own.

Vectors, and matrices too small to save anything, take independent normal entries instead.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_eff.engines.directions import DirectionFamily, Gaussian, Shard

Shape = tuple[int, int]

_PIECE = 2**18
"""Entries of a product at a time."""


class MatrixDirections(DirectionFamily):
    """Directions gain * left @ right^T of a given rank; vectors and small matrices are dense.

    A tensor of more than two dimensions is the matrix of its first one and all others.

    Args:
        seed: Seed of the run.
        rank: Columns r of both factors.
        window: Optimizer steps for which what spans the directions stays.
    """

    def __init__(self, seed: int, rank: int, window: int) -> None:
        super().__init__(seed)
        self.rank = rank
        self.window = window
        self.dense = Gaussian(seed)
        self.dense.shards = self.shards

    def add_(
        self,
        out: Tensor,
        name: str,
        step: int,
        scale: float,
        *,
        base: Tensor | None = None,
        draw: int = 0,
        at: Tensor | None = None,
    ) -> Tensor:
        """See the base class."""
        shape = self.matrix_shape(name, out)
        if shape is None:
            return self.dense.add_(out, name, step, scale, base=base, draw=draw)
        left, right, gain = self.factors(name, step, draw, shape, out.device)
        return self.add_product_(out, name, left, right, scale * gain, base=base)

    def add_product_(
        self, out: Tensor, name: str, left: Tensor, right: Tensor, scale: float, *, base: Tensor | None = None
    ) -> Tensor:
        """Write ``base + scale * left @ right^T`` into ``out``, where both may be a part of the whole parameter.

        Args:
            out: Any shape and floating type.
            name: Parameter.
            left: [m, r] fp32.
            right: [n, r] fp32.
            scale: Multiple of the product.
            base: What it is added to; None for ``out`` itself.
        """
        base = out if base is None else base
        if not (out.is_contiguous() and base.is_contiguous()):
            total = torch.empty_like(out, memory_format=torch.contiguous_format)
            return out.copy_(self.add_product_(total, name, left, right, scale, base=base.contiguous()))
        target, source = out.view(-1), base.view(-1)
        width, first = len(right), self.place(name, out).offset
        height, end = max(1, _PIECE // width), first + out.numel()
        scratch = left.new_empty(min(height, len(left)), width)
        for row in range(first // width, -(-end // width), height):
            part = left[row : row + height]
            with one_thread():
                product = torch.mm(part, right.t(), out=scratch[: len(part)]).view(-1)
            low, high = max(first, row * width), min(end, row * width + product.numel())
            held, inside = slice(low - first, high - first), slice(low - row * width, high - row * width)
            torch.add(source[held], product[inside], alpha=scale, out=target[held])
        return out

    def matrix_shape(self, name: str, part: Tensor) -> Shape | None:
        """Shape of the matrix that a parameter is taken for; None where its directions are dense."""
        return self.shape_of(self.place(name, part))

    def shape_of(self, place: Shard) -> Shape | None:
        """See ``matrix_shape``."""
        if len(place.shape) < 2:
            return None
        shape = (place.shape[0], math.prod(place.shape[1:]))
        return shape if min(shape) > self.rank else None

    def normal(self, key: str, step: int, draw: int, shape: Shape, device: torch.device) -> Tensor:
        """[shape] independent normal entries of a stream of their own."""
        return self.dense.add_(torch.zeros(shape, device=device), key, step, 1.0, draw=draw)

    def describe(self, device: torch.device) -> dict[str, Any]:
        """Name, rank, window, and what the normal entries depend on."""
        return {"name": self.name, "rank": self.rank, "window": self.window, "normal": self.dense.describe(device)}

    @abstractmethod
    def factors(
        self, name: str, step: int, draw: int, shape: Shape, device: torch.device
    ) -> tuple[Tensor, Tensor, float]:
        """[m, r] left, [n, r] right and the gain of their product."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch multiplies matrices on one thread: on several, the last bits depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
