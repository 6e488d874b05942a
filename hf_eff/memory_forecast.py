"""What memory methods would need and cost, and the largest batch and longest rows that fit. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_eff.contracts.cost import Facts
from hf_eff.numerics.largest_fit import MOST, largest
from hf_eff.options import EffOptions, resolve_options
from hf_eff.plan import make_plan
from hf_eff.plan_memory import memory_cost


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
        _, cost = memory_cost(plan.resolved, self.facts)
        return Forecast(plan.bytes, cost.host_bytes, cost.step_flops)

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
