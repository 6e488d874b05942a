"""patience: stop after a number of probes in a row without a new best loss, as EarlyStoppingCallback does.

Idea
    The rule of ``transformers.EarlyStoppingCallback`` with ``greater_is_better=False``, applied to probes of a fixed
    held-out subset instead of evaluations:

        bad = 0        where  loss < best  and  |loss - best| > threshold   (and at the first probe)
        bad = bad + 1  elsewhere
        stop when bad >= patience;  best is the lowest loss so far, also where it is lower by less than the threshold

    Probes are spaced evenly in steps.

Cost      n probe examples of T tokens, B budget
    flops  one forward of n*T tokens a probe, ``probes`` of them; together at most probe_share * B
    bytes  none beyond a forward without gradients

Use when   the habitual rule is what a governor is compared with, at no cost beyond the probes.
Avoid when compute is worth something: it looks at losses only and chases their noise.
Differs    from the callback in what it reads: losses of the probe, not a metric of ``evaluate``. No weights are put
           back.

Paper      none, a baseline
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.governor import Decision, Governor, Telemetry
from hf_eff.contracts.spec import MethodConfig, MethodSpec, Traits, knob
from hf_eff.engines.probe_spacing import planned_flops, probe_flops, purse_allows


@dataclass(frozen=True, kw_only=True)
class PatienceConfig(MethodConfig):
    """Options of ``governor="patience"``."""

    patience: int = knob(3, "Probes in a row without a new best before the run stops.", low=1, unit="probes", paper="1")
    threshold: float = knob(0.0, "Least improvement that counts.", low=0.0, unit="nats", paper="0.0")
    probes: int = knob(40, "Probes in the planned run, spaced evenly.", low=1, unit="probes")
    num_examples: int = knob(
        128, "Held-out examples in a probe; fewer, to 16, where probes would be dear.", low=2, unit="examples"
    )
    probe_share: float = knob(0.15, "Cap on the probes' part of the compute spent.", low=0.0, high=1.0, unit="share")

    @property
    def fewest_probes(self) -> int:
        """Probes before which nothing is decided."""
        return self.patience + 1

    def probe_allowance(self, compute: float) -> float:
        """Cost of a probe at which the purse pays for all of them in a run of ``compute``."""
        return self.probe_share * compute / self.probes


class Patience(Governor):
    """Counts probes without a new best.

    Args:
        config: Options.
    """

    def __init__(self, config: PatienceConfig) -> None:
        self.config = config
        self._last_probe: float | None = None
        self._best: float | None = None
        self._best_step = 0
        self._bad = 0

    def next_probe(self, telemetry: Telemetry, probe_cost: float) -> bool:
        """Evenly spaced in planned steps, or in the budget where they are unknown, as far as the purse allows."""
        if not math.isfinite(telemetry.compute_limit) or not purse_allows(
            telemetry, probe_cost, self.config.probe_share
        ):
            return False
        return _progress(telemetry) >= (self._last_probe or 0.0) + (1.0 - 1e-9) / self.config.probes

    def observe(self, telemetry: Telemetry) -> Decision:
        """Compare a probe with the best one."""
        if telemetry.probe is None:
            return Decision("continue", "no probe at this step")
        self._last_probe = _progress(telemetry)
        loss = telemetry.probe.mean
        improves = self._best is None or (loss < self._best and abs(loss - self._best) > self.config.threshold)
        self._bad = 0 if improves else self._bad + 1
        # As in transformers: a loss that is not a number is never the best one.
        before = math.inf if self._best is None else self._best
        if loss < before:
            self._best_step = telemetry.step
        self._best = min(before, loss)
        details = {"bad_probes": self._bad, "best": self._finite_best(), "best_step": self._best_step}
        if self._bad >= self.config.patience:
            return Decision("stop", f"no new best at {self._bad} probes in a row", details)
        return Decision("continue", f"{self._bad} of {self.config.patience} probes without a new best", details)

    def state_dict(self) -> dict[str, Any]:
        """Best loss so far and the count."""
        return {
            "last_probe": self._last_probe,
            "best": self._finite_best(),
            "seen": self._best is not None,
            "best_step": self._best_step,
            "bad": self._bad,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self._last_probe, self._best_step, self._bad = state["last_probe"], int(state["best_step"]), int(state["bad"])
        self._best = math.inf if state["seen"] and state["best"] is None else state["best"]

    def _finite_best(self) -> float | None:
        return None if self._best is None or math.isinf(self._best) else self._best


def _progress(telemetry: Telemetry) -> float:
    if telemetry.max_steps > 0:
        return telemetry.step / telemetry.max_steps
    return telemetry.compute / telemetry.compute_limit


def cost(config: PatienceConfig, facts: Facts) -> Cost:
    """FLOPs of all probes of a run that is never stopped."""
    _, limit = planned_flops(facts)
    probe = probe_flops(facts, config.num_examples, config.probe_allowance(limit))
    return Cost(flops=min(config.probes * probe, config.probe_share * limit))


SPEC = MethodSpec(
    name="patience",
    kind="governor",
    slot="policy",
    summary="stop after a number of probes in a row without a new best loss, as EarlyStoppingCallback does.",
    config=PatienceConfig,
    build=Patience,
    cost=cost,
    traits=Traits(baseline=True, needs_reference_set=True, fsdp2=True, streaming=True),
    tiny={"num_examples": 4},
)
