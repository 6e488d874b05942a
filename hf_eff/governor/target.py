"""target: stop when a held-out loss is reached, or when the rest of the budget will not reach it.

Idea
    A probe that reads the target ends the run. Before that, curves fitted to the probes give the chance that the rest
    of the budget gets there, and a run without hope is given up:

        stop when  L <= target
        stop when  P(L(C) - L(B) > L(C) - target) < futility  over a confirmation span, and the last probes agree

    with L the held-out loss, C the compute spent and B the budget. Without a target it only keeps the budget.

Cost      n probe examples of T tokens, B budget
    flops  one forward of n*T tokens a probe; all probes together at most probe_share * B
    bytes  none beyond a forward without gradients

Use when   a loss that is good enough is known, from an earlier run or a requirement.
Avoid when any further gain is welcome: ``tail`` and ``marginal_gain`` weigh it.
Differs    The survey lists stopping among a governor's actions and has no target; giving up is ours.

Paper      Unifying Data, Memory, and Compute Efficiency in LLM training: A Survey (2026), arXiv:2606.10706
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.governor import Decision, Telemetry
from hf_eff.contracts.spec import MethodSpec, Paper, Traits, knob
from hf_eff.engines.gain_rule import GainConfig, GainRule, probing_cost
from hf_eff.engines.gain_thresholds import TargetThreshold

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TargetConfig(GainConfig):
    """Options of ``governor="target"``."""

    target: float | None = knob(
        None,
        "Held-out loss at which the run is done; lower is better, so the negative of an accuracy. None: never done.",
        low=-1e30,
    )
    futility: float = knob(0.05, "Give up when the chance to reach the target is lower.", low=0.0, high=1.0)


class Target(GainRule):
    """Holds the gain of all that is left against the distance to the target.

    Args:
        config: Options.
    """

    def __init__(self, config: TargetConfig) -> None:
        super().__init__(config, TargetThreshold(config.target or 0.0, config.futility))
        self._has_target = config.target is not None
        if not self._has_target:
            logger.warning("governor='target' was given no target; it only keeps the budget.")

    def next_probe(self, telemetry: Telemetry, probe_cost: float) -> bool:
        """As all gain policies, where there is a target."""
        return self._has_target and super().next_probe(telemetry, probe_cost)

    def observe(self, telemetry: Telemetry) -> Decision:
        """As all gain policies, where there is a target."""
        return super().observe(telemetry) if self._has_target else Decision("continue", "no target is given")


def cost(config: TargetConfig, facts: Facts) -> Cost:
    """FLOPs of all probes of a run that is never stopped."""
    return Cost() if config.target is None else probing_cost(config, facts)


SPEC = MethodSpec(
    name="target",
    kind="governor",
    slot="policy",
    summary="stop when a held-out loss is reached, or when the rest of the budget will not reach it.",
    config=TargetConfig,
    build=Target,
    cost=cost,
    paper=Paper(
        title="Unifying Data, Memory, and Compute Efficiency in LLM training: A Survey", year=2026, arxiv="2606.10706"
    ),
    traits=Traits(needs_reference_set=True, fsdp2=True, streaming=True),
    tiny={"num_examples": 4, "target": 2.0},
    known_failures=(
        ("check_unlimited", "a target that the planned steps cannot reach is given up while the loss falls"),
    ),
)
