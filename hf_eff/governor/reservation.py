"""reservation: stop when the next stretch is worth less than what the rest of the budget is kept for.

Idea
    Compute that is not spent here can be spent elsewhere, and its worth elsewhere lies between l and u per unit. The
    threshold rises from l / e to u as the budget is used up:

        tau(z) = (u e / l)^z * l / e,  z = spent / budget,  u = best gain per compute of the first 5 %,  l = epsilon u
        stop when  P(gain over h > tau(z) * h) < delta  over a confirmation span, and the last probes agree

    It is the threshold of the on-line knapsack problem: with small items no rule that does not know the future has a
    better worst case than its factor ln(u / l) + 1. Runs that share one budget each hold their own gain against it.

Cost      n probe examples of T tokens, B budget
    flops  one forward of n*T tokens a probe; all probes together at most probe_share * B
    bytes  none beyond a forward without gradients

Use when   several runs, or later ones, draw on the same budget.
Avoid when what is left over is lost: ``tail`` or ``budget`` spend it here.
Differs    The paper admits items of given value; here the values are forecasts and an item is a stretch of training.

Paper      Budget Constrained Bidding in Keyword Auctions and Online Knapsack Problems (2008)
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.spec import MethodSpec, Paper, Traits, knob
from hf_eff.engines.gain_rule import GainConfig, GainRule, probing_cost
from hf_eff.engines.gain_thresholds import ReservationThreshold


@dataclass(frozen=True, kw_only=True)
class ReservationConfig(GainConfig):
    """Options of ``governor="reservation"``."""

    epsilon: float = knob(
        0.02, "Least worth of compute elsewhere, a share of the best.", low=1e-6, high=1.0, paper="l/u"
    )
    delta: float = knob(0.3, "Stop when the chance of a gain above the threshold is lower.", low=0.0, high=1.0)
    horizon: float = knob(0.05, "Stretch of compute looked at.", low=1e-6, high=1.0, unit="share of budget")


class Reservation(GainRule):
    """Holds the gain of the next stretch against a threshold that grows with the share spent.

    Args:
        config: Options.
    """

    def __init__(self, config: ReservationConfig) -> None:
        super().__init__(config, ReservationThreshold(config.epsilon, config.horizon, config.delta))


def cost(config: ReservationConfig, facts: Facts) -> Cost:
    """FLOPs of all probes of a run that is never stopped."""
    return probing_cost(config, facts)


SPEC = MethodSpec(
    name="reservation",
    kind="governor",
    slot="policy",
    summary="stop when the next stretch is worth less than what the rest of the budget is kept for.",
    config=ReservationConfig,
    build=Reservation,
    cost=cost,
    paper=Paper(
        title="Budget Constrained Bidding in Keyword Auctions and Online Knapsack Problems",
        year=2008,
        url="https://doi.org/10.1007/978-3-540-92185-1_63",
    ),
    traits=Traits(needs_reference_set=True, fsdp2=True, streaming=True),
    tiny={"num_examples": 4},
)
