"""half: SGD with momentum on a random half of the tensors, drawn anew each step.

Idea
    At step t a generator made from (seed, t) draws the tensors that move; momentum is kept for all:

        m = momentum * m + g        w = w - lr * m   for the drawn tensors

Cost      P parameters
    state  4*P bytes of momentum

Use when  a test needs a small strategy with state, randomness and an optimizer of its own.
Avoid when anything real is at stake.
Differs   nothing to differ from: a toy.

Paper     none, a baseline for tests
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.memory import BatchShape, MemoryMethod, OptimizerContext
from hf_eff.contracts.spec import MethodConfig, MethodSpec, Traits, knob
from hf_eff.numerics.flops import training_flops


@dataclass(frozen=True, kw_only=True)
class HalfConfig(MethodConfig):
    """Options of ``memory="half"``."""

    momentum: float = knob(0.9, "Decay of the running gradient.", low=0.0, high=0.999)
    share: float = knob(0.5, "Share of tensors that move in a step.", low=0.0, high=1.0)


class HalfSGD(torch.optim.Optimizer):
    """SGD with momentum that moves a drawn subset of its tensors."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float, share: float, seed: int) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.share, self.seed, self.steps = share, seed, 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; ``closure`` is not used."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.steps)
        for group in self.param_groups:
            drawn = torch.rand(len(group["params"]), generator=generator) < self.share
            for parameter, moves in zip(group["params"], drawn.tolist(), strict=True):
                self._move(parameter, group["lr"] if moves else 0.0, group["momentum"])
        self.steps += 1

    def _move(self, parameter: torch.nn.Parameter, lr: float, momentum: float) -> None:
        if parameter.grad is None:
            return
        state = self.state[parameter]
        state["momentum"] = parameter.grad.clone() + momentum * state.get("momentum", 0.0)
        parameter.add_(state["momentum"], alpha=-lr)


class Half(MemoryMethod):
    """Plain backward; the optimizer moves half of the tensors."""

    def __init__(self, config: HalfConfig) -> None:
        self.config = config
        self.optimizer: HalfSGD | None = None
        self.saved_steps = 0

    def create_optimizer(self, context: OptimizerContext) -> torch.optim.Optimizer:
        """SGD over the candidates in the model's order."""
        parameters = [parameter for name, parameter in context.model.named_parameters() if name in context.candidates]
        lr = context.optimizer_kwargs.get("lr", 1e-3)
        self.optimizer = HalfSGD(parameters, lr, self.config.momentum, self.config.share, context.seed)
        self.optimizer.steps = self.saved_steps
        return self.optimizer

    def state_dict(self) -> dict[str, Any]:
        """Number of steps: with the seed it fixes what is drawn next."""
        return {"steps": self.optimizer.steps if self.optimizer else self.saved_steps}

    def load_state_dict(self, state: Mapping[str, Any], global_step: int) -> None:
        """Restore the step counter."""
        self.saved_steps = int(state["steps"])
        if self.optimizer:
            self.optimizer.steps = self.saved_steps


def cost(_config: HalfConfig, facts: Facts) -> Cost:
    """Full backward, one fp32 copy of momentum."""
    model, run = facts.model, facts.run
    trainable = model.trainable.params if model.trainable else model.params
    step = training_flops(model, BatchShape(run.batch_size, run.length or round(facts.pool.mean_tokens)))
    return Cost(
        step_flops=run.accumulation * step,
        bytes={
            "weights": model.weight_bytes or model.param_bytes * model.params,
            "gradients": model.param_bytes * trainable,
            "optimizer": 4.0 * trainable,
        },
    )


SPEC = MethodSpec(
    name="half",
    kind="memory",
    slot="update",
    summary="SGD with momentum on a random half of the tensors, drawn anew each step.",
    config=HalfConfig,
    build=Half,
    cost=cost,
    traits=Traits(baseline=True, deterministic=False, owns_optimizer=True),
)
