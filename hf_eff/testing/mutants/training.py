"""Memory methods that are broken in one way each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_eff.contracts.memory import MemoryMethod, OptimizerContext, StepContext
from hf_eff.contracts.spec import MethodSpec
from hf_eff.testing.toys.half import SPEC, Half, HalfSGD


def _traits(**changes: Any) -> MethodSpec:
    return replace(SPEC, traits=replace(SPEC.traits, **changes))


def _built(build: Callable[[Any], MemoryMethod], **changes: Any) -> MethodSpec:
    return replace(SPEC, build=build, **changes)


class _LeavesHook(Half):
    def train_begin(self, model: nn.Module, global_step: int) -> None:
        model.register_forward_hook(lambda *_: None)


class _LeavesFrozen(Half):
    def train_begin(self, model: nn.Module, global_step: int) -> None:
        self.model = model

    def train_end(self) -> None:
        next(self.model.parameters()).requires_grad_(False)


class _ForgetsSteps(Half):
    def state_dict(self) -> dict[str, Any]:
        return {"steps": 0}


class _NeverMoves(Half):
    def create_optimizer(self, context: OptimizerContext) -> torch.optim.Optimizer:
        return super().create_optimizer(replace(context, optimizer_kwargs={"lr": 0.0}))


class _PickledState(Half):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "device": torch.device("cpu")}


class _OwnMean(Half):
    """Divides by the micro-batch's own tokens: wrong when they differ, NaN when there are none."""

    def training_step(self, context: StepContext) -> torch.Tensor:
        own = (context.inputs["labels"][:, 1:] != -100).sum()
        return context.stock(context.model, context.inputs, own * context.micro_steps)


class _Shifts(Half):
    def prepare_model(self, model: nn.Module, seed: int) -> nn.Module:
        with torch.no_grad():
            next(model.parameters()).add_(1e-3)
        return model


class _Thaws(Half):
    def create_optimizer(self, context: OptimizerContext) -> torch.optim.Optimizer:
        context.model.requires_grad_(True)
        everything = frozenset(name for name, _ in context.model.named_parameters())
        return super().create_optimizer(replace(context, candidates=everything))


class _HoldsFrozen(Half):
    def create_optimizer(self, context: OptimizerContext) -> torch.optim.Optimizer:
        everything = frozenset(name for name, _ in context.model.named_parameters())
        return super().create_optimizer(replace(context, candidates=everything))


class _Ascends(Half):
    def create_optimizer(self, context: OptimizerContext) -> torch.optim.Optimizer:
        lr = -float(context.optimizer_kwargs["lr"])
        return super().create_optimizer(replace(context, optimizer_kwargs={"lr": lr}))


class _HidesLoss(Half):
    def training_step(self, context: StepContext) -> torch.Tensor:
        return 0.0 * super().training_step(context)


class _Decays(Half):
    def step_begin(self, global_step: int) -> None:
        for group in self.optimizer.param_groups if self.optimizer else []:
            with torch.no_grad():
                group["params"][0].mul_(0.999)


class _FixedRateSGD(HalfSGD):
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["lr"] = self.defaults["lr"]
        super().step(closure)


class _FixedRate(Half):
    def create_optimizer(self, context: OptimizerContext) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(context)
        optimizer.__class__ = _FixedRateSGD
        return optimizer


class _StatelessSGD(MemoryMethod):
    def __init__(self, config: Any) -> None:
        self.config = config

    def create_optimizer(self, context: OptimizerContext) -> torch.optim.Optimizer:
        parameters = [parameter for name, parameter in context.model.named_parameters() if name in context.candidates]
        return torch.optim.SGD(parameters, lr=float(context.optimizer_kwargs["lr"]))


class _Hoards(Half):
    def step_begin(self, global_step: int) -> None:
        if self.optimizer:
            for parameter in self.optimizer.param_groups[0]["params"]:
                self.optimizer.state[parameter]["hoard"] = torch.zeros(4, *parameter.shape)


class _LogsNaN(Half):
    def log_entries(self) -> Mapping[str, float]:
        return {"share": float("nan")}


class _Reseeds(Half):
    def step_begin(self, global_step: int) -> None:
        torch.rand(1)


class _CountsInMemory(Half):
    """Draws by a counter that starts anew in every process."""

    steps = 0

    def step_begin(self, global_step: int) -> None:
        if self.optimizer:
            self.optimizer.steps = self.steps
        self.steps += 1


RESUME = (_built(_ForgetsSteps), _built(_CountsInMemory))
MUTANTS: Mapping[str, tuple[MethodSpec, ...]] = {
    "check_undone_at_end": (_built(_LeavesHook), _built(_LeavesFrozen)),
    "check_resume_steps": (_built(_ForgetsSteps), _built(_NeverMoves)),
    "check_state_is_json": (_built(_PickledState),),
    "check_one_token_batch": (_built(_OwnMean),),
    "check_exact_start": (_built(_Shifts),),
    "check_trains_only_candidates": (_built(_Thaws), _built(_NeverMoves)),
    "check_no_unused_state": (_built(_HoldsFrozen),),
    "check_learns": (_built(_Ascends), _built(_NeverMoves)),
    "check_reports_loss": (_built(_HidesLoss),),
    "check_zero_rate": (_built(_Decays),),
    "check_follows_schedule": (_built(_FixedRate),),
    "check_accumulation": (_built(_OwnMean),),
    "check_no_backward": (_traits(needs_backward=False),),
    "check_stateless": (_traits(stateless_optimizer=True), _built(_StatelessSGD)),
    "check_owns_optimizer": (_traits(owns_optimizer=False), _built(lambda _config: MemoryMethod())),
    "check_saves_memory": (_built(_Hoards),),
    "check_log_entries": (_built(_LogsNaN),),
}
