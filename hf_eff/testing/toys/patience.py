"""patience: stop after a number of probes that bring no gain.

Idea
    Probe every few steps; stop when the mean paired gain stayed at or below zero for ``patience`` probes in a row.

Cost      one forward over the probe set a probe
    flops  0 beyond the probes themselves

Use when  a test needs a small governor with state.
Avoid when anything real is at stake.
Differs   nothing to differ from: a toy.

Paper     none, a baseline for tests
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.governor import Decision, Governor, Telemetry
from hf_eff.contracts.spec import MethodConfig, MethodSpec, Traits, knob

PROBE_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class PatienceConfig(MethodConfig):
    """Options of ``governor="patience"``."""

    every: int = knob(5, "Steps between probes.", low=1, unit="steps")
    patience: int = knob(3, "Probes without gain before the run stops.", low=1, unit="probes")
    num_examples: int = knob(8, "Rows of the target that a probe looks at.", low=2, unit="rows")


class Patience(Governor):
    """Counts probes without gain."""

    def __init__(self, config: PatienceConfig) -> None:
        self.config = config
        self.without_gain = 0

    def next_probe(self, telemetry: Telemetry, probe_cost: float) -> bool:
        """Every few steps, as long as probes stay a small share of the compute."""
        affordable = telemetry.probe_spent + probe_cost <= PROBE_SHARE * telemetry.compute
        return telemetry.step % self.config.every == 0 and affordable

    def observe(self, telemetry: Telemetry) -> Decision:
        """Update the count at a probe and stop when it is full."""
        if telemetry.probe is not None and telemetry.probe.paired_delta is not None:
            self.without_gain = self.without_gain + 1 if telemetry.probe.paired_delta <= 0 else 0
        details = {"without_gain": self.without_gain}
        if self.without_gain >= self.config.patience:
            return Decision("stop", f"no gain at {self.without_gain} probes in a row", details)
        return Decision("continue", f"{self.without_gain} of {self.config.patience} probes without gain", details)

    def state_dict(self) -> dict[str, Any]:
        """The count."""
        return {"without_gain": self.without_gain}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the count."""
        self.without_gain = int(state["without_gain"])


def cost(_config: PatienceConfig, _facts: Facts) -> Cost:
    """The probes' share of one step's compute is not known before the run; nothing else is spent."""
    return Cost()


SPEC = MethodSpec(
    name="patience",
    kind="governor",
    slot="policy",
    summary="stop after a number of probes that bring no gain.",
    config=PatienceConfig,
    build=Patience,
    cost=cost,
    traits=Traits(baseline=True, needs_reference_set=True),
    tiny={"every": 2, "patience": 2},
)
