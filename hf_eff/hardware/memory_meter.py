"""Peak bytes of a real training step, split into weights, gradients, optimizer state, activations and the rest."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hf_eff.contracts.cost import MEMORY_TERMS
from hf_eff.hardware.probe import PeakMemory, current_bytes, device_name, release_unused


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind some tensors, each once, whatever ties and views share it."""
    seen: dict[tuple[str, int], int] = {}
    for tensor in itertools.chain.from_iterable(map(_dense_parts, tensors)):
        storage = _local(tensor).untyped_storage()
        seen[_key(tensor, storage)] = storage.nbytes()
    return sum(seen.values())


def weight_tensors(model: nn.Module) -> list[torch.Tensor]:
    """Parameters, buffers, and the constants that quantised parameters carry."""
    constants = [_tensors_in(getattr(parameter, "quant_state", None)) for parameter in model.parameters()]
    return [*model.parameters(), *model.buffers(), *itertools.chain.from_iterable(constants)]


_STATELESS = ("param_groups", "defaults", "model", "family")
"""Attributes of optimizers that hold no state of theirs; a family of random directions has scratch memory only."""


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Every tensor that an optimizer holds, beside parameters and gradients.

    ``state``, with the projections and quantisation constants in it, and whatever else it keeps state in: attributes,
    or one optimizer a parameter, as layer-wise optimizers do.
    """
    return _held_by(optimizer, set())


def _held_by(optimizer: torch.optim.Optimizer, seen: set[int]) -> list[torch.Tensor]:
    seen.add(id(optimizer))
    groups = optimizer.param_groups
    held = {name: value for name, value in vars(optimizer).items() if name not in _STATELESS}
    inside = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    found = [*_tensors_in(held, seen), *_tensors_in(inside, seen)]
    parameters = {id(each) for group in groups for each in group["params"]}
    return [each for each in found if id(each) not in parameters and not isinstance(each, nn.Parameter)]


class MemoryMeter:
    """Measures the memory terms of the steps that run inside it.

    Example::

        meter = MemoryMeter(model)
        with meter.forward_backward():
            loss = model(**batch).loss
            loss.backward()
        optimizer.step()
        meter.observe(optimizer)
        meter.peak_bytes()

    Blind spots: tensors that custom autograd functions keep as plain attributes (4-bit layers), and what checkpointing
    holds or recomputes, count as ``rest``. Measuring slows a step; a few steps are enough.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Start measuring. Memory-mapped weights are read once, so that they count as held from the start.

        Args:
            model: The model, on its device.
            optimizer: The optimizer, when it holds state already.
        """
        self._model = model
        self._peaks = dict.fromkeys(MEMORY_TERMS, 0)
        for parameter in model.parameters():
            _touch(parameter)
        release_unused()
        self.observe(optimizer)
        self._saved = _SavedTensors({_key(each, each.untyped_storage()) for each in map(_local, weight_tensors(model))})
        self._idle_bytes = current_bytes() - sum(self._peaks.values())
        self._window = PeakMemory().start()

    @contextmanager
    def forward_backward(self) -> Iterator[None]:
        """Count what autograd saves in the ``with`` block, and the gradients there at its end."""
        with torch.autograd.graph.saved_tensors_hooks(self._saved.pack, self._saved.unpack):
            yield
        self._peaks["activations"] = max(self._peaks["activations"], self._saved.peak)
        self.observe()

    def observe(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Look at weights, gradients and, where given, optimizer state as they are now."""
        gradients = [each.grad for each in self._model.parameters() if each.grad is not None]
        self._raise("weights", storage_bytes(weight_tensors(self._model)))
        self._raise("gradients", storage_bytes(gradients))
        if optimizer is not None:
            self._raise("optimizer", storage_bytes(optimizer_tensors(optimizer)))

    def peak_bytes(self) -> dict[str, float]:
        """Bytes per term, keys of ``MEMORY_TERMS``.

        The four named terms are peaks of their own. ``rest`` is what the measured peak of the whole process (less the
        idle interpreter), or of the accelerator's allocator, exceeds their sum by; 0 when the terms peak at different
        moments and their sum is the larger.
        """
        named = {term: float(self._peaks[term]) for term in MEMORY_TERMS if term != "rest"}
        return {**named, "rest": max(0.0, self.total_bytes() - sum(named.values()))}

    def total_bytes(self) -> float:
        """Measured peak of everything, less what the process held beside the model at the start."""
        idle = 0 if device_name() == "cuda" else self._idle_bytes
        return float(self._window.peak() - idle)

    def _raise(self, term: str, amount: int) -> None:
        self._peaks[term] = max(self._peaks[term], amount)


