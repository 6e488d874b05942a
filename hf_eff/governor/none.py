"""none: no governor; the run does the steps that were asked for.

Idea
    The baseline. It takes no probe, has no rule and writes no log, so the run is the parent trainer's.

Cost       none

Use when   the number of steps is already decided, or to measure what a governor saves.
Avoid when there is a limit to keep: name a budget, and ``budget`` takes over.
Differs    from nothing: it is plain fine-tuning.

Paper      none, a baseline
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.governor import Governor
from hf_eff.contracts.spec import MethodConfig, MethodSpec, Traits

# "None" is a keyword, and a class must spell its method's name.


@dataclass(frozen=True, kw_only=True)
class NONEConfig(MethodConfig):
    """Options of ``governor="none"``: none."""


class NONE(Governor):
    """Always continues and never probes.

    Args:
        config: Options.
    """

    def __init__(self, config: NONEConfig) -> None:
        self.config = config


def cost(config: NONEConfig, facts: Facts) -> Cost:  # noqa: ARG001 - the contract's signature
    """Nothing is computed."""
    return Cost()


SPEC = MethodSpec(
    name="none",
    kind="governor",
    slot="policy",
    summary="no governor; the run does the steps that were asked for.",
    config=NONEConfig,
    build=NONE,
    cost=cost,
    traits=Traits(baseline=True, fsdp2=True, streaming=True),
)
