"""The switch from some blocks to the next, and what it asks of the optimizer and of activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from hf_eff.engines.block_partition import Partition
from hf_eff.engines.state_store import StatePolicy, StateStore, make_store, placed
from hf_eff.errors import PlanError


class BlockSwitch:
    """Makes ``requires_grad``, gradients and optimizer state follow the active blocks.

    Parameters are looked up by name at every switch, because sharding replaces the objects. A block that
    stays active keeps its state whatever the policy.

    Args:
        model: The unwrapped model.
        optimizer: Holds all candidates in its groups; never wrapped.
        partition: What belongs to which block.
        policy: What happens to the state of a block that is left: ``"reset"`` drops it, ``"keep"`` leaves it where
            it is, ``"offload"`` moves it to host memory (on a CPU the same as ``"keep"``), ``"disk"`` to files.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        partition: Partition,
        policy: StatePolicy = "reset",
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.partition = partition
        self.policy = policy
        self.store = make_store(policy, next(model.parameters()).device)
        self.active: tuple[int, ...] | None = None
        self._brought = StateStore()

    def activate(self, blocks: tuple[int, ...]) -> None:
        """Freeze all blocks but these. Does nothing when just they are active already."""
        if blocks == self.active:
            return
        active, staying = set(self.active_names(blocks)), self._staying(blocks)
        named = dict(self._candidates())
        for name, parameter in named.items():
            parameter.requires_grad_(name in active)
            if name not in active:
                parameter.grad = None
            if name not in staying:
                self._leave(name, parameter)
        for name in active:
            self._enter(name, named)
        self.active = blocks

    def state_dict(self) -> dict[str, Any]:
        """State that was moved away, as a store's ``state_dict()``; empty where the optimizer holds all state."""
        return self.store.state_dict() if self.store is not None and self.store.names() else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take ``state_dict()`` back; to be followed by the optimizer's own load, then by ``settle``."""
        if state:
            (self._brought if self.store is None else self.store).load_state_dict(state)

    def resting_with_state(self) -> list[str]:
        """Parameters that rest and whose state the optimizer holds."""
        active = set() if self.active is None else set(self.active_names(self.active))
        held = self.optimizer.state
        return [name for name, parameter in self._candidates() if name not in active and held.get(parameter)]

    def expect(self, names: Iterable[str]) -> None:
        """Let state for resting parameters be loaded: FSDP2 gives it to trainable ones only. ``settle`` ends this."""
        expected = set(names)
        for name, parameter in self._candidates():
            if name in expected and hasattr(parameter, "device_mesh"):
                parameter.requires_grad_(True)

    def settle(self) -> None:
        """After a load: freeze what rests, and put its state where the policy wants it."""
        if self.active is None:
            return
        active = self.active_names(self.active)
        for name, parameter in self._candidates():
            parameter.requires_grad_(name in active)
            brought = self._brought.take(name)
            if brought is not None:
                self.optimizer.state[parameter] = placed(brought, parameter, self._group(parameter))
            if name not in active and self.store is not None:
                self._leave(name, parameter)
        self._brought.close()

    def release(self) -> None:
        """Make every candidate trainable again and let go of state that was moved away."""
        for _, parameter in self._candidates():
            parameter.requires_grad_(True)
        self.active = None
        if self.store is not None:
            self.store.close()

    def active_names(self, blocks: tuple[int, ...]) -> list[str]:
        """Parameters that train while these blocks are active."""
        return [*self.partition.always, *(name for index in blocks for name in self.partition.blocks[index])]

    def _staying(self, blocks: tuple[int, ...]) -> set[str]:
        """Parameters that are active before and after a switch to ``blocks``."""
        both = tuple(index for index in blocks if index in (self.active or ()))
        return set(self.active_names(both))

    def _leave(self, name: str, parameter: nn.Parameter) -> None:
        if self.policy == "reset":
            self.optimizer.state.pop(parameter, None)
        elif self.store is not None and parameter in self.optimizer.state:
            self.store.put(name, self.optimizer.state.pop(parameter))

    def _enter(self, name: str, named: Mapping[str, nn.Parameter]) -> None:
        state = None if self.store is None else self.store.take(name)
        if state is not None:
            parameter = named[name]
            self.optimizer.state[parameter] = placed(state, parameter, self._group(parameter))

    def _group(self, parameter: nn.Parameter) -> dict[str, Any]:
        groups = self.optimizer.param_groups
        return next(group for group in groups if any(each is parameter for each in group["params"]))

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
