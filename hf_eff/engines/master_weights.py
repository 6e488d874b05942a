"""fp32 copies for 16-bit parameters, kept only for those that receive gradients, or made anew at each step.

In bf16 the spacing of numbers near 0.02 is 1.2e-4, so that updates below 6e-5 would vanish. Each step runs
the wrapped optimizer on fp32 copies of weight and gradient, then rounds the result back: to the nearest
number where the copy is kept until the next step, else up or down at random, so that the mean is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from hf_eff.contracts.memory import OptimizerContext
from hf_eff.engines.state_store import placed
from hf_eff.engines.stochastic_rounding import round_stochastically_
from hf_eff.errors import PlanError
from hf_eff.numerics.keyed_random import make_key

_UPDATES = "updates"
"""Steps done so far, kept in every group: with the seed it fixes how a step rounds."""


class _Due(NamedTuple):
    """A parameter to update, with the number of its group and its position among all parameters."""

    group: int
    parameter: torch.Tensor
    position: int


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
        rounding_seed: Keep no copy between steps and round bf16 weights stochastically from this seed, keyed by
            the step and by the parameter's position; None for kept copies.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        optimizer_class: type[torch.optim.Optimizer],
        optimizer_kwargs: Mapping[str, Any],
        rounding_seed: int | None = None,
    ) -> None:
        groups = [{**group, "params": list(group["params"])} for group in groups]
        device = next(parameter.device for group in groups for parameter in group["params"])
        self._inner = optimizer_class([torch.zeros(1, device=device)], **optimizer_kwargs)
        self._inner.param_groups.clear()
        self._rounding_seed = rounding_seed
        super().__init__(groups, self._inner.defaults)
        if rounding_seed is not None:
            for group in self.param_groups:
                group[_UPDATES] = 0

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
        owners = [(number, each) for number, group in enumerate(self.param_groups) for each in group["params"]]
        due = [_Due(*owner, position) for position, owner in enumerate(owners) if owner[1].grad is not None]
        # Copies that do not stay exist for one parameter at a time.
        for part in [due] if self._rounding_seed is None else [[each] for each in due]:
            self._update(part)
        if self._rounding_seed is not None:
            for group in self.param_groups:
                group[_UPDATES] += 1
        return loss

    def _update(self, due: Sequence[_Due]) -> None:
        """Run the wrapped optimizer on some parameters."""
        lent = [(each, self._lend(each.parameter)) for each in due]
        self._inner.param_groups = [
            {**group, "params": [stand_in for each, stand_in in lent if each.group == number]}
            for number, group in enumerate(self.param_groups)
        ]
        self._inner.step()
        for each, stand_in in lent:
            self._take_back(each, stand_in)
        self._inner.param_groups = []

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

    def _take_back(self, due: _Due, stand_in: torch.Tensor) -> None:
        parameter = due.parameter
        state = self._inner.state.pop(stand_in, {})
        if stand_in is not parameter:
            stand_in.grad = None
            if self._rounding_seed is None:
                parameter.copy_(stand_in)
                state["master"] = stand_in
            else:
                key = make_key(self._rounding_seed, self.param_groups[due.group][_UPDATES], due.position)
                generator = torch.Generator(parameter.device).manual_seed(key)
                round_stochastically_(parameter.detach(), stand_in, generator)
        if state:
            self.state[parameter] = state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore ``state_dict()``. Tensors keep their precision; torch's own would round them to 16 bits."""
        super().load_state_dict({**state_dict, "state": {}})
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        owners = [(parameter, group) for group in self.param_groups for parameter in group["params"]]
        for key, (parameter, group) in zip(keys, owners, strict=True):
            if key in state_dict["state"]:
                self.state[parameter] = placed(state_dict["state"][key], parameter, group)


def make_optimizer(context: OptimizerContext, *, master_weights: bool = True) -> torch.optim.Optimizer:
    """The trainer's own optimizer over all candidates, around fp32 copies when a candidate has 16 bits.

    Every candidate is made trainable first, so that it gets into a group and into DDP's buckets.

    Args:
        context: What the optimizer is made from.
        master_weights: Keep the copies between steps; else bf16 weights are rounded stochastically.

    Raises:
        PlanError: A candidate is fp16 and no copy shall be kept.
    """
    named = {name: each for name, each in context.model.named_parameters() if name in context.candidates}
    for parameter in named.values():
        parameter.requires_grad_(True)
    if not needs_master(named.values()):
        return context.stock()
    if not master_weights and any(parameter.dtype == torch.float16 for parameter in named.values()):
        raise PlanError(
            "master_weights=False rounds stochastically, which is made for bf16 and not for fp16 weights; load the "
            "model in bf16 or leave master_weights at True."
        )
    decayed = [parameter for name, parameter in named.items() if name in context.decay_names]
    others = [parameter for name, parameter in named.items() if name not in context.decay_names]
    groups = [{"params": decayed, "weight_decay": context.weight_decay}, {"params": others, "weight_decay": 0.0}]
    seed = None if master_weights else context.seed
    return MasterWeightOptimizer(groups, context.optimizer_class, context.optimizer_kwargs, seed)


def needs_master(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether any parameter has fewer than 32 bits."""
    return any(_is_16_bit(parameter) for parameter in parameters)


def _is_16_bit(parameter: torch.Tensor) -> bool:
    return parameter.dtype in (torch.float16, torch.bfloat16)
