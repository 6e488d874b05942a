"""fp32 master copies for 16-bit parameters, kept only for those that receive gradients.

In bf16 the spacing of numbers near 0.02 is 1.2e-4, so that updates below 6e-5 would vanish. Each step runs
the wrapped optimizer on fp32 copies of weight and gradient, then rounds the result back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from hf_eff.contracts.memory import OptimizerContext


class MasterWeightOptimizer(torch.optim.Optimizer):
    """Runs another optimizer on fp32 copies of the parameters that have a gradient.

    The groups hold the model's own parameters, so that schedulers, gradient clipping and loss scalers
    work as usual. A parameter's copy is made at its first step and lives under ``"master"`` in its
    state, beside the tensors of the wrapped optimizer; dropping the state drops the copy. Parameters
    of 32 bits or more are updated in place, without a copy.

    Args:
        groups: Parameter groups, as for any optimizer.
        optimizer_class: The optimizer to run.
        optimizer_kwargs: Its arguments (learning rate and so on).
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        optimizer_class: type[torch.optim.Optimizer],
        optimizer_kwargs: Mapping[str, Any],
    ) -> None:
        groups = [{**group, "params": list(group["params"])} for group in groups]
        device = next(parameter.device for group in groups for parameter in group["params"])
        self._inner = optimizer_class([torch.zeros(1, device=device)], **optimizer_kwargs)
        self._inner.param_groups.clear()
        super().__init__(groups, self._inner.defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: Recomputes the loss and its gradients first.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        lent = [
            [(parameter, self._lend(parameter)) for parameter in group["params"] if parameter.grad is not None]
            for group in self.param_groups
        ]
        self._inner.param_groups = [
            {**group, "params": [stand_in for _, stand_in in pairs]}
            for group, pairs in zip(self.param_groups, lent, strict=True)
        ]
        self._inner.step()
        for pairs in lent:
            for parameter, stand_in in pairs:
                self._take_back(parameter, stand_in)
        self._inner.param_groups = []
        return loss

    def _lend(self, parameter: torch.Tensor) -> torch.Tensor:
        """What the wrapped optimizer shall update: the fp32 copy with its gradient, or the parameter itself."""
        state = self.state.pop(parameter, {})
        stand_in = parameter
        if _is_16_bit(parameter):
            copy = state.pop("master", None)
            stand_in = parameter.detach().float() if copy is None else copy
            stand_in.grad = None if parameter.grad is None else parameter.grad.float()
        if state:
            self._inner.state[stand_in] = state
        return stand_in

    def _take_back(self, parameter: torch.Tensor, stand_in: torch.Tensor) -> None:
        state = self._inner.state.pop(stand_in, {})
        if stand_in is not parameter:
            parameter.copy_(stand_in)
            stand_in.grad = None
            state["master"] = stand_in
        if state:
            self.state[parameter] = state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore ``state_dict()``. Tensors keep their precision; torch's own would round them to 16 bits."""
        super().load_state_dict({**state_dict, "state": {}})
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        owners = [(parameter, group) for group in self.param_groups for parameter in group["params"]]
        for key, (parameter, group) in zip(keys, owners, strict=True):
            if key in state_dict["state"]:
                state = state_dict["state"][key]
                self.state[parameter] = {name: _placed(name, state[name], parameter, group) for name in state}


def make_optimizer(context: OptimizerContext) -> torch.optim.Optimizer:
    """The trainer's own optimizer over all candidates, around master copies when a candidate has 16 bits.

    Every candidate is made trainable first, so that it gets into a group and into DDP's buckets.
    """
    named = {name: each for name, each in context.model.named_parameters() if name in context.candidates}
    for parameter in named.values():
        parameter.requires_grad_(True)
    if not needs_master(named.values()):
        return context.stock()
    decayed = [parameter for name, parameter in named.items() if name in context.decay_names]
    others = [parameter for name, parameter in named.items() if name not in context.decay_names]
    groups = [{"params": decayed, "weight_decay": context.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return MasterWeightOptimizer(groups, context.optimizer_class, context.optimizer_kwargs)


def needs_master(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether any parameter has fewer than 32 bits."""
    return any(_is_16_bit(parameter) for parameter in parameters)


def _is_16_bit(parameter: torch.Tensor) -> bool:
    return parameter.dtype in (torch.float16, torch.bfloat16)


def _placed(name: str, value: Any, parameter: torch.Tensor, group: Mapping[str, Any]) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    # torch keeps step counters on the CPU unless the update is fused or captured in a graph.
    stays = name == "step" and not (group.get("fused") or group.get("capturable"))
    return value.clone() if stays else value.to(parameter.device, copy=True)
