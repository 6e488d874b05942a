"""Hooks by which an optimizer updates parameters inside the backward, and how to take them off again.

LOMO and the layerwise forms of GaLore and APOLLO register such hooks where they are made and never remove them: made
twice over one model they would update twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_REGISTRIES = ("_backward_hooks", "_post_accumulate_grad_hooks")


class UpdateHooks:
    """The parameter hooks that were registered while watching."""

    def __init__(self) -> None:
        self._found: list[tuple[dict[int, Any], int]] = []

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        """Note what is registered on the model's parameters within."""
        before = {(id(hooks), key) for hooks in _registries(model) for key in hooks}
        try:
            yield
        finally:
            self._found += [
                (hooks, key) for hooks in _registries(model) for key in hooks if (id(hooks), key) not in before
            ]

    def remove(self) -> None:
        """Take off what was noted."""
        for hooks, key in self._found:
            hooks.pop(key, None)
        self._found.clear()


@contextmanager
def without_new_hooks(model: nn.Module) -> Iterator[None]:
    """Take off what is registered on the model's parameters within."""
    hooks = UpdateHooks()
    try:
        with hooks.watch(model):
            yield
    finally:
        hooks.remove()


def _registries(model: nn.Module) -> list[dict[int, Any]]:
    found = (getattr(parameter, name, None) for parameter in model.parameters() for name in _REGISTRIES)
    return [hooks for hooks in found if hooks]
