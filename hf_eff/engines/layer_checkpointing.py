"""Activation checkpointing of a transformer's layers, switched on and off without a trace."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_eff.engines.block_switch import pause_input_gradients, require_non_reentrant
from hf_eff.engines.module_tree import find_blocks
from hf_eff.errors import PlanError

_SWITCH, _FUNCTION = "gradient_checkpointing", "_gradient_checkpointing_func"


def is_checkpointing(model: nn.Module) -> bool:
    """Whether a module of the model is checkpointed now."""
    return any(getattr(module, _SWITCH, False) for module in model.modules())


def checkpoint_layers(model: nn.Module, every: int = 1) -> Callable[[], None]:
    """Turn checkpointing on for every so many layers, and keep the backward above the lowest trained parameter.

    transformers' switches are set one by one instead of by its own method: that would also mark the embeddings' output
    as requiring gradients, which non-reentrant checkpointing does not need and which makes the backward, and the
    recomputation with it, run through every frozen layer. Such marks of others rest meanwhile. A key-value cache,
    which would be dropped layer by layer with a warning, is not asked for.

    Args:
        model: A transformers model, wrapped or not. Where checkpointing is on already, its function is kept.
        every: 1 for all layers; n for the first, the (n+1)-th, and so on.

    Returns:
        Puts everything back.

    Raises:
        PlanError: The model has no such switch, or is checkpointed reentrantly.
    """
    require_non_reentrant(model)
    switches = [module for module in model.modules() if hasattr(module, _SWITCH)]
    if not switches or not _supported(model):
        raise PlanError(
            f"{type(model).__name__} has no layers that transformers can checkpoint; use memory='row_chunks' for "
            "smaller parts, or memory='badam' for a shorter backward."
        )
    skipped = [block for index, (_, block) in enumerate(find_blocks(model)) if index % every]
    left_whole = {id(part) for block in skipped for part in block.modules()}
    recompute = functools.partial(checkpoint, use_reentrant=False)
    undo = [_set(module, _FUNCTION, recompute) for module in switches if not getattr(module, _SWITCH)]
    undo += [_set(module, _SWITCH, id(module) not in left_whole) for module in switches]
    undo += [pause_input_gradients(model), _without_cache(model)]

    def restore() -> None:
        for each in reversed(undo):
            each()

    return restore


def _supported(model: nn.Module) -> bool:
    answers = [getattr(module, "supports_gradient_checkpointing", None) for module in model.modules()]
    return next((bool(answer) for answer in answers if answer is not None), True)


def _set(module: nn.Module, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute of the instance; the result undoes it."""
    had, before = name in module.__dict__, module.__dict__.get(name)
    setattr(module, name, value)

    def undo() -> None:
        if had:
            setattr(module, name, before)
        else:
            delattr(module, name)

    return undo


def _without_cache(model: nn.Module) -> Callable[[], None]:
    """Training forwards ask for no key-value cache, whatever the configuration says."""
    from transformers import PreTrainedModel

    inner = next((part for part in model.modules() if isinstance(part, PreTrainedModel)), None)
    if inner is None or not getattr(inner.config, "use_cache", False):
        return lambda: None
    if "use_cache" not in inspect.signature(inner.forward).parameters:
        return lambda: None

    def refuse(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {"use_cache": False, **kwargs} if module.training else kwargs

    return model.register_forward_pre_hook(refuse, with_kwargs=True).remove
