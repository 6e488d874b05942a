"""Where the optimizer state of blocks that rest is kept: in host memory or in files, bit for bit."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from hf_eff.errors import PlanError

StatePolicy = Literal["reset", "keep", "offload", "disk"]
State = dict[str, Any]
"""Optimizer state of one parameter: tensors and plain values by name."""
_SEPARATOR = "::"


class StateStore:
    """Optimizer state by parameter name, away from the device. This one keeps it in host memory.

    On an accelerator the host's copies are pinned and used again at every visit, so that a copy costs one transfer.
    """

    def __init__(self) -> None:
        self._plain: dict[str, State] = {}
        self._buffers: dict[str, dict[str, torch.Tensor]] = {}

    def put(self, name: str, state: Mapping[str, Any]) -> None:
        """Keep a parameter's state.

        Raises:
            PlanError: A tensor is of a kind that cannot be copied as plain numbers.
        """
        tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
        for value in tensors.values():
            _require_plain(value)
        self._keep(name, tensors)
        self._plain[name] = {key: value for key, value in state.items() if key not in tensors}

    def take(self, name: str) -> State | None:
        """Give a parameter's state back, with its tensors on the host, and forget it; None without one.

        The tensors may be overwritten by the next ``put`` of this name.
        """
        if name not in self._plain:
            return None
        return {**self._plain.pop(name), **self._release(name)}

    def names(self) -> list[str]:
        """Parameters whose state is here."""
        return list(self._plain)

    def state_dict(self) -> dict[str, Any]:
        """All of it: tensors under string keys, and the rest as JSON-able values under ``"plain"``."""
        tensors = {
            f"{name}{_SEPARATOR}{key}": value for name in self._plain for key, value in sorted(self._look(name).items())
        }
        return {**tensors, "plain": {name: dict(self._plain[name]) for name in sorted(self._plain)}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the contents by those of ``state_dict()``."""
        self.close()
        for name, plain in state["plain"].items():
            start = f"{name}{_SEPARATOR}"
            tensors = {key[len(start) :]: value for key, value in state.items() if key.startswith(start)}
            self.put(name, {**plain, **tensors})

    def close(self) -> None:
        """Forget everything."""
        self._plain.clear()
        self._buffers.clear()

    def _keep(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        old, held = self._buffers.get(name, {}), {}
        for key, value in tensors.items():
            buffer = old.get(key)
            fits = buffer is not None and buffer.shape == value.shape and buffer.dtype == value.dtype
            held[key] = buffer if buffer is not None and fits else _host_like(value)
            held[key].copy_(value, non_blocking=held[key].is_pinned())
        self._buffers[name] = held

    def _release(self, name: str) -> Mapping[str, torch.Tensor]:
        return self._buffers[name]

    def _look(self, name: str) -> Mapping[str, torch.Tensor]:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()  # copies to pinned memory may still be under way
        return self._buffers[name]


class DiskStore(StateStore):
    """Keeps state in a private temporary folder, one safetensors file a parameter, read by mapping it into memory.

    The folder lies where ``tempfile`` puts it (the environment's TMPDIR) and goes with ``close()``, with the object
    or with the process.
    """

    def __init__(self) -> None:
        super().__init__()
        self._folder: Path | None = None
        self._remove: Callable[[], Any] | None = None
        self._files: dict[str, Path] = {}

    @property
    def folder(self) -> Path | None:
        """Where the files lie; None while there is none."""
        return self._folder

    def close(self) -> None:
        """Remove the folder."""
        super().close()
        self._files.clear()
        if self._remove is not None:
            self._remove()
        self._folder = self._remove = None

    def _keep(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="hf_eff-state-"))
            self._remove = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        path = self._files.setdefault(name, self._folder / f"{len(self._files)}.safetensors")
        save_file(_apart({key: value.detach().cpu().contiguous() for key, value in tensors.items()}), path)

    def _release(self, name: str) -> Mapping[str, torch.Tensor]:
        held = {key: value.clone() for key, value in self._look(name).items()}
        self._files[name].unlink()
        return held

    def _look(self, name: str) -> Mapping[str, torch.Tensor]:
        return load_file(self._files[name])


def make_store(policy: StatePolicy, device: torch.device) -> StateStore | None:
    """The store of a policy; None where state is dropped or stays beside the active state.

    On a CPU there is no other memory to offload to, so that ``"offload"`` is ``"keep"`` there.
    """
    if policy == "disk":
        return DiskStore()
    return StateStore() if policy == "offload" and device.type != "cpu" else None


def placed(state: Mapping[str, Any], parameter: torch.Tensor, group: Mapping[str, Any]) -> State:
    """State as an optimizer keeps it for ``parameter``: copies of the tensors on its device, in their own precision."""
    return {name: _placed(name, value, parameter, group) for name, value in state.items()}


def _placed(name: str, value: Any, parameter: torch.Tensor, group: Mapping[str, Any]) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    # torch keeps step counters on the CPU unless the update is fused or captured in a graph.
    stays = name == "step" and not (group.get("fused") or group.get("capturable"))
    return value.clone() if stays else value.to(parameter.device, copy=True, non_blocking=value.is_pinned())


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, copies of those that share memory with an earlier one: safetensors refuses them."""
    seen: set[int] = set()
    result = {}
    for key, value in tensors.items():
        address = value.untyped_storage().data_ptr()
        result[key] = value.clone() if address in seen else value
        seen.add(address)
    return result


def _require_plain(value: torch.Tensor) -> None:
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        raise PlanError(
            f"optimizer state of type {type(value).__name__} cannot be moved to host memory or files; use "
            "state_policy='keep' or 'reset', or optim='adamw_torch'."
        )


def _host_like(value: torch.Tensor) -> torch.Tensor:
    pinned = value.device.type != "cpu"
    return torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=pinned)
