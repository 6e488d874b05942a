"""Optimizer state as plain data: what third-party optimizers keep in objects, in attributes or in other optimizers.

transformers saves ``optimizer.state_dict()`` and reads it back with ``torch.load(weights_only=True)``, which builds
tensors, numbers and strings only. Four kinds of optimizers do not survive that:

    GaLore, APOLLO          keep a projector, a Python object, in the state of each projected matrix: loading fails
    their layerwise forms   are real optimizers behind a dummy without state: nothing is saved
    AdaLomo                 keeps its moments in attributes: nothing is saved
    GrokAdamW               keeps its state in the groups, under the parameters themselves: loading finds no owner
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from hf_eff.errors import CheckpointError

OBJECT = "__object__"
LAYERS, ATTRIBUTES, GROUP_STATE = "layers", "attributes", "state"
_OBJECTS = {
    "galore_torch": ("galore_torch.galore_projector", "GaLoreProjector"),
    "apollo_torch": ("apollo_torch.random_projector", "GradientProjector"),
    "apollo_torch.svd": ("apollo_torch.svd_projector", "GaLoreProjector"),
}
"""Word in a checkpoint: the one class that it may name."""
_WORDS = {where: word for word, where in _OBJECTS.items()}
_KEPT_ATTRIBUTES = {
    ("lomo_optim.adalomo", "AdaLomo"): ("step_num", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"),
}
_PACKAGES = ("galore_torch", "apollo_torch", "grokadamw")
"""Packages whose optimizers' state is never plain by itself."""
_PLAIN = (torch.Tensor, int, float, str, type(None))


class _Saves:
    """Stands for ``optimizer.state_dict``."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer, self._save = optimizer, optimizer.state_dict

    def __call__(self) -> dict[str, Any]:
        saved = self._save()
        states = {key: _encoded(value) for key, value in saved["state"].items()}
        extra: dict[str, Any] = {}
        if isinstance(self._optimizer, LayerWiseDummyOptimizer):
            extra[LAYERS] = [layer.state_dict() for layer in _layers(self._optimizer)]
        if names := _attributes(self._optimizer):
            extra[ATTRIBUTES] = {name: getattr(self._optimizer, name) for name in names}
        pairs = zip(saved["param_groups"], self._optimizer.param_groups, strict=True)
        groups = [_by_position(group, owner["params"]) for group, owner in pairs]
        return {**saved, "state": states, "param_groups": groups, **extra}


class _Loads:
    """Stands for ``optimizer.load_state_dict``."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer, self._load = optimizer, optimizer.load_state_dict

    def __call__(self, state_dict: Mapping[str, Any]) -> None:
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        owners = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        devices = {key: owner.device for key, owner in zip(keys, owners, strict=False)}
        states = {key: _decoded(value, devices.get(key)) for key, value in state_dict["state"].items()}
        rest = {key: value for key, value in state_dict.items() if key not in (LAYERS, ATTRIBUTES)}
        self._load({**rest, "state": states})
        for key, owner in zip(keys, owners, strict=True):
            _keep_types(self._optimizer.state.get(owner, {}), states.get(key, {}))
        for group in self._optimizer.param_groups:
            _by_parameter(group)
        if isinstance(self._optimizer, LayerWiseDummyOptimizer):
            self._load_layers(state_dict)
        if names := _attributes(self._optimizer):
            self._load_attributes(state_dict, names)

    def _load_layers(self, state_dict: Mapping[str, Any]) -> None:
        layers, saved = _layers(self._optimizer), _part(state_dict, LAYERS)
        if len(layers) != len(saved):
            raise CheckpointError(
                f"the checkpoint has the optimizers of {len(saved)} parameters and this run has {len(layers)}; resume "
                "with the same model, trainable parameters and optim_target_modules."
            )
        for layer, state in zip(layers, saved, strict=True):
            layer.load_state_dict(state)

    def _load_attributes(self, state_dict: Mapping[str, Any], names: tuple[str, ...]) -> None:
        saved = _part(state_dict, ATTRIBUTES)
        for name in names:
            present = getattr(self._optimizer, name)
            if isinstance(present, dict):
                for key, tensor in present.items():
                    tensor.copy_(saved[name][key])
            else:
                setattr(self._optimizer, name, saved[name])


def keep_plain(optimizer: torch.optim.Optimizer, *, always: bool = False) -> None:
    """Let ``state_dict`` hold all that an optimizer remembers, as plain data, and ``load_state_dict`` rebuild it.

    Loaded tensors also keep the precision they were saved in; torch's own loading rounds them to the parameter's.

    Args:
        optimizer: Changed in place, once.
        always: Also where the state is plain already, for the sake of precision.
    """
    if isinstance(optimizer.__dict__.get("state_dict"), _Saves):
        return
    if isinstance(optimizer, LayerWiseDummyOptimizer):
        for layer in _layers(optimizer):
            keep_plain(layer, always=True)
    elif not (always or _attributes(optimizer) or type(optimizer).__module__.split(".")[0] in _PACKAGES):
        return
    saves, loads = _Saves(optimizer), _Loads(optimizer)
    # On the instance: bitsandbytes' optimizers, which GaLore builds on, call none of torch's hooks when loading.
    vars(optimizer).update(state_dict=saves, load_state_dict=loads)


