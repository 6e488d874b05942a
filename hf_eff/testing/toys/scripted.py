"""scripted: decides what a script says at each probe; so that tests choose what a run has to carry out.

Idea
    Probe every ``every`` optimizer steps and count the probes from 1. The script names, by number, what to decide:

        "2 refresh, 5 widen, 8 switch_memory checkpointing off, 9 rises"

    ``rises`` is a stop for a rising loss.

Cost      n probe examples of T tokens
    flops  one forward of n*T tokens a probe

Use when   a test needs a decision at a certain moment.
Avoid when anything real is at stake.
Differs    nothing to differ from: a toy.

Paper      none, a baseline for tests
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.governor import Decision, Governor, Telemetry
from hf_eff.contracts.spec import MethodConfig, MethodSpec, Traits, knob


@dataclass(frozen=True, kw_only=True)
class ScriptedConfig(MethodConfig):
    """Options of ``governor="scripted"``."""

    script: str = knob("", "Number of a probe and what to decide there, several joined by commas.")
    every: int = knob(1, "Optimizer steps between probes.", low=1, unit="steps")
    num_examples: int = knob(4, "Held-out examples in a probe.", low=2, unit="examples")
    actions: str = knob("", "What the run may offer, joined by '+'.")
    window_steps: int = knob(0, "Optimizer steps of a window of rows; 0: a fortieth of the run.", low=0, unit="steps")
    cooldown: float = knob(0.0, "Compute of the cooldown, as a share of what was spent.", low=0.0)
    restore_best: bool = knob(False, "End with the weights of the best probe where the loss is surely above it.")
    drift_examples: int = knob(8, "Rows of the pool in a drift reading.", low=2, unit="examples")


class Scripted(Governor):
    """Counts its probes.

    Args:
        config: Options.
    """

    def __init__(self, config: ScriptedConfig) -> None:
        self.config = config
        lines = [line.split() for line in config.script.split(",") if line.strip()]
        self._script = {int(number): (action, " ".join(target)) for number, action, *target in lines}
        self._probes = 0

    def next_probe(self, telemetry: Telemetry, probe_cost: float) -> bool:
        """Every so many steps."""
        return telemetry.step % self.config.every == 0

    def observe(self, telemetry: Telemetry) -> Decision:
        """Read the script."""
        if telemetry.probe is None:
            return Decision("continue", "no probe at this step")
        self._probes += 1
        action, target = self._script.get(self._probes, ("continue", ""))
        if action == "rises":
            return Decision("stop", "the loss rises", {"probability_rising": 1.0})
        decided: Any = action
        return Decision(decided, f"probe {self._probes}", {"probe": self._probes}, target)

    def state_dict(self) -> dict[str, Any]:
        """The count."""
        return {"probes": self._probes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self._probes = int(state["probes"])


def cost(config: ScriptedConfig, facts: Facts) -> Cost:  # noqa: ARG001 - the contract's signature
    """Nobody plans with a toy."""
    return Cost()


SPEC = MethodSpec(
    name="scripted",
    kind="governor",
    slot="policy",
    summary="decides what a script says at each probe.",
    config=ScriptedConfig,
    build=Scripted,
    cost=cost,
    traits=Traits(needs_reference_set=True, fsdp2=True, streaming=True, baseline=True),
)
