"""budget: train until a limit would be passed, and not one step further.

Idea
    The trainer knows what the next optimizer step costs before it starts it, and does not start it when a limit
    would be passed:

        stop when  spent[k] + need[k] > limit[k]  for some limited currency k

    That gate holds for every run with a budget, under every governor. This governor adds no rule of its own, so all
    of the budget is used.

Cost       none

Use when   the budget is paid for anyway and only must not be passed.
Avoid when compute saved is worth something: ``marginal_gain`` stops earlier once the loss no longer repays it.
Differs    from nothing: it is a baseline. FLOPs, tokens and steps are known beforehand and never passed. Seconds, kWh
           and money are not: a step is started only while the 0.99 quantile of past step durations is left, so such
           a limit may be passed by part of one step.

Paper      none, a baseline
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.governor import Governor
from hf_eff.contracts.spec import MethodConfig, MethodSpec, Traits


@dataclass(frozen=True, kw_only=True)
class BudgetConfig(MethodConfig):
    """Options of ``governor="budget"``: none; the limits are the run's ``budget``."""


class Budget(Governor):
    """Never probes and never stops early; the trainer's gate keeps the limits.

    Args:
        config: Options.
    """

    def __init__(self, config: BudgetConfig) -> None:
        self.config = config


def cost(config: BudgetConfig, facts: Facts) -> Cost:  # noqa: ARG001 - the contract's signature
    """Nothing is computed beyond the training itself."""
    return Cost()


SPEC = MethodSpec(
    name="budget",
    kind="governor",
    slot="policy",
    summary="train until a limit would be passed, and not one step further.",
    config=BudgetConfig,
    build=Budget,
    cost=cost,
    traits=Traits(baseline=True, fsdp2=True, streaming=True),
)
