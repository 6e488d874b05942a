"""One update from two estimates: a gradient inside the backward, and a random direction with a coefficient after it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_eff.contracts.memory import OptimizerContext
from hf_eff.engines.directions import DirectionFamily
from hf_eff.engines.ephemeral import unique_parameters
from hf_eff.engines.parameter_optimizer import ParameterOptimizer
from hf_eff.engines.zeroth_order import Term, update
from hf_eff.engines.zeroth_order_optimizer import SKIPS_IN_A_ROW
from hf_eff.errors import EffWarning, TrainingDivergedError


class TwoOrderOptimizer(ParameterOptimizer):
    """SGD on a weighted mean of two estimates: ``w <- w - lr ((1 - alpha) (g + decay w) + alpha (c z + decay w))``.

    ``update`` does the first part of one parameter, inside a backward; ``step`` the second part of all. Nothing is
    stored for a parameter: z is drawn again.

    Args:
        context: Model, candidates, decay and learning rate.
        address: What the user typed, for messages.
        family: Makes z.
        weight: Gives alpha, in [0, 1], for a number of trained parameters.

    Attributes:
        alpha: Weight of the second part.
        size: Trained parameters, each tensor counted once.
        skipped: Steps whose c was not finite, so that the second part moved nothing.
        skipped_in_a_row: How many of the last ones.
    """

    def __init__(
        self, context: OptimizerContext, address: str, family: DirectionFamily, weight: Callable[[int], float]
    ) -> None:
        super().__init__(context, address)
        self.family = family
        self.skipped = 0
        self.skipped_in_a_row = 0
        # Directions are named as zeroth-order methods name them, whatever the order of the modules.
        named = unique_parameters(context.model, context.candidates)
        self._direction_names = {id(parameter): name for name, parameter in named.items()}
        self.size = sum(parameter.numel() for parameter in named.values())
        self.alpha = weight(self.size)
        self._staged: tuple[int, float] | None = None
        self._decayed: set[str] = set()

    @torch.no_grad()
    def update(self, name: str, parameter: Tensor, group: Mapping[str, Any]) -> None:
        """See ``ParameterOptimizer``: the first part."""
        wide, gradient = self.wide(parameter), parameter.grad
        assert gradient is not None  # noqa: S101 - callers pass parameters with a gradient
        lr, share, decay = group["lr"], 1.0 - self.alpha, group["weight_decay"]
        if decay:
            # Of both parts, because the second one would see weights that have moved.
            wide.add_(gradient.to(wide.dtype).mul_(share).add_(wide, alpha=decay), alpha=-lr)
            self._decayed.add(name)
        else:
            wide.add_(gradient, alpha=-lr * share)
        self.write(name, parameter, wide)

    def stage(self, step: int, coefficient: float, clip: float | None = None) -> None:
        """Set the second part of the next ``step``. A coefficient that is not finite moves nothing.

        Args:
            step: Optimizer steps done before it.
            coefficient: c of the step's direction.
            clip: Bound on |c|.

        Raises:
            TrainingDivergedError: Ten steps in a row have a coefficient that is not finite.
        """
        if not math.isfinite(coefficient):
            self._report_skip(step)
            return
        self.skipped_in_a_row = 0
        bound = math.inf if clip is None else clip
        self._staged = (step, min(max(coefficient, -bound), bound))

    def _report_skip(self, step: int) -> None:
        self._staged = None
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= SKIPS_IN_A_ROW:
            raise TrainingDivergedError(
                f"the loss at the perturbed weights was not finite for {SKIPS_IN_A_ROW} steps in a row, last at step "
                f"{step}; lower learning_rate or eps and start from an earlier checkpoint."
            )
        message = f"step {step} has no zeroth-order part: the loss at the perturbed weights is not finite."
        warnings.warn(EffWarning(message), stacklevel=3)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do the second part of what was staged.

        Args:
            closure: Recomputes the loss and its gradients first.

        Returns:
            What the closure returned.
        """
        loss = super().step(closure)
        decayed, self._decayed = self._decayed, set()
        if self._staged is None:
            return loss
        (step, coefficient), self._staged = self._staged, None
        terms = [Term(step, 0, self.alpha * coefficient)]
        for group, named in self.grouped():
            for name, parameter in named:
                pair = (self._direction_names[id(parameter)], parameter)
                decay = 0.0 if name in decayed else self.alpha * group["weight_decay"]
                update([pair], self.family, terms, step=step, lr=group["lr"], weight_decay=decay)
        return loss
