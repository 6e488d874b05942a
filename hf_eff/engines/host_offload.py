"""What autograd keeps of a model's layers, held in host memory until the backward comes for it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_eff.engines.module_tree import find_blocks
from hf_eff.errors import PlanError


@dataclass
class HostStore:
    """Moves saved tensors to the host and back. Values do not change.

    Attributes:
        min_bytes: Smaller tensors stay where they are.
        device: Type of the device whose memory shall be spared; nothing else moves.
        pinned: Page-locked host memory: copies then run beside the computation.
        moved_bytes: Bytes moved so far.
    """

    min_bytes: int
    device: str
    pinned: bool = True
    moved_bytes: int = 0

    @contextlib.contextmanager
    def layer(self, module: nn.Module) -> Iterator[None]:
        """Inside, tensors that autograd saves go to the host, each once; the parameters of ``module`` stay."""
        stay = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        # A tensor saved twice is copied once. The originals are held until the layer is done, so that no other
        # tensor can take over an address meanwhile.
        seen: dict[tuple[Any, ...], tuple[torch.Tensor, _OnHost]] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor | _OnHost:
            if not self._moves(tensor) or tensor.untyped_storage().data_ptr() in stay:
                return tensor
            key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor._version)  # noqa: SLF001
            if key not in seen:
                seen[key] = (tensor, self._to_host(tensor))
            return seen[key][1]

        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            yield
        seen.clear()

    def _moves(self, tensor: torch.Tensor) -> bool:
        dense = tensor.layout == torch.strided and type(tensor) in (torch.Tensor, nn.Parameter)
        return dense and tensor.device.type == self.device and tensor.nbytes >= self.min_bytes

    def _to_host(self, tensor: torch.Tensor) -> _OnHost:
        self.moved_bytes += tensor.nbytes
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self.pinned)
        # The copy back runs later on the same stream, so that it cannot overtake this one.
        host.copy_(tensor, non_blocking=self.pinned)
        return _OnHost(host, tensor.device, self.pinned)


@dataclass
class _OnHost:
    values: torch.Tensor
    home: torch.device
    pinned: bool


def _unpack(held: torch.Tensor | _OnHost) -> torch.Tensor:
    if isinstance(held, _OnHost):
        return held.values.to(held.home, non_blocking=held.pinned, copy=True)
    return held


def offload_layers(model: nn.Module, store: HostStore) -> Callable[[], None]:
    """Let every layer of a model save into a store.

    Args:
        model: The model; only what its repeated layers save is moved, not what the loss needs at once.
        store: Where to.

    Returns:
        Makes the layers as they were.

    Raises:
        PlanError: The model has no repeated layers.
    """
    blocks = [block for _, block in find_blocks(model)]
    if not blocks:
        raise PlanError(
            f"{type(model).__name__} has no stack of alike layers whose activations could wait in host memory; use "
            "memory='row_chunks'."
        )
    undo = [_wrap(block, store) for block in blocks]

    def restore() -> None:
        for each in undo:
            each()

    return restore


def _wrap(block: nn.Module, store: HostStore) -> Callable[[], None]:
    had, inner = block.__dict__.get("forward"), block.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        with store.layer(block):
            return inner(*args, **kwargs)

    block.forward = forward

    def undo() -> None:
        if had is None:
            del block.__dict__["forward"]
        else:
            block.forward = had

    return undo
