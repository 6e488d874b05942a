"""What memory methods would need and cost, and the largest batch and longest rows that fit. Pure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_eff.contracts.cost import Cost, Facts, TrainableFacts
from hf_eff.numerics.flops import backward_flops, everything_trains, forward_flops, recompute_flops
from hf_eff.numerics.planned_step import planned_shape
from hf_eff.options import EffOptions, resolve_options
from hf_eff.plan import make_plan
from hf_eff.plan_memory import memory_cost

MOST = 1 << 24
"""Where the search for the largest batch or the longest row ends."""


@dataclass(frozen=True)
class Forecast:
    """Predicted cost of one optimizer step.

    Attributes:
        bytes: Peak bytes per memory term.
        host_bytes: Bytes that wait in host memory instead.
        step_flops: FLOPs of an optimizer step in one process, recomputation included.
    """

    bytes: Mapping[str, float]
    host_bytes: float
    step_flops: float

    @property
    def total(self) -> float:
        """Peak bytes of the device."""
        return float(sum(self.bytes.values()))

    @property
    def binding(self) -> str:
        """The largest term."""
        return max(self.bytes, key=lambda term: self.bytes[term])


@dataclass(frozen=True)
class Setup:
    """Memory methods with their options, and the facts they would run on.

    Attributes:
        memory: Names joined by ``+``.
        kwargs: Options by method name.
        facts: Model, run and hardware.
    """

    memory: str
    kwargs: Mapping[str, Mapping[str, Any]]
    facts: Facts

    @property
    def options(self) -> EffOptions:
        """The same as a user would set them. Nothing is tried beyond them when memory runs out."""
        return EffOptions(memory=self.memory, memory_kwargs=dict(self.kwargs), out_of_memory="raise")

    def forecast(self) -> Forecast:
        """Predict the setup.

        Raises:
            PlanError: It cannot work.
            OptionError: An option is wrong.
        """
        plan = make_plan(self.options, self.facts)
        adapted, cost = memory_cost(plan.resolved, self.facts)
        differentiates = all(chosen.spec.traits.needs_backward for chosen in plan.resolved.memory)
        again = _recomputed(adapted, cost) if differentiates and adapted.run.checkpointing else 0.0
        return Forecast(plan.bytes, cost.host_bytes, cost.step_flops + again)

    def resized(self, **changes: Any) -> Setup:
        """The same methods on micro-batches of another ``batch_size`` or rows of another ``length``."""
        facts = self.facts.replace(run=dataclasses.replace(self.facts.run, **changes))
        if "length" in changes:
            length = changes["length"]
            facts = facts.replace(pool=dataclasses.replace(facts.pool, mean_tokens=length, max_tokens=length))
        return dataclasses.replace(self, facts=facts)

    def most(self, size: str, budget: float, limit: int = MOST) -> int:
        """Largest ``batch_size`` or ``length`` whose forecast is within a budget, the other one as it is.

        Args:
            size: ``"batch_size"`` or ``"length"``.
            budget: Bytes.
            limit: Largest answer.

        Returns:
            A number n that fits while n + 1 does not or is above the limit; 0 where not even 1 fits.

        Raises:
            PlanError: The setup cannot work.
        """
        resolved = resolve_options(self.options)

        def needed(amount: int) -> float:
            return memory_cost(resolved, self.resized(**{size: amount}).facts)[1].peak_bytes

        return largest(needed, budget, limit)


def largest(needed: Callable[[int], float], budget: float, limit: int = MOST) -> int:
    """Largest number in [1, limit] whose need is within a budget; 0 for none.

    Bisection that first looks where a straight line through the ends of the interval passes the budget: needs that grow
    evenly take a handful of looks.

    Args:
        needed: Bytes that a number needs; never falls.
        budget: Bytes.
        limit: Largest answer.

    >>> largest(lambda number: number**2, 50, 100)
    7
    """
    low, high = 1, max(1, limit)
    need_low, need_high = needed(low), needed(high)
    if need_high <= budget or need_low > budget:
        return high if need_high <= budget else 0
    straight = True
    while high - low > 1:
        share = (budget - need_low) / (need_high - need_low) if straight else 0.0
        middle = low + int(share * (high - low)) if straight else math.isqrt(low * high)
        middle, width = min(max(middle, low + 1), high - 1), high - low
        need = needed(middle)
        if need <= budget:
            low, need_low = middle, need
        else:
            high, need_high = middle, need
        # A line that hardly narrows the interval is left for one step of bisection (of the number's logarithm).
        straight = not straight or high - low < width / 2
    return low


def _recomputed(facts: Facts, cost: Cost) -> float:
    """FLOPs of running layers forward again, where a gradient passes them.

    A method whose gradient goes down to another layer at each step says only what a step costs on average. What that
    leaves after the forward, the head and the weights' own gradients is the part of the layers that is passed.
    """
    model, shape, run = facts.model, planned_shape(facts), facts.run
    part = model.trainable or everything_trains(model)
    nothing = TrainableFacts(params=1, lowest_block=len(model.blocks), block_matmul_params=(0,) * len(model.blocks))
    head = backward_flops(model, shape, nothing)
    inputs = backward_flops(model, shape, dataclasses.replace(nothing, lowest_block=part.lowest_block)) - head
    weights = backward_flops(model, shape, part) - head - inputs
    held = cost.bytes.get("gradients", 0.0) / max(1.0, part.params * model.param_bytes)
    rest = cost.step_flops / run.accumulation - forward_flops(model, shape) - head - min(1.0, held) * weights
    passed = min(1.0, max(0.0, rest / inputs)) if inputs > 0 else 0.0
    return passed * run.accumulation * recompute_flops(model, shape, part) / run.checkpoint_every
