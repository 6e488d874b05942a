"""Memory methods, one file each, and the stack that lets methods of different slots work together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_eff.contracts.memory import BatchShape, MemoryMethod, OptimizerContext, SamplerContext, StepContext
from hf_eff.contracts.spec import SLOTS
from hf_eff.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hf_eff.contracts.cost import ModelFacts
    from hf_eff.options import Chosen

_ORDER = SLOTS["memory"]


def _place(chosen: Chosen) -> int:
    return _ORDER.index(chosen.spec.slot)


class MemoryStack(MemoryMethod):
    """Several methods as one: each hook reaches every part, outermost slot first.

    Args:
        chosen: The methods of a run, at most one a slot.
    """

    def __init__(self, chosen: Sequence[Chosen]) -> None:
        self._chosen = sorted(chosen, key=_place)
        self.parts: list[MemoryMethod] = [part.build() for part in self._chosen]
        self.added: list[MemoryMethod] = []

    @property
    def names(self) -> list[str]:
        """Names of the methods, outermost first."""
        return [part.spec.name for part in self._chosen]

    def add(self, chosen: Chosen) -> MemoryMethod:
        """Put one more method in its place, in the middle of a run. Its hooks are the caller's to open.

        Returns:
            The method; ``added`` lists all such methods in the order they came.
        """
        self._chosen = sorted([*self._chosen, chosen], key=_place)
        method: MemoryMethod = chosen.build()
        self.parts.insert(self._chosen.index(chosen), method)
        self.added.append(method)
        return method

    @property
    def changes_model(self) -> bool:
        """Whether a part replaces or wraps the model before the trainer is built."""
        return bool(self.model_changes)

    @property
    def model_changes(self) -> dict[str, dict[str, Any]]:
        """Options of the parts that replace or wrap the model, by name, outermost first."""
        return {
            chosen.spec.name: chosen.config.to_dict()
            for chosen, part in zip(self._chosen, self.parts, strict=True)
            if type(part).prepare_model is not MemoryMethod.prepare_model
        }

    def prepare_model(self, model: nn.Module, seed: int) -> nn.Module:
        """Let every part change the model, weights first."""
        for part in self.parts:
            model = part.prepare_model(model, seed)
        return model

    def create_optimizer(self, context: OptimizerContext) -> torch.optim.Optimizer | None:
        """The innermost optimizer that a part makes, or None for the stock one."""
        for part in reversed(self.parts):
            optimizer = part.create_optimizer(context)
            if optimizer is not None:
                return optimizer
        return None

    def train_begin(self, model: nn.Module, global_step: int) -> None:
        """Forward to every part."""
        for part in self.parts:
            part.train_begin(model, global_step)

    def sampler(self, context: SamplerContext) -> torch.utils.data.Sampler[int] | None:
        """The innermost order that a part has, or None for the trainer's own."""
        orders = (part.sampler(context) for part in reversed(self.parts))
        return next((order for order in orders if order is not None), None)

    def step_begin(self, global_step: int) -> None:
        """Forward to every part."""
        for part in self.parts:
            part.step_begin(global_step)

    def training_step(self, context: StepContext) -> torch.Tensor:
        """Nest the parts: each sees the next one, and at last the trainer, as its ``stock``."""
        return self._nested(0, context)

    def _nested(self, position: int, context: StepContext) -> torch.Tensor:
        if position == len(self.parts):
            return context.stock(context.model, context.inputs, context.num_items)

        def inner(model: nn.Module, inputs: Any, num_items: Any, **changes: Any) -> torch.Tensor:
            below = dataclasses.replace(context, model=model, inputs=inputs, num_items=num_items, **changes)
            return self._nested(position + 1, below)

        return self.parts[position].training_step(dataclasses.replace(context, stock=inner))

    def schedule_every(self) -> int:
        """The slowest part's answer."""
        return max(part.schedule_every() for part in self.parts)

    def grad_norm(self) -> float | None:
        """The innermost answer that is not None."""
        return next((norm for part in reversed(self.parts) if (norm := part.grad_norm()) is not None), None)

    def train_end(self) -> None:
        """Forward to every part, innermost first."""
        for part in reversed(self.parts):
            part.train_end()

    def step_flops(self, facts: ModelFacts, shapes: Sequence[BatchShape], global_step: int) -> float:
        """FLOPs as the innermost part counts them: it decides what is differentiated."""
        return self.parts[-1].step_flops(facts, shapes, global_step)

    def state_dict(self) -> dict[str, Any]:
        """State of every part under its name."""
        return {name: part.state_dict() for name, part in zip(self.names, self.parts, strict=True)}

    def load_state_dict(self, state: Mapping[str, Any], global_step: int) -> None:
        """Restore every part.

        Raises:
            CheckpointError: The checkpoint was written by other memory methods.
        """
        if sorted(state) != sorted(self.names):
            raise CheckpointError(
                f"the checkpoint was written with memory={'+'.join(sorted(state))!r} and this run has "
                f"memory={'+'.join(self.names)!r}; use the same methods or start anew."
            )
        for name, part in zip(self.names, self.parts, strict=True):
            part.load_state_dict(state[name], global_step)

    def log_entries(self) -> Mapping[str, float]:
        """Entries of every part."""
        return {key: value for part in self.parts for key, value in part.log_entries().items()}
