"""The switch from one block to the next, and what it asks of the optimizer and of activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from hf_eff.engines.block_partition import Partition
from hf_eff.errors import PlanError


class BlockSwitch:
    """Makes ``requires_grad``, gradients and optimizer state follow the active block.

    Parameters are looked up by name at every switch, because sharding replaces the objects.

    Args:
        model: The unwrapped model.
        optimizer: Holds all candidates in its groups; never wrapped.
        partition: What belongs to which block.
        keep_state: Keep the optimizer state of a block that is left, instead of dropping it.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, partition: Partition, *, keep_state: bool = False
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.partition = partition
        self.keep_state = keep_state
        self.index: int | None = None

    def activate(self, index: int) -> None:
        """Freeze all blocks but one. Does nothing when that block is active already."""
        if index == self.index:
            return
        always = {*self.partition.always}
        active = always | {*self.partition.blocks[index]}
        for name, parameter in self._candidates():
            parameter.requires_grad_(name in active)
            if name not in active:
                parameter.grad = None
            if name not in always and not self.keep_state:
                self.optimizer.state.pop(parameter, None)
        self.index = index

    def release(self) -> None:
        """Make every candidate trainable again."""
        for _, parameter in self._candidates():
            parameter.requires_grad_(True)
        self.index = None

    def active_names(self, index: int) -> list[str]:
        """Parameters that train while block ``index`` is active."""
        return [*self.partition.always, *self.partition.blocks[index]]

    def _candidates(self) -> Iterator[tuple[str, nn.Parameter]]:
        names = {*self.partition.always, *self.partition.frozen}.union(*self.partition.blocks)
        return ((name, parameter) for name, parameter in self.model.named_parameters() if name in names)


def require_restartable(optimizer_class: Any, optimizer_kwargs: Mapping[str, Any]) -> None:
    """Refuse an optimizer that cannot forget a block's state, by trying it on two scratch matrices.

    The first step after forgetting must equal the first step ever, and a matrix without a gradient
    must stay as it is. Optimizers that count steps per group (schedule-free ones), that keep one state
    for all parameters (L-BFGS), or that update inside the backward (LOMO, layerwise GaLore) fail.

    Raises:
        PlanError: The optimizer cannot train block by block.
    """
    name = getattr(optimizer_class, "__name__", str(optimizer_class))
    problem = PlanError(
        f"optim resolves to {name}, whose state cannot be dropped and started anew for one block; "
        "use optim='adamw_torch' (or 'sgd', 'adafactor', 'adamw_bnb_8bit') or memory='full'."
    )
    if not isinstance(optimizer_class, type) or {"params", "model", "optimizer_dict"} & set(optimizer_kwargs):
        raise problem
    try:
        restarts = _restarts(optimizer_class, optimizer_kwargs)
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        raise problem from error
    if not restarts:
        raise problem


def _restarts(optimizer_class: Any, optimizer_kwargs: Mapping[str, Any]) -> bool:
    start = torch.linspace(-1.0, 1.0, 16).reshape(4, 4)
    moved, idle = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = optimizer_class([moved, idle], **optimizer_kwargs)
    results = []
    for _ in range(2):
        with torch.no_grad():
            moved.copy_(start)
        optimizer.state.pop(moved, None)
        moved.grad = start.flip(0).clone()
        optimizer.step()
        results.append(moved.detach().clone())
    return torch.equal(*results) and torch.equal(idle, start)


def require_non_reentrant(model: nn.Module) -> None:
    """Refuse reentrant activation checkpointing, which needs gradients at the input of every layer.

    Raises:
        PlanError: A module of the model is checkpointed that way.
    """
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            keywords = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
            if keywords.get("use_reentrant", True):
                raise PlanError(
                    "activation checkpointing is reentrant, so the backward would run through every frozen layer; "
                    "set activation_checkpointing_kwargs={'use_reentrant': False} "
                    "(gradient_checkpointing_kwargs in older transformers)."
                )


def pause_input_gradients(model: nn.Module) -> Callable[[], None]:
    """Keep the backward from running below the lowest trainable layer.

    transformers and PEFT make the embeddings' output require gradients whenever checkpointing is on, by
    a hook that non-reentrant checkpointing does not need. Each enabling adds one more, of which
    ``disable_input_require_grads`` knows the last only; here all of them are taken out.

    Returns:
        Puts the hooks back.
    """
    paused = [
        (hooks, key, hook)
        for hooks in (getattr(module, "_forward_hooks", {}) for module in model.modules())
        for key, hook in hooks.items()
        if getattr(hook, "__name__", "").startswith("make_inputs_require_grad")
    ]
    for hooks, key, _ in paused:
        del hooks[key]

    def resume() -> None:
        for hooks, key, hook in paused:
            hooks[key] = hook

    return resume
