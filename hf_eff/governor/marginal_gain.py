"""marginal_gain: stop when the loss that further compute is expected to buy is no longer worth it.

Idea
    Every so often the run is probed: losses of a fixed held-out subset, paired example by example with the previous
    probe. A grid of learning curves (powers, exponentials, a line) is fitted to the probes and averaged by evidence.
    The mixture gives the probability that the next stretch of compute h lowers the loss by more than the threshold:

        stop when  P(gain over h > tau * h) < delta  over a confirmation span
              and  Theil-Sen gain of the last probes < tau

    ``threshold="tail"`` looks at all compute that remains: tau * h = epsilon * (gain realised so far).
    ``threshold="price"`` takes tau from a price in loss per unit of compute. A loss that almost surely rises stops
    the run at once. Probes are spaced geometrically in compute and paid from a purse.

Cost      n probe examples of T tokens, B budget
    flops  one forward of n*T tokens a probe; all probes together at most 1.2 * probe_share * B
    bytes  none beyond a forward without gradients

Use when   a held-out set of the target exists and the budget pays for two dozen probes or more.
Avoid when the loss is known to fall late (then set ``explore_floor``). Under a decaying learning rate a stop forgoes
           the rest of the decay: prefer a constant rate.
Differs    The survey names gain per compute as the signal of such a governor and gives neither an estimator nor a
           threshold. The estimator is a closed-form relative of Domhan et al. (IJCAI 2015), who sample by MCMC.

Paper      Unifying Data, Memory, and Compute Efficiency in LLM training: A Survey (2026), arXiv:2606.10706
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.governor import Decision, Governor, Telemetry
from hf_eff.contracts.memory import BatchShape
from hf_eff.contracts.spec import MethodConfig, MethodSpec, Paper, Traits, knob
from hf_eff.engines.probe_history import FEWEST_PROBES, Outlook, ProbeHistory, is_confounded
from hf_eff.errors import OptionError
from hf_eff.numerics.flops import forward_flops, training_flops
from hf_eff.numerics.probe_size import affordable_examples

WIDEST_GAP = 1 / 120
"""Largest share of the budget between two probes, unless the purse is too small for it."""
PURSE_ADVANCE = 0.2
"""Share of the budget that counts as spent before it is, so that the first probes can be paid."""
RISING = 0.95
"""Stop at once when the loss rises with a probability above this."""


@dataclass(frozen=True, kw_only=True)
class MarginalGainConfig(MethodConfig):
    """Options of ``governor="marginal_gain"``."""

    threshold: str = knob("tail", "What a gain is held against.", choices=("tail", "price"))
    epsilon: float = knob(0.02, "Tail: least share of the gain so far that the rest must add.", low=0.0, high=1.0)
    price: float | None = knob(
        None, "Price: loss that one unit of compute must buy.", low=0.0, unit="nats per unit of the governing currency"
    )
    delta: float = knob(0.3, "Stop when the chance of a gain above the threshold is lower.", low=0.0, high=1.0)
    strict: bool = knob(False, "Shrink delta at each check so that all checks together err with chance delta.")
    horizon: float = knob(0.05, "Price: stretch of compute looked at.", low=1e-6, high=1.0, unit="share of budget")
    confirm: float = knob(0.02, "Compute over which the verdict must hold.", low=0.0, high=1.0, unit="share of budget")
    explore_floor: float = knob(0.0, "Never stop before.", low=0.0, high=1.0, unit="share of budget")
    discount: float = knob(0.95, "Weight of a probe relative to the next one.", low=0.5, high=1.0)
    prior_scale: float = knob(3.0, "Prior standard deviation of a curve's height.", low=1e-6, unit="nats")
    slope_window: int = knob(8, "Probes in the Theil-Sen slope.", low=2, unit="probes")
    num_examples: int = knob(
        128, "Held-out examples in a probe; fewer, to 16, where probes would be dear.", low=2, unit="examples"
    )
    probe_growth: float = knob(0.08, "Growth of compute from probe to probe.", low=0.0, high=10.0, unit="share")
    probe_share: float = knob(0.03, "Cap on the probes' part of the compute spent.", low=0.0, high=1.0, unit="share")

    def __post_init__(self) -> None:
        """Check that a price is given exactly when it is used.

        Raises:
            OptionError: ``threshold`` and ``price`` contradict each other.
        """
        super().__post_init__()
        if (self.threshold == "price") != (self.price is not None):
            raise OptionError(
                f"MarginalGainConfig.price must be given with threshold='price' and only then, "
                f"got threshold={self.threshold!r} and price={self.price!r}."
            )

    def probe_allowance(self, compute: float) -> float:
        """Cost of a probe at which the purse pays for one every ``WIDEST_GAP`` of a run of ``compute``.

        Many rough probes tell more of a curve than a few precise ones: a dearer probe should have fewer examples.
        """
        return WIDEST_GAP * (1.0 + PURSE_ADVANCE) * self.probe_share * compute


class MarginalGain(Governor):
    """Fits curves to the probes and stops when the rest of the run is not worth its compute.

    Its state changes at probes only, so a record of the probes replays every decision.
    """

    def __init__(self, config: MarginalGainConfig) -> None:
        self.config = config
        self._history = ProbeHistory(
            discount=config.discount, prior_scale=config.prior_scale, window=config.slope_window
        )
        self._last_probe: float | None = None
        self._checks = 0
        self._pending_since: float | None = None

    def next_probe(self, telemetry: Telemetry, probe_cost: float) -> bool:
        """Geometric spacing in compute, as far as the purse allows."""
        limit = telemetry.compute_limit
        if not math.isfinite(limit):
            return False
        if telemetry.probe_spent + probe_cost > self.config.probe_share * (telemetry.compute + PURSE_ADVANCE * limit):
            return False
        if self._last_probe is None:
            return True
        since_start = self._last_probe - self._history.start if len(self._history) else 0.0
        return telemetry.compute >= self._last_probe + _probe_gap(self.config, since_start, limit, probe_cost)

    def observe(self, telemetry: Telemetry) -> Decision:
        """Take in a probe and weigh stopping; between probes there is nothing to decide."""
        if telemetry.probe is None:
            return Decision("continue", "no probe at this step")
        self._last_probe = telemetry.compute
        telemetry = replace(telemetry, compute_limit=self._end(telemetry))
        if not self._history.take_in(telemetry):
            return Decision("continue", "the probe has no finite paired loss")
        details = {
            **self._history.facts,
            "end": telemetry.compute_limit,
            "confounded": is_confounded(telemetry),
        }
        waiting = self._reason_to_wait(telemetry)
        if waiting:
            self._pending_since = None
            return Decision("continue", waiting, details)
        self._checks += 1
        verdict = self._weigh(telemetry, self._history.outlook(telemetry))
        return self._act_on(telemetry, {**details, **verdict})

    def state_dict(self) -> dict[str, Any]:
        """The probes so far and what was concluded from them."""
        return {
            "history": self._history.state_dict(),
            "last_probe": self._last_probe,
            "checks": self._checks,
            "pending_since": self._pending_since,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self._history.load_state_dict(state["history"])
        self._last_probe = state["last_probe"]
        self._checks = int(state["checks"])
        self._pending_since = state["pending_since"]

    def _end(self, telemetry: Telemetry) -> float:
        """Compute at which the run ends if it is not stopped: at its limit, or before it when its steps run out.

        Without a limit the steps alone decide: what the plan foresaw for them may be off.
        """
        step_compute, limit = self._history.step_compute, telemetry.compute_limit
        if step_compute is None or telemetry.max_steps <= 0 or not math.isfinite(limit):
            return limit
        end = telemetry.compute + step_compute * max(0, telemetry.max_steps - telemetry.step)
        is_limited = any(currency != "bytes" for currency in telemetry.limits)
        return min(limit, end) if is_limited else end

    def _reason_to_wait(self, telemetry: Telemetry) -> str:
        history, limit = self._history, telemetry.compute_limit
        if not math.isfinite(limit) or telemetry.compute >= limit:
            return "nothing finite is left to spend"
        if telemetry.in_warmup:
            return "the learning rate is still rising"
        if telemetry.compute < self.config.explore_floor * limit:
            return f"less than explore_floor={self.config.explore_floor:g} of the budget is spent"
        if history.since_break < FEWEST_PROBES:
            return f"{history.since_break} of {FEWEST_PROBES} probes since the curve began or broke"
        if telemetry.compute - history.break_compute < self.config.confirm * limit:
            return "the curve broke less than a confirmation span ago"
        return ""

    def _weigh(self, telemetry: Telemetry, outlook: Outlook) -> dict[str, Any]:
        """Hold the expected gain against the threshold; the entries are what a decision rests on."""
        config = self.config
        left = telemetry.compute_limit - telemetry.compute
        realised = max(0.0, -outlook.level)
        if config.price is None:
            stretch, needed = left, config.epsilon * realised
        else:
            stretch = min(config.horizon * telemetry.compute_limit, left)
            needed = config.price * stretch
        forecast = outlook.forecast(stretch, needed)
        # Sum over j of 6 / (pi j)^2 is 1: the union bound over all checks.
        delta = config.delta * (6.0 / (math.pi * self._checks) ** 2 if config.strict else 1.0)
        return {
            "gain": forecast.gain,
            "needed": needed,
            "stretch": stretch,
            "realised": realised,
            "probability": forecast.probability,
            "delta": delta,
            "probability_rising": forecast.negative,
            "recent_rate": outlook.recent_rate,
            "threshold_rate": needed / stretch,
            "family": forecast.family,
            "entropy": forecast.entropy,
            "checks": self._checks,
            "too_little": forecast.probability < delta,
        }

    def _act_on(self, telemetry: Telemetry, details: dict[str, Any]) -> Decision:
        """Stop on a rising loss, or when too little gain was expected for a while and the last probes agree."""
        if details["probability_rising"] > RISING:
            return Decision("stop", f"held-out loss rises (probability {details['probability_rising']:.3f})", details)
        if not details["too_little"]:
            self._pending_since = None
            return Decision("continue", "further compute is expected to pay", details)
        first = self._pending_since is None
        self._pending_since = telemetry.compute if self._pending_since is None else self._pending_since
        held = telemetry.compute - self._pending_since
        if first or held < self.config.confirm * telemetry.compute_limit:
            return Decision("continue", "too little gain is expected; waiting for confirmation", details)
        if details["recent_rate"] >= details["threshold_rate"]:
            return Decision("continue", "too little gain is expected, yet the last probes still gain enough", details)
        reason = f"a gain above {details['needed']:.3g} nats has probability {details['probability']:.3f} only"
        return Decision("stop", reason, details)


def _probe_gap(config: MarginalGainConfig, since_start: float, limit: float, probe_cost: float) -> float:
    """Compute between two probes: geometric and at most ``WIDEST_GAP`` of the budget, or what the purse pays for."""
    affordable = probe_cost / max((1.0 + PURSE_ADVANCE) * config.probe_share, 1e-300)
    return max(min(config.probe_growth * since_start, WIDEST_GAP * limit), affordable)


def cost(config: MarginalGainConfig, facts: Facts) -> Cost:
    """FLOPs of all probes of a run that is never stopped."""
    rows, length = min(config.num_examples, facts.pool.num_reference), math.ceil(facts.pool.mean_reference_tokens)
    if rows == 0 or length == 0:
        return Cost()
    run, batch = facts.run, facts.run.batch_size * facts.run.accumulation * facts.hardware.world_size
    shape = BatchShape(rows=batch, length=run.length or math.ceil(facts.pool.mean_tokens))
    steps = run.max_steps if run.max_steps > 0 else run.epochs * math.ceil((facts.pool.num_rows or 0) / batch)
    step = training_flops(facts.model, shape)
    limit = step * steps
    row = forward_flops(facts.model, BatchShape(rows=1, length=length))
    probe = row * affordable_examples(rows, row, config.probe_allowance(limit))
    spent, count = 0.0, 0
    while spent < limit:
        count += 1
        spent += max(_probe_gap(config, spent, limit, probe), step)
    return Cost(flops=min(count * probe, (1.0 + PURSE_ADVANCE) * config.probe_share * limit))


SPEC = MethodSpec(
    name="marginal_gain",
    kind="governor",
    slot="policy",
    summary="stop when the loss that further compute is expected to buy is no longer worth it.",
    config=MarginalGainConfig,
    build=MarginalGain,
    cost=cost,
    paper=Paper(
        title="Unifying Data, Memory, and Compute Efficiency in LLM training: A Survey", year=2026, arxiv="2606.10706"
    ),
    traits=Traits(needs_reference_set=True, fsdp2=True, streaming=True),
    tiny={"num_examples": 4},
)
