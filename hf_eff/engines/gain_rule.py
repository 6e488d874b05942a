"""What policies share that hold an expected gain against a threshold: probes, waiting, verdict, confirmation."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.governor import Decision, Governor, Telemetry
from hf_eff.contracts.spec import MethodConfig, knob
from hf_eff.engines.gain_thresholds import Threshold, next_stretch
from hf_eff.engines.probe_history import FEWEST_PROBES, Outlook, ProbeHistory, is_confounded
from hf_eff.engines.probe_spacing import (
    WIDEST_GAP,
    planned_flops,
    probe_flops,
    probe_gap,
    purse_allows,
)
from hf_eff.engines.reallocation_rule import ACTIONS, ReallocationRule
from hf_eff.errors import OptionError

RISING = 0.95
"""Stop at once when the loss rises with a probability above this."""
ACTION_HORIZON = 0.05
"""Share of the budget over which going on is weighed against a reallocation."""


@dataclass(frozen=True, kw_only=True)
class GainConfig(MethodConfig):
    """Options that all policies of this kind have; each adds those of its threshold."""

    strict: bool = knob(False, "Shrink the chance to stop at each check so that all checks together err with it.")
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
    actions: str = knob("", "What it may do besides stopping: refresh, next_band, widen, memory, joined by '+'.")
    window_steps: int = knob(0, "Steps between moments at which rows may change; 0: a fortieth of the run.", low=0)
    cooldown: float = knob(
        0.0,
        "Instead of stopping for too little gain, lower the rate to 0 over this; reserved at all times.",
        low=0.0,
        high=1.0,
        unit="share of the compute spent",
    )
    restore_best: bool = knob(True, "End with the weights of the best probe where the loss is surely above it.")
    drift_examples: int = knob(64, "Rows of the pool whose ranking is followed.", low=2, unit="rows")

    def __post_init__(self) -> None:
        """Check the names in ``actions``.

        Raises:
            OptionError: A word is no action, or an option lies outside its bounds.
        """
        super().__post_init__()
        for word in self.actions.split("+") if self.actions else ():
            if word not in ACTIONS:
                near = difflib.get_close_matches(word, ACTIONS, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise OptionError(
                    f"{type(self).__name__}.actions must be words of {list(ACTIONS)} joined by '+', "
                    f"got {self.actions!r}.{hint}"
                )

    @property
    def fewest_probes(self) -> int:
        """Probes before which nothing is decided."""
        return FEWEST_PROBES

    @property
    def looks_cost(self) -> int:
        """Most that looks take, as a multiple of their probes: where rows may be chosen anew, the pool is read too."""
        return 2 if "refresh" in self.actions.split("+") else 1

    def probe_allowance(self, compute: float) -> float:
        """Cost of a probe at which the purse pays for one every ``WIDEST_GAP`` of a run of ``compute``.

        Many rough probes tell more of a curve than a few precise ones: a dearer probe should have fewer examples.
        """
        return WIDEST_GAP * self.probe_share * compute


class GainRule(Governor):
    """Fits curves to the probes and stops when the rest of the run is not worth its compute.

    Its state changes at probes only, so a record of the probes replays every decision.

    Args:
        config: Options of the policy.
        threshold: What a gain is held against.
    """

    def __init__(self, config: GainConfig, threshold: Threshold) -> None:
        self.config = config
        self._threshold = threshold
        self._history = ProbeHistory(
            discount=config.discount, prior_scale=config.prior_scale, window=config.slope_window
        )
        self._reallocation = ReallocationRule(config) if config.actions else None
        self._last_probe: float | None = None
        self._checks = 0
        self._pending_since: float | None = None
        self._switched = ""

    def next_probe(self, telemetry: Telemetry, probe_cost: float) -> bool:
        """Geometric spacing in compute, as far as the purse allows."""
        options, limit = self.config, self._end(telemetry)
        within = replace(telemetry, compute_limit=limit)
        if not math.isfinite(limit) or not purse_allows(within, probe_cost, options.probe_share):
            return False
        if self._last_probe is None:
            return True
        since_start = self._last_probe - self._history.start if len(self._history) else 0.0
        gap = probe_gap(options.probe_growth, options.probe_share, since_start, limit, probe_cost)
        return telemetry.compute >= self._last_probe + gap

    def observe(self, telemetry: Telemetry) -> Decision:
        """Take in a probe and weigh what to do; between probes there is nothing to decide."""
        if telemetry.probe is None:
            return Decision("continue", "no probe at this step")
        self._last_probe = telemetry.compute
        telemetry = replace(telemetry, compute_limit=self._end(telemetry))
        if not self._history.take_in(telemetry, changed=self._was_switched(telemetry)):
            return Decision("continue", "the probe has no finite paired loss")
        self._switched = ""
        details = {
            **self._history.facts,
            "end": telemetry.compute_limit,
            "confounded": is_confounded(telemetry),
        }
        ended = self._reached(telemetry)
        if ended:
            return Decision("stop", ended, details)
        if self._reallocation is not None:
            rate = self._history.rate_since_break(telemetry)
            taken = self._reallocate(self._reallocation, telemetry, rate)
            if taken is not None:
                return replace(taken, details={**details, **taken.details})
            details |= self._reallocation.facts(telemetry) if telemetry.offers and rate is not None else {}
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
            "switched": self._switched,
            "threshold": self._threshold.state_dict(),
            "reallocation": None if self._reallocation is None else self._reallocation.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self._history.load_state_dict(state["history"])
        self._last_probe = state["last_probe"]
        self._checks = int(state["checks"])
        self._pending_since = state["pending_since"]
        self._switched = str(state["switched"])
        self._threshold.load_state_dict(state["threshold"])
        if self._reallocation is not None:
            self._reallocation.load_state_dict(state["reallocation"])

    def _end(self, telemetry: Telemetry) -> float:
        """Compute at which the run ends if it is not stopped: at its limit, or before it when its steps run out.

        Without a limit the steps alone decide: what the plan foresaw for them may be off. The cooldown is kept apart.
        """
        step_compute, limit = self._history.step_compute, telemetry.compute_limit
        reserved = 1.0 + self.config.cooldown
        if step_compute is None or telemetry.max_steps <= 0 or not math.isfinite(limit):
            return limit / reserved
        end = telemetry.compute + step_compute * max(0, telemetry.max_steps - telemetry.step)
        is_limited = any(currency != "bytes" for currency in telemetry.limits)
        return (min(limit, end) if is_limited else end) / reserved

    def _reached(self, telemetry: Telemetry) -> str:
        """Why the run has what it was to reach, or nothing."""
        too_early = telemetry.compute < self.config.explore_floor * telemetry.compute_limit
        if telemetry.probe is None or telemetry.phase == "cooldown" or too_early:
            return ""
        return self._threshold.reached(telemetry.probe.mean)

    def _reallocate(self, rule: ReallocationRule, telemetry: Telemetry, rate: float | None) -> Decision | None:
        """Another choice of rows or memory that beats going on, where there is one."""
        history = self._history
        rule.note_probe(telemetry, math.nan if rate is None else rate)
        if self._nothing_to_decide(telemetry) or history.since_break < FEWEST_PROBES or not telemetry.offers:
            return None
        outlook = history.outlook(telemetry)
        horizon, bar = next_stretch(telemetry, ACTION_HORIZON), self._threshold.bar(telemetry, outlook)
        expected = outlook.forecast(horizon, 0.0).gain / horizon
        taken = rule.consider(telemetry, expected, bar.needed / bar.stretch, horizon)
        if taken is not None:
            self._switched = f"{taken.action}:{taken.target}" if taken.action == "switch_memory" else ""
            self._pending_since = None
        return taken

    def _was_switched(self, telemetry: Telemetry) -> bool:
        """Whether the run changed how its update fits, as decided at the last probe: then it offers that no more.

        Other rows are told by ``telemetry.data_phase``.
        """
        return bool(self._switched) and all(offer.name != self._switched for offer in telemetry.offers)

    def _nothing_to_decide(self, telemetry: Telemetry) -> str:
        limit = telemetry.compute_limit
        if telemetry.phase == "cooldown":
            return "the learning rate is being lowered for the end"
        if not math.isfinite(limit) or telemetry.compute >= limit:
            return "nothing finite is left to spend"
        return "the learning rate is still rising" if telemetry.in_warmup else ""

    def _reason_to_wait(self, telemetry: Telemetry) -> str:
        history, options = self._history, self.config
        nothing = self._nothing_to_decide(telemetry)
        if nothing:
            return nothing
        if telemetry.compute < options.explore_floor * telemetry.compute_limit:
            return f"less than explore_floor={options.explore_floor:g} of the budget is spent"
        if history.since_break < FEWEST_PROBES:
            return f"{history.since_break} of {FEWEST_PROBES} probes since the curve began or broke"
        if telemetry.compute - history.break_compute < options.confirm * telemetry.compute_limit:
            return "the curve broke less than a confirmation span ago"
        return ""

    def _weigh(self, telemetry: Telemetry, outlook: Outlook) -> dict[str, Any]:
        """Hold the expected gain against the threshold; the entries are what a decision rests on."""
        bar = self._threshold.bar(telemetry, outlook)
        forecast = outlook.forecast(bar.stretch, bar.needed)
        # Sum over j of 6 / (pi j)^2 is 1: the union bound over all checks.
        delta = bar.chance * (6.0 / (math.pi * self._checks) ** 2 if self.config.strict else 1.0)
        return {
            "gain": forecast.gain,
            "needed": bar.needed,
            "stretch": bar.stretch,
            "realised": outlook.realised,
            "probability": forecast.probability,
            "delta": delta,
            "probability_rising": max(forecast.negative, self._history.chance_of_rise()),
            "recent_rate": outlook.recent_rate,
            "threshold_rate": bar.needed / bar.stretch,
            **bar.facts,
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
        if self._reallocation is not None and self._reallocation.blocks_stop(telemetry, details["threshold_rate"]):
            return Decision("continue", "too little gain is expected, yet a reallocation may still pay", details)
        reason = f"a gain above {details['needed']:.3g} nats has probability {details['probability']:.3f} only"
        return Decision("cooldown" if self.config.cooldown > 0.0 else "stop", reason, details)


def probing_cost(config: GainConfig, facts: Facts) -> Cost:
    """FLOPs of all probes of a run that is never stopped."""
    step, limit = planned_flops(facts)
    probe = config.looks_cost * probe_flops(facts, config.num_examples, config.probe_allowance(limit))
    if probe == 0.0:
        return Cost()
    spent, count = step, 0  # the first probe comes after the first step
    while spent < limit:
        count += 1
        spent += max(probe_gap(config.probe_growth, config.probe_share, spent - step, limit, probe), step)
    return Cost(flops=min(count, math.floor(config.probe_share * limit / probe + 1e-9)) * probe)