class _SavedTensors:
    """Bytes of the storages that autograd holds for the backward, now and at their peak."""

    def __init__(self, excluded: set[tuple[str, int]]) -> None:
        self.peak = 0
        self._live = 0
        self._excluded = excluded
        self._holders: dict[tuple[str, int], int] = {}

    def pack(self, tensor: torch.Tensor) -> Any:
        """Count a tensor that autograd saves; the holder's end gives its bytes back."""
        local = _local(tensor)
        if local.layout != torch.strided:  # sparse tensors have no single storage
            return tensor
        storage = local.untyped_storage()
        key = _key(local, storage)
        if key in self._excluded:
            return tensor
        return _Held(tensor, key, storage.nbytes(), self)

    @staticmethod
    def unpack(held: Any) -> torch.Tensor:
        """The tensor that ``pack`` was given."""
        return held.tensor if isinstance(held, _Held) else held

    def add(self, key: tuple[str, int], size: int) -> None:
        """One more holder of a storage."""
        self._holders[key] = self._holders.get(key, 0) + 1
        if self._holders[key] == 1:
            self._live += size
            self.peak = max(self.peak, self._live)

    def remove(self, key: tuple[str, int], size: int) -> None:
        """One holder less."""
        self._holders[key] -= 1
        if self._holders[key] == 0:
            del self._holders[key]
            self._live -= size


class _Held:
    """A saved tensor that reports when autograd lets go of it."""

    __slots__ = ("_key", "_owner", "_size", "tensor")

    def __init__(self, tensor: torch.Tensor, key: tuple[str, int], size: int, owner: _SavedTensors) -> None:
        self.tensor, self._key, self._size, self._owner = tensor, key, size, owner
        owner.add(key, size)

    def __del__(self) -> None:
        self._owner.remove(self._key, self._size)


def _key(tensor: torch.Tensor, storage: torch.UntypedStorage) -> tuple[str, int]:
    """Identity of a storage. On the meta device no storage has an address, so the tensor stands for it."""
    address = storage.data_ptr()
    return (str(tensor.device), address) if address else (f"{tensor.device} object", id(tensor))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a sharded tensor; any other tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    return to_local() if to_local is not None else tensor.detach()


def _dense_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Tensors that hold a sparse gradient or a quantised state; a dense tensor is its own part."""
    if not hasattr(tensor, "to_local") and hasattr(tensor, "__tensor_flatten__"):
        return [part for name in tensor.__tensor_flatten__()[0] for part in _dense_parts(getattr(tensor, name))]
    if tensor.layout == torch.sparse_coo:
        return [tensor.coalesce().indices(), tensor.coalesce().values()]
    return [tensor]


def _tensors_in(value: Any, seen: set[int] | None = None) -> list[torch.Tensor]:
    """Tensors in nested dicts and lists, in other optimizers, and in plain objects such as quantisation constants."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, nn.Module):
        return []
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, torch.optim.Optimizer):
        return _held_by(value, seen)
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for each in value for tensor in _tensors_in(each, seen)]
    if type(value).__module__.partition(".")[0] in ("torch", "builtins") or callable(value):
        return []
    seen.add(id(value))  # objects may refer back to those that hold them
    return _tensors_in(getattr(value, "__dict__", {}), seen)


def _touch(parameter: torch.Tensor) -> None:
    """Read one element a page, so that a memory-mapped weight is resident before the baseline is taken."""
    if parameter.device.type == "cpu" and parameter.is_contiguous():
        with torch.no_grad():
            parameter.view(-1)[:: max(1, 1024 // parameter.element_size())].to(torch.float32).sum()
