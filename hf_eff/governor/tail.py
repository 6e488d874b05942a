"""tail: stop when all the compute that is left would add little to what the run has gained.

Idea
    The rest of the run must be worth having beside what it has brought so far:

        stop when  P(L(C) - L(B) > epsilon * (L(0) - L(C))) < delta  over a confirmation span
              and  the last probes agree

    with L the held-out loss, C the compute spent and B the budget. It needs no price and no scale, and asks for more
    gain per compute as the budget runs out. Probes, curve fits and confirmation are those of all gain policies.

Cost      n probe examples of T tokens, B budget
    flops  one forward of n*T tokens a probe; all probes together at most probe_share * B
    bytes  none beyond a forward without gradients

Use when   nobody can say what a nat is worth, and compute that is left over is worth something.
Avoid when a price is known (``marginal_gain`` with ``threshold="price"``), or the loss falls late.
Differs    The survey asks for a threshold that depends on the budget and gives no form; this is one.

Paper      Unifying Data, Memory, and Compute Efficiency in LLM training: A Survey (2026), arXiv:2606.10706
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.spec import MethodSpec, Paper, Traits, knob
from hf_eff.engines.gain_rule import GainConfig, GainRule, probing_cost
from hf_eff.engines.gain_thresholds import TailThreshold


@dataclass(frozen=True, kw_only=True)
class TailConfig(GainConfig):
    """Options of ``governor="tail"``."""

    epsilon: float = knob(0.02, "Least share of the gain so far that the rest must add.", low=0.0, high=1.0)
    delta: float = knob(0.3, "Stop when the chance of that much gain is lower.", low=0.0, high=1.0)


class Tail(GainRule):
    """Holds the gain of all that is left against the gain so far.

    Args:
        config: Options.
    """

    def __init__(self, config: TailConfig) -> None:
        super().__init__(config, TailThreshold(config.epsilon, config.delta))


def cost(config: TailConfig, facts: Facts) -> Cost:
    """FLOPs of all probes of a run that is never stopped."""
    return probing_cost(config, facts)


SPEC = MethodSpec(
    name="tail",
    kind="governor",
    slot="policy",
    summary="stop when all the compute that is left would add little to what the run has gained.",
    config=TailConfig,
    build=Tail,
    cost=cost,
    paper=Paper(
        title="Unifying Data, Memory, and Compute Efficiency in LLM training: A Survey", year=2026, arxiv="2606.10706"
    ),
    traits=Traits(needs_reference_set=True, fsdp2=True, streaming=True),
    tiny={"num_examples": 4},
)
