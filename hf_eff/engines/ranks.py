"""What processes of one run tell each other: few, small messages, and none on a single process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value")


class Ranks:
    """The processes of this run.

    Attributes:
        rank: This process, from 0.
        size: Number of processes.
    """

    def __init__(self) -> None:
        self.active = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if self.active else 0
        self.size = dist.get_world_size() if self.active else 1

    @property
    def is_first(self) -> bool:
        """Whether this process takes the decisions and writes the files."""
        return self.rank == 0

    def folder(self, name: str) -> str:
        """Name of a folder of intermediate results: the plain one for the first process, numbered for the others."""
        return name if self.is_first else f"{name}-{self.rank}"

    def broadcast(self, value: Value) -> Value:
        """The value of rank 0."""
        if not self.active:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Value) -> list[Value]:
        """The values of all ranks, in rank order, on every rank."""
        if not self.active:
            return [value]
        boxes: list[Any] = [None] * self.size
        dist.all_gather_object(boxes, value)
        return boxes

    def sum(self, amounts: Mapping[str, float]) -> dict[str, float]:
        """Sum over ranks of each entry; every rank passes the same keys."""
        if not self.active:
            return dict(amounts)
        parts = self.gather([amounts[key] for key in amounts])
        return {key: float(sum(column)) for key, column in zip(amounts, zip(*parts, strict=True), strict=True)}

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mean over ranks of a tensor, computed in rank order so that it is the same everywhere."""
        if not self.active:
            return tensor
        parts = self.gather(tensor.detach().double().cpu())
        return (torch.stack(parts).sum(0) / self.size).to(device=tensor.device, dtype=tensor.dtype)
