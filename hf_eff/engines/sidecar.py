"""State of a run beside a checkpoint: JSON for plain values, safetensors for tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hf_eff.errors import CheckpointError
from hf_eff.files import replacing, write_json

STATE_JSON = "hf_eff_state.json"
STATE_TENSORS = "hf_eff_state.safetensors"
_TENSOR = "__tensor__"


def save_state(folder: str | Path, state: Mapping[str, Any]) -> None:
    """Write a nested mapping of plain values and tensors. The JSON comes last: it marks the state whole."""
    tensors: dict[str, torch.Tensor] = {}
    plain = _strip(state, "", tensors)
    folder = Path(folder)
    if tensors:
        with replacing(folder / STATE_TENSORS) as temporary:
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, temporary)
    write_json(folder / STATE_JSON, plain)


def load_state(folder: str | Path) -> dict[str, Any] | None:
    """Read what ``save_state`` wrote; None when the folder holds no such state.

    Raises:
        CheckpointError: The JSON is damaged or tensors that it names are missing.
    """
    path = Path(folder) / STATE_JSON
    if not path.is_file():
        return None
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); resume from an earlier checkpoint.") from None
    file = path.with_name(STATE_TENSORS)
    tensors = load_file(file) if file.is_file() else {}
    return _fill(plain, tensors, path)


def _strip(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        return {str(key): _strip(item, f"{name}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strip(item, f"{name}/{position}", tensors) for position, item in enumerate(value)]
    return value


def _fill(value: Any, tensors: Mapping[str, torch.Tensor], path: Path) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            if value[_TENSOR] not in tensors:
                raise CheckpointError(f"{path} names a tensor that {STATE_TENSORS} lacks; resume from an earlier one.")
            return tensors[value[_TENSOR]]
        return {key: _fill(item, tensors, path) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill(item, tensors, path) for item in value]
    return value
