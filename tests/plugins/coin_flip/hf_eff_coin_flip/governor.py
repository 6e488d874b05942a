"""first_steps: stop after a number of steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_eff.contracts.cost import Cost
from hf_eff.contracts.governor import Decision, Governor, Telemetry
from hf_eff.contracts.spec import MethodConfig, MethodSpec, Traits, knob


@dataclass(frozen=True, kw_only=True)
class FirstStepsConfig(MethodConfig):
    """Options of ``governor="first_steps"``."""

    steps: int = knob(1, "Optimizer steps after which to stop.", low=1, unit="steps")


class FirstSteps(Governor):
    """Stops after ``steps``."""

    def __init__(self, config: FirstStepsConfig) -> None:
        self.config = config

    def observe(self, telemetry: Telemetry) -> Decision:
        """Count."""
        if telemetry.step >= self.config.steps:
            return Decision("stop", f"{self.config.steps} steps are done")
        return Decision("continue", "not yet")


def cost(config: Any, facts: Any) -> Cost:
    """Counting is free."""
    return Cost()


SPEC = MethodSpec(
    name="first_steps",
    kind="governor",
    slot="policy",
    summary="stop after a number of steps.",
    config=FirstStepsConfig,
    build=FirstSteps,
    cost=cost,
    traits=Traits(baseline=True),
    tiny={"steps": 1},
)
