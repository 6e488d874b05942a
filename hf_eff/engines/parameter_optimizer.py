"""An optimizer that can update one parameter alone, so that a gradient need not wait for the others."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_eff.contracts.memory import OptimizerContext
from hf_eff.engines.state_store import placed
from hf_eff.engines.stochastic_rounding import round_stochastically_
from hf_eff.errors import PlanError
from hf_eff.numerics.keyed_random import make_key

_TYPES = (torch.float32, torch.bfloat16, torch.float64)
_ROUNDING = 1


class ParameterOptimizer(torch.optim.Optimizer):
    """Optimizer over the candidates in transformers' two groups, whose update takes one parameter at a time.

    ``param_groups`` hold what AdamW's do, so that schedules and weight decay work as usual and are read at the time of
    each update. State is kept in fp32 (a step counter may be an integer), and loading a checkpoint does not round it.

    Args:
        context: Model, candidates, AdamW's arguments and the seed.
        address: What the user typed, for messages.
        stochastic_rounding: Compute updates of bf16 weights in fp32 and round them stochastically; otherwise in bf16.

    Attributes:
        names: Names of the parameters, in the model's order.
        clock: Optimizer steps done, which name the random bits of the next update; set before each step.

    Raises:
        PlanError: Nothing is trainable, a parameter's type cannot be trained this way, or another optimizer was asked
            for.
    """

    def __init__(self, context: OptimizerContext, address: str, *, stochastic_rounding: bool = True) -> None:
        named = {name: each for name, each in context.model.named_parameters() if name in context.candidates}
        _require_trainable(named, context, address)
        device = next(iter(named.values())).device
        self._stock = context.optimizer_class([torch.zeros(1, device=device)], **context.optimizer_kwargs)
        self._stock.param_groups.clear()
        decayed = [pair for pair in named.items() if pair[0] in context.decay_names]
        others = [pair for pair in named.items() if pair[0] not in context.decay_names]
        groups = [
            {"params": pairs, "weight_decay": decay}
            for pairs, decay in ((decayed, context.weight_decay), (others, 0.0))
            if pairs
        ]
        super().__init__(groups, self._stock.defaults)
        self.names = list(named)
        self.seed = context.seed
        self.clock = 0
        self._rounds = stochastic_rounding

    @abstractmethod
    def update(self, name: str, parameter: Tensor, group: Mapping[str, Any]) -> None:
        """Move one parameter by its gradient, at the rate and decay that its group has now."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that still has a gradient.

        Args:
            closure: Recomputes the loss and its gradients first.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, named in self.grouped():
            self.update_group(group, [(name, each) for name, each in named if each.grad is not None])
        return loss

    def update_group(self, group: Mapping[str, Any], named: Sequence[tuple[str, Tensor]]) -> None:
        """Update several parameters of one group."""
        for name, parameter in named:
            self.update(name, parameter, group)

    def grouped(self) -> Iterator[tuple[dict[str, Any], list[tuple[str, Tensor]]]]:
        """Each group with its parameters by name.

        Yields:
            The group, and pairs of name and parameter.
        """
        for group in self.param_groups:
            yield group, list(zip(group["param_names"], group["params"], strict=True))

    def wide(self, parameter: Tensor) -> Tensor:
        """What an update is added to: an fp32 copy of a bf16 parameter, the parameter itself otherwise."""
        return parameter.detach().float() if self._rounds and parameter.dtype == torch.bfloat16 else parameter.detach()

    def write(self, name: str, parameter: Tensor, wide: Tensor) -> None:
        """Round the updated copy back into its parameter; nothing to do where no copy was made."""
        if wide.dtype != parameter.dtype:
            round_stochastically_(
                parameter.detach(), wide, self.generator(parameter.device, name, self.clock, _ROUNDING)
            )

    def generator(self, device: torch.device, name: str, *parts: int) -> torch.Generator:
        """Source of random numbers named by the seed, a parameter and a few integers."""
        digest = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
        return torch.Generator(device).manual_seed(make_key(digest, self.seed, *parts))

    def adamw(self, group: Mapping[str, Any], named: Sequence[tuple[str, Tensor]]) -> None:
        """Stock AdamW on some parameters of a group: 32-bit ones together, 16-bit ones by way of an fp32 copy."""
        plain = [parameter for _, parameter in named if self._stays(parameter)]
        if plain:
            self._lend(group, {parameter: self.state[parameter] for parameter in plain})
        for name, parameter in named:
            if self._stays(parameter) or parameter.grad is None:
                continue
            wide = self.wide(parameter)
            wide.grad = parameter.grad.float()
            self._lend(group, {wide: self.state[parameter]})
            self.write(name, parameter, wide)

    def _stays(self, parameter: Tensor) -> bool:
        return not (self._rounds and parameter.dtype == torch.bfloat16)

    def _lend(self, group: Mapping[str, Any], states: Mapping[Tensor, dict[str, Any]]) -> None:
        """Let the stock optimizer fill and use state that is kept here."""
        self._stock.param_groups = [{**group, "params": list(states)}]
        self._stock.state = defaultdict(dict, states)
        self._stock.step()
        self._stock.param_groups, self._stock.state = [], defaultdict(dict)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore ``state_dict()``. Tensors keep their precision; torch's own would round them to the weights'."""
        super().load_state_dict({**state_dict, "state": {}})
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        owners = [(parameter, group) for group in self.param_groups for parameter in group["params"]]
        for key, (parameter, group) in zip(keys, owners, strict=True):
            state = state_dict["state"].get(key)
            if state is not None:
                self.state[parameter] = placed(state, parameter, group)


def _require_trainable(named: Mapping[str, Tensor], context: OptimizerContext, address: str) -> None:
    if not named:
        raise PlanError(f"{address} finds no trainable parameter; unfreeze some, or add an adapter.")
    for name, parameter in named.items():
        if parameter.dtype not in _TYPES:
            raise PlanError(
                f"{address} needs float32 or bfloat16 weights, and {name!r} is {parameter.dtype}; load the model with "
                "another dtype."
            )
    chosen: Any = context.optimizer_class
    if not (isinstance(chosen, type) and issubclass(chosen, torch.optim.AdamW)):
        raise PlanError(
            f"{address} makes its own update, so {getattr(chosen, '__name__', chosen)} would be ignored; leave the "
            "optimizer at its default or use memory='full'."
        )
