"""Updates that need no gradient but one parameter's own: SGD, sign SGD and AdamW, a parameter at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from hf_eff.contracts.memory import OptimizerContext
from hf_eff.engines.parameter_optimizer import ParameterOptimizer

Rule = Literal["sgd", "signsgd", "adamw"]


class FusedOptimizer(ParameterOptimizer):
    """SGD (no momentum), sign SGD or AdamW; the first two keep no state.

    Args:
        context: See ``ParameterOptimizer``.
        rule: Which update.
        decoupled_decay: SGD: shrink the weights by lr x decay, instead of adding decay x weight to the gradient as
            ``torch.optim.SGD`` does. The other rules always decouple.
        stochastic_rounding: See ``ParameterOptimizer``.
    """

    def __init__(
        self,
        context: OptimizerContext,
        rule: Rule = "sgd",
        *,
        decoupled_decay: bool = False,
        stochastic_rounding: bool = True,
    ) -> None:
        super().__init__(context, "memory='fused'", stochastic_rounding=stochastic_rounding)
        self.rule = rule
        self.decoupled_decay = decoupled_decay

    @torch.no_grad()
    def update(self, name: str, parameter: Tensor, group: Mapping[str, Any]) -> None:
        """See ``ParameterOptimizer``."""
        if self.rule == "adamw":
            self.adamw(group, [(name, parameter)])
            return
        wide, gradient = self.wide(parameter), parameter.grad
        assert gradient is not None  # noqa: S101 - callers pass parameters with a gradient
        lr, decay = group["lr"], group["weight_decay"]
        if decay and (self.decoupled_decay or self.rule == "signsgd"):
            wide.mul_(1.0 - lr * decay)
        elif decay:
            gradient = gradient.to(wide.dtype).add_(wide, alpha=decay)  # nobody reads it again
        wide.add_(gradient.sign_() if self.rule == "signsgd" else gradient, alpha=-lr)
        self.write(name, parameter, wide)
