"""Other weights for the time of a forward where FSDP2 has divided the parameters among processes.

Each process changes the rows it holds just before its FSDP module gathers them, and puts them back when that module
ends. Directions are drawn by the entry of the whole parameter, so that together the processes see what one process
would. What FSDP2 has gathered once it may use again, so everything gathered is let go after every change.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Replicate
from torch.distributed.tensor.placement_types import Shard as Divided

from hf_eff.engines.directions import Shard
from hf_eff.engines.zeroth_order import local_part
from hf_eff.errors import PlanError

Result = TypeVar("Result")
Value = Callable[[str, Tensor], Tensor]


class ShardedWeights:
    """Evaluates a sharded model with replaced parameters.

    Args:
        model: The sharded model, or one that holds it.
        parameters: What is replaced, by name: the shards.

    Attributes:
        holds: Whether replacements stay until the evaluation ends; otherwise until their module's forward ends.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self.holds = False
        self._modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._owned, self._resident = _owned(model, self.parameters)

    def evaluate(self, value: Value, function: Callable[[], Result]) -> Result:
        """Call ``function`` with every parameter replaced by ``value(name, this process's part)``.

        Args:
            value: Gives the replacement of a part, of its shape and type.
            function: Runs the model, without gradients; on every process alike.
        """
        self.release()
        with self._replaced(value):
            return function()

    def release(self) -> None:
        """Let go of gathered parameters, which may be older than the shards."""
        for module in self._modules:
            module.reshard()

    @contextmanager
    def _replaced(self, value: Value) -> Iterator[None]:
        stored: dict[str, Tensor] = {}
        handles: list[torch.utils.hooks.RemovableHandle] = []
        try:
            self._enter(self._resident, value, stored)
            for module, names in self._owned.items():
                leave = None if self.holds else partial(self._leave, names, stored)
                handles += _hooks(module, partial(self._enter, names, value, stored), leave)
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._leave(list(stored), stored)
            self.release()

    def _enter(self, names: Sequence[str], value: Value, stored: dict[str, Tensor], *_: object) -> None:
        for name in names:
            if name not in stored:
                part = local_part(self.parameters[name].data)
                stored[name] = part.clone()
                part.copy_(value(name, stored[name]))

    def _leave(self, names: Sequence[str], stored: dict[str, Tensor], *_: object) -> None:
        for name in names:
            if name in stored:
                local_part(self.parameters[name].data).copy_(stored.pop(name))


def shards_of(parameters: Mapping[str, Tensor]) -> dict[str, Shard]:
    """Which rows of each sharded parameter this process holds.

    Raises:
        PlanError: A parameter is divided along another dimension than the first, or twice.
    """
    return {name: _shard(name, each) for name, each in parameters.items() if isinstance(each, DTensor)}


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has divided a module of the model."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def gather_again(model: nn.Module) -> None:
    """Let go of gathered parameters after the shards have changed; nothing on a model that is not sharded."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _shard(name: str, parameter: DTensor) -> Shard:
    divided = [i for i, each in enumerate(parameter.placements) if not isinstance(each, Replicate)]
    placements = [parameter.placements[i] for i in divided]
    if not divided:
        return Shard(tuple(parameter.shape), 0)
    if len(divided) > 1 or type(placements[0]) is not Divided or placements[0].dim != 0:
        raise PlanError(
            f"zeroth-order training under FSDP2 needs parameters divided along their first dimension, and {name!r} is "
            f"placed as {parameter.placements}; leave shard_placement_fn at its default."
        )
    mesh, rows = parameter.device_mesh, parameter.shape[0]
    each = -(-rows // mesh.size(divided[0]))
    return Shard(tuple(parameter.shape), min(rows, each * mesh.get_local_rank(divided[0])))


def _owned(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> tuple[dict[FSDPModule, list[str]], list[str]]:
    """Names of the parameters that each FSDP module gathers for itself, and of those gathered for several at once.

    A module gathers what lies below it and below no other FSDP module in between. Of modules that were sharded as one
    group, the first to run gathers for all, and which one that is shows only then.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    found: dict[FSDPModule, list[str]] = defaultdict(list)

    def visit(module: nn.Module, owner: FSDPModule | None) -> None:
        owner = module if isinstance(module, FSDPModule) else owner
        for parameter in module.parameters(recurse=False):
            name = names.pop(id(parameter), None)
            if name is not None and owner is not None:
                found[owner].append(name)
        for child in module.children():
            visit(child, owner)

    visit(model, None)
    groups = Counter(_group(module) for module in model.modules() if isinstance(module, FSDPModule))
    shared = [module for module in found if groups[_group(module)] > 1]
    resident = [name for module in shared for name in found[module]]
    return {module: held for module, held in found.items() if module not in shared}, resident


def _group(module: FSDPModule) -> int:
    return id(module._get_fsdp_state())  # noqa: SLF001 - torch has no public way to ask


def _hooks(
    module: Any, enter: Callable[..., None], leave: Callable[..., None] | None
) -> list[torch.utils.hooks.RemovableHandle]:
    """The first runs ahead of FSDP2's own hook, which gathers."""
    before = module.register_forward_pre_hook(enter, prepend=True)
    return [before] if leave is None else [before, module.register_forward_hook(leave, always_call=True)]
