"""A ``torch.optim.Optimizer`` whose update is a few scalars: nothing per parameter is stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_eff.engines.directions import DirectionFamily
from hf_eff.engines.replay_log import LogHeader, ReplayLog, StepRecord, apply
from hf_eff.errors import EffError


class ZerothOrderOptimizer(torch.optim.Optimizer):
    """Moves parameters along directions that are drawn again, and writes each step to a replay log.

    Schedulers, weight decay and saving work through ``param_groups`` as for any optimizer; ``state`` stays empty.

    Args:
        groups: Parameters by name, one mapping a parameter group.
        weight_decay: Of each group.
        family: Makes the directions.
        lr: Learning rate.
        eps: Length of the perturbations, for the log.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, nn.Parameter]],
        weight_decay: Sequence[float],
        family: DirectionFamily,
        *,
        lr: float,
        eps: float,
    ) -> None:
        named = [
            {"params": list(group.items()), "weight_decay": decay}
            for group, decay in zip(groups, weight_decay, strict=True)
        ]
        super().__init__(named, {"lr": lr, "weight_decay": 0.0})
        self.family = family
        self.log = ReplayLog(LogHeader.of(family, eps, groups))
        self._staged: tuple[int, tuple[float, ...], bool] | None = None

    def stage(self, step: int, coefficients: Sequence[float], *, skip: bool = False) -> None:
        """Set what the next ``step`` applies.

        Args:
            step: Optimizer steps done before it.
            coefficients: Projected gradient c of each direction.
            skip: Record the step and move nothing.
        """
        self._staged = (step, tuple(coefficients), skip)

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
        if self._staged is None:
            raise EffError("the zeroth-order optimizer has no probe to apply; call training_step before step.")
        (step, coefficients, skip), self._staged = self._staged, None
        record = StepRecord(
            step,
            coefficients,
            lr=tuple(float(group["lr"]) for group in self.param_groups),
            weight_decay=tuple(float(group["weight_decay"]) for group in self.param_groups),
            skipped=skip,
        )
        groups = [dict(zip(group["param_names"], group["params"], strict=True)) for group in self.param_groups]
        apply(record, groups, self.family)
        self.log.append(record)
        return loss