def follow_schedule(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizers behind a layerwise one use the learning rate that the schedule has set.

    accelerate's wrapper hides the layerwise optimizer from transformers' ``get_scheduler``, which then schedules the
    dummy's rate and leaves the real ones constant.

    Args:
        optimizer: Changed in place where it is layerwise; others are left alone.
    """
    if not isinstance(optimizer, LayerWiseDummyOptimizer):
        return

    def rated(layer: torch.optim.Optimizer, step: Callable[[], Any]) -> Callable[[], Any]:
        def at_the_scheduled_rate() -> Any:
            for group in layer.param_groups:
                group["lr"] = optimizer.param_groups[0]["lr"]
            return step()

        return at_the_scheduled_rate

    for layer in _layers(optimizer):
        vars(layer)["step"] = rated(layer, layer.step)


def _layers(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The real optimizers behind a layerwise one, in the model's order; none behind the scheduler's placeholder."""
    found: Mapping[Any, torch.optim.Optimizer] = getattr(optimizer, "optimizer_dict", None) or {}
    return list(found.values())


def _attributes(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    kind = type(optimizer)
    return _KEPT_ATTRIBUTES.get((kind.__module__, kind.__name__), ())


def _part(state_dict: Mapping[str, Any], name: str) -> Any:
    if name not in state_dict:
        raise CheckpointError(
            "the checkpoint's optimizer.pt was written without hf_eff and lacks the state of this optimizer; resume "
            "from a checkpoint of this trainer, or start from its weights as a new run."
        )
    return state_dict[name]


def _by_position(group: Mapping[str, Any], parameters: Sequence[torch.Tensor]) -> Mapping[str, Any]:
    """A group whose own state, if it has any, is under the positions of its parameters."""
    if GROUP_STATE not in group:
        return group
    own = group[GROUP_STATE]
    return {**group, GROUP_STATE: {at: own[each] for at, each in enumerate(parameters) if each in own}}


def _by_parameter(group: dict[str, Any]) -> None:
    """The reverse of ``_by_position``."""
    if GROUP_STATE in group:
        own = group[GROUP_STATE]
        group[GROUP_STATE] = {each: own[at] for at, each in enumerate(group["params"]) if at in own}


def _encoded(state: Any) -> Any:
    """A parameter's state with registered objects replaced by their fields."""
    if not isinstance(state, Mapping):
        return state
    return {key: _fields(value) if _where(value) in _WORDS else value for key, value in state.items()}


def _fields(value: Any) -> dict[str, Any]:
    fields = vars(value)
    for name, each in fields.items():
        if not all(isinstance(part, _PLAIN) for part in (each if isinstance(each, (list, tuple)) else [each])):
            raise CheckpointError(f"{type(value).__name__}.{name} is {type(each).__name__}, which cannot be saved.")
    return {OBJECT: _WORDS[_where(value)], **fields}


def _where(value: Any) -> tuple[str, str]:
    return type(value).__module__, type(value).__name__


def _decoded(state: Any, device: torch.device | None) -> Any:
    """The reverse of ``_encoded``, with the tensors of objects on a device."""
    if not isinstance(state, Mapping):
        return state
    return {
        key: _rebuilt(value, device) if isinstance(value, Mapping) and OBJECT in value else value
        for key, value in state.items()
    }


def _rebuilt(fields: Mapping[str, Any], device: torch.device | None) -> Any:
    word = fields[OBJECT]
    if word not in _OBJECTS:
        raise CheckpointError(f"the checkpoint's optimizer state names the unknown object {word!r}.")
    module, name = _OBJECTS[word]
    kind = getattr(import_module(module), name)
    made = kind.__new__(kind)
    vars(made).update({key: _moved(value, device) for key, value in fields.items() if key != OBJECT})
    return made


def _moved(value: Any, device: torch.device | None) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, copy=True)
    return type(value)(_moved(part, device) for part in value) if isinstance(value, (list, tuple)) else value


def _keep_types(loaded: Any, saved: Any) -> None:
    """Put back the precision of tensors that were rounded to their parameter's in loading."""
    if not isinstance(saved, Mapping):
        return
    for key, tensor in saved.items():
        present = loaded.get(key)
        if isinstance(tensor, torch.Tensor) and isinstance(present, torch.Tensor) and present.dtype != tensor.dtype:
            loaded[key] = tensor.to(present.device, copy=True)
