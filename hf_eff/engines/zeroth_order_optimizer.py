"""A ``torch.optim.Optimizer`` whose update is a few scalars: nothing per parameter is stored."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_eff.contracts.memory import OptimizerContext
from hf_eff.engines.directions import DirectionFamily
from hf_eff.engines.ephemeral import unique_parameters
from hf_eff.engines.replay_header import LogHeader
from hf_eff.engines.replay_log import ReplayLog, StepRecord
from hf_eff.engines.update_rules import UpdateRule
from hf_eff.errors import EffError, EffWarning, PlanError, TrainingDivergedError

SKIPS_IN_A_ROW = 10
"""Steps without a finite loss after which a run has diverged."""

_TYPES = (torch.float32, torch.bfloat16, torch.float64)


class ZerothOrderOptimizer(torch.optim.Optimizer):
    """Moves parameters along directions that are drawn again, and writes each step to a replay log.

    Schedulers, weight decay and saving work through ``param_groups`` as for any optimizer; ``state`` holds what the
    rule remembers, which for most is nothing.

    Args:
        groups: Parameters by name, one mapping a parameter group.
        weight_decay: Of each group.
        family: Makes the directions.
        lr: Learning rate.
        eps: Length of the perturbations, for the log.
        rule: How coefficients move the weights; None for their mean.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, nn.Parameter]],
        weight_decay: Sequence[float],
        family: DirectionFamily,
        *,
        lr: float,
        eps: float,
        rule: UpdateRule | None = None,
    ) -> None:
        named = [
            {"params": list(group.items()), "weight_decay": decay}
            for group, decay in zip(groups, weight_decay, strict=True)
        ]
        super().__init__(named, {"lr": lr, "weight_decay": 0.0})
        self.family = family
        self.rule = rule or UpdateRule()
        self.log = ReplayLog(LogHeader.of(family, eps, groups, self.rule.describe()))
        self._staged: tuple[int, tuple[float, ...]] | None = None

    @property
    def names(self) -> list[str]:
        """Names of the parameters, each tensor once."""
        return [name for group in self.param_groups for name in group["param_names"]]

    def stage(self, step: int, coefficients: Sequence[float], clip: float | None = None) -> None:
        """Set what the next ``step`` applies. Coefficients that are not finite make it move nothing.

        Args:
            step: Optimizer steps done before it.
            coefficients: Projected gradient c of each direction.
            clip: Bound on each |c|.

        Raises:
            TrainingDivergedError: Ten steps in a row have a coefficient that is not finite.
        """
        if not all(map(math.isfinite, coefficients)):
            self._report_skip(step)
            clip = None
        bound = math.inf if clip is None else clip
        self._staged = (step, tuple(c if math.isnan(c) else min(max(c, -bound), bound) for c in coefficients))

    def _report_skip(self, step: int) -> None:
        if self.log.trailing_skips() + 1 >= SKIPS_IN_A_ROW:
            raise TrainingDivergedError(
                f"the loss at the perturbed weights was not finite for {SKIPS_IN_A_ROW} steps in a row, last at step "
                f"{step}; lower learning_rate or eps and start from an earlier checkpoint."
            )
        message = f"step {step} moves nothing: the loss at the perturbed weights is not finite."
        warnings.warn(EffWarning(message), stacklevel=4)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Apply what was staged and record it.

        Args:
            closure: Called first, as torch's protocol has it.

        Returns:
            What the closure returned.

        Raises:
            EffError: Nothing is staged.
        """
        loss = None if closure is None else closure()
        if self._staged is None and not any(group["lr"] for group in self.param_groups):
            return loss  # whoever asks what state a step leaves takes one at rate zero
        if self._staged is None:
            raise EffError("the zeroth-order optimizer has no probe to apply; call training_step before step.")
        (step, coefficients), self._staged = self._staged, None
        record = StepRecord(
            step,
            coefficients,
            lr=tuple(float(group["lr"]) for group in self.param_groups),
            weight_decay=tuple(float(group["weight_decay"]) for group in self.param_groups),
        )
        groups = [dict(zip(group["param_names"], group["params"], strict=True)) for group in self.param_groups]
        self.log.append(record)
        self.rule.apply(record, groups, self.family, self.state)
        return loss

    def resume(self, log: ReplayLog) -> None:
        """Continue a run after the last step of its log."""
        self.log = log
        self.rule.restore(log.records)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load groups and state; torch would round what the rule remembers to the parameters' type.

        Args:
            state_dict: What ``state_dict`` returned.
        """
        super().load_state_dict({**state_dict, "state": {}})
        parameters = [each for group in self.param_groups for each in group["params"]]
        for index, held in state_dict["state"].items():
            device = parameters[index].device
            self.state[parameters[index]] = {
                key: value.to(device, copy=True) if isinstance(value, torch.Tensor) else value
                for key, value in held.items()
            }


def make_optimizer(
    context: OptimizerContext, family: DirectionFamily, eps: float, rule: UpdateRule | None = None
) -> ZerothOrderOptimizer:
    """Optimizer over the candidates in two groups, with and without weight decay.

    Args:
        context: Model, candidates, decay and learning rate.
        family: Makes the directions.
        eps: Length of the perturbations.
        rule: How coefficients move the weights; None for their mean.

    Raises:
        PlanError: Nothing is trainable, or a parameter's type cannot be trained this way.
    """
    parameters = unique_parameters(context.model, context.candidates)
    if not parameters:
        raise PlanError("there is no trainable parameter to perturb; unfreeze some, or add an adapter.")
    for name, parameter in parameters.items():
        if parameter.dtype not in _TYPES:
            raise PlanError(
                f"zeroth-order training needs float32 or bfloat16 weights, and {name!r} is {parameter.dtype}; load "
                "the model with another dtype, or freeze these and train an adapter."
            )
    decayed = unique_parameters(context.model, context.decay_names)
    groups = [
        ({name: p for name, p in parameters.items() if name in decayed}, context.weight_decay),
        ({name: p for name, p in parameters.items() if name not in decayed}, 0.0),
    ]
    groups = [(named, decay) for named, decay in groups if named]
    return ZerothOrderOptimizer(
        [named for named, _ in groups],
        [decay for _, decay in groups],
        family,
        lr=context.optimizer_kwargs["lr"],
        eps=eps,
        rule=rule,
    )
