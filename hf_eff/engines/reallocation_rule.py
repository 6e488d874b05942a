"""Weighs what a run could do besides going on: refresh, next band, widen, switch memory. Damped.

Each offer is an arm with an index, the best gain per compute that it can reach (``numerics.action_index``). An arm is
taken when it beats going on and stopping, has waited out its dwell, and the purse pays for it; then nothing else is
taken until its effect has been measured.

- refresh of scores that fade: due at the age of the marginal value theorem (``numerics.refresh_law``), with the
  lifetime h from drift readings and the uplift u from slopes around past refreshes. Hysteresis: one refresh must gain
  (1 + eta) times its cost over the rest of the run.
- next band, widening, a refresh that does not fade: tried when the loss falls less than half as fast as it did at best
  on these rows, then judged by what they brought.
- memory: the same gain per token at another cost per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from hf_eff.contracts.governor import Action, Decision, Offer, Telemetry
from hf_eff.engines.damping import HYSTERESIS, Damping
from hf_eff.engines.reallocation_evidence import FADING, MEMORY, ReallocationEvidence
from hf_eff.numerics.action_index import action_index
from hf_eff.numerics.refresh_law import fresh_gain, optimal_age, refresh_surplus

ACTIONS: Mapping[str, Action] = {
    "refresh": "refresh",
    "next_band": "next_band",
    "widen": "widen",
    "memory": "switch_memory",
}
"""Action of each word of the knob ``actions``."""
STALE = 0.5
"""New rows are tried when the loss falls slower than this share of its best rate on the present ones."""
FLOOR = 0.1
"""New rows are not expected to teach at less than this share of that best rate before their uplift is added."""
PROBE_SHARE = 0.03


class RuleConfig(Protocol):
    """What the rule reads of a governor's options; ``probe_share`` too, where there is one."""

    @property
    def actions(self) -> str:
        """Words of ``ACTIONS`` joined by ``+``."""
        ...


@dataclass(frozen=True)
class _Arm:
    """One offer, weighed.

    Attributes:
        offer: What the run could do.
        index: Best gain per compute that it can reach; waiting out the dwell is counted when asked for.
        uplift: Predicted rate of the loss just after it over that before, less 1, for fresh rows.
        is_due: Whether it is better taken now than later.
        beats: Whether it is better than going on by the hysteresis.
    """

    offer: Offer
    index: float
    uplift: float
    is_due: bool
    beats: bool


class ReallocationRule:
    """Chooses among the offers of a run. Its state changes at probes only, so a record of them replays it.

    Args:
        config: Names the actions that may be taken.
    """

    def __init__(self, config: RuleConfig) -> None:
        words = [word for word in config.actions.split("+") if word]
        self._allowed = {ACTIONS[word] for word in words}
        self._damping = Damping(float(getattr(config, "probe_share", PROBE_SHARE)))
        self._evidence = ReallocationEvidence()
        self._rate = 0.0
        self._horizon: float | None = None

    def note_probe(self, telemetry: Telemetry, recent_rate: float) -> None:
        """Learn from a probe and from the drift reading beside it; call it before the other methods.

        Args:
            telemetry: The look; ``compute_limit`` is where the run ends.
            recent_rate: Drop of the loss per unit of compute over the last probes; NaN when unknown.
        """
        if not math.isfinite(telemetry.compute_limit):
            return
        self._rate = recent_rate if math.isfinite(recent_rate) else self._rate
        outcome = self._evidence.take_in(telemetry, recent_rate)
        if outcome is not None:
            self._damping.note_outcome(*outcome)

    def consider(
        self, telemetry: Telemetry, continue_rate: float, threshold_rate: float, horizon: float
    ) -> Decision | None:
        """Take the best offer that is better than going on and than stopping; None when there is none.

        Args:
            telemetry: The look.
            continue_rate: Expected drop of the loss per unit of compute when nothing is changed.
            threshold_rate: Drop per unit of compute below which the run is not worth going on with.
            horizon: Compute over which a gain that does not fade is counted.
        """
        if not math.isfinite(continue_rate):
            return None
        self._rate, self._horizon = continue_rate, horizon
        if not self._may_act(telemetry) or self._evidence.is_waiting:
            return None
        ready = [arm for arm in self._arms(telemetry) if self._is_ready(arm, telemetry)]
        ready = [arm for arm in ready if arm.beats and arm.index >= threshold_rate]
        if not ready:
            return None
        best = max(ready, key=lambda arm: arm.index)
        details = self.facts(telemetry)
        outcome = self._evidence.close_trial()
        if outcome is not None:
            self._damping.note_outcome(*outcome)
            if not self._is_ready(best, telemetry):
                return None
        offer = best.offer
        self._damping.note_action(offer.fixed_cost, telemetry)
        self._evidence.open_trial(offer.name, offer.action, offer.fades, best.uplift, telemetry.compute)
        reason = f"{offer.name} promises {best.index:.3g} nats per unit of compute, going on {continue_rate:.3g}"
        return Decision(offer.action, reason, details, offer.target)

    def blocks_stop(self, telemetry: Telemetry, threshold_rate: float) -> bool:
        """Whether an offer that is due and affordable is worth more than stopping, its dwell counted as a wait.

        An offer that the run did not carry out last time blocks nothing.
        """
        if not self._may_act(telemetry):
            return False
        return any(
            arm.is_due
            and arm.index >= threshold_rate
            and not self._why_not(arm.offer, telemetry)
            and not self._evidence.was_refused(arm.offer.name)
            for arm in self._arms(telemetry, waiting=True)
        )

    def facts(self, telemetry: Telemetry) -> dict[str, Any]:
        """Numbers for the record.

        Returns:
            ``indices`` of going on and of each offer; by offer, ``feasible``: why it cannot be taken, else empty, and
            ``dwell_left``; the ``purse``; lifetime ``h``, uplift ``u``, last correlation ``rho`` and ``age`` of the
            scores; ``awaited``, the offer whose effect is not known yet.
        """
        if not math.isfinite(telemetry.compute_limit):
            return {}
        damping, evidence, offers = self._damping, self._evidence, self._offers(telemetry)
        return {
            "indices": {"continue": self._rate, **{arm.offer.name: arm.index for arm in self._arms(telemetry)}},
            "feasible": {offer.name: self._why_not(offer, telemetry) for offer in offers},
            "dwell_left": {offer.name: damping.dwell_left(offer.name, offer.fixed_cost, telemetry) for offer in offers},
            "purse": damping.purse(telemetry),
            "h": evidence.lifetime,
            "u": evidence.uplift(FADING),
            "rho": evidence.correlation,
            "age": evidence.age,
            "awaited": evidence.awaited,
        }

    def state_dict(self) -> dict[str, Any]:
        """What was learnt and what was done; JSON-able."""
        return {
            "damping": self._damping.state_dict(),
            "evidence": self._evidence.state_dict(),
            "rate": self._rate,
            "horizon": self._horizon,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self._damping.load_state_dict(state["damping"])
        self._evidence.load_state_dict(state["evidence"])
        self._rate = state["rate"]
        self._horizon = state["horizon"]

    def _may_act(self, telemetry: Telemetry) -> bool:
        is_bounded = math.isfinite(telemetry.compute_limit) and telemetry.compute < telemetry.compute_limit
        return is_bounded and telemetry.phase == "main" and not telemetry.in_warmup

    def _offers(self, telemetry: Telemetry) -> list[Offer]:
        return [offer for offer in telemetry.offers if offer.action in self._allowed]

    def _why_not(self, offer: Offer, telemetry: Telemetry) -> str:
        """Why an offer cannot be taken whatever it is worth; empty when it can."""
        if not offer.feasible:
            return offer.why_not or "not feasible"
        if self._damping.is_retired(offer.name):
            return "it failed too often"
        if offer.fixed_cost >= telemetry.compute_limit - telemetry.compute:
            return "it costs more than is left"
        if offer.fixed_cost > max(0.0, self._damping.purse(telemetry)):
            return "the purse does not pay for it"
        return ""

    def _is_ready(self, arm: _Arm, telemetry: Telemetry) -> bool:
        offer = arm.offer
        waits = self._damping.dwell_left(offer.name, offer.fixed_cost, telemetry) > 0
        return arm.is_due and not waits and not self._why_not(offer, telemetry)

    def _arms(self, telemetry: Telemetry, waiting: bool = False) -> list[_Arm]:
        """Every offer that leaves compute to train with; ``waiting`` counts the dwell as part of the cost."""
        left = telemetry.compute_limit - telemetry.compute
        arms = []
        for offer in self._offers(telemetry):
            wait = self._damping.dwell_left(offer.name, offer.fixed_cost, telemetry) if waiting else 0.0
            if left - wait > offer.fixed_cost:
                arms.append(self._weigh(offer, left - wait, wait))
        return arms

    def _weigh(self, offer: Offer, left: float, wait: float) -> _Arm:
        if offer.action == MEMORY:
            return self._weigh_memory(offer, left, wait)
        return self._weigh_refresh(offer, left, wait) if _fades(offer) else self._weigh_rows(offer, left, wait)

    def _weigh_memory(self, offer: Offer, left: float, wait: float) -> _Arm:
        """Same gain per token, another cost per token, the switch spread over the rest of the run."""
        rate = max(self._rate, 0.0)
        index = self._index(lambda stretch: rate * stretch, offer, left, wait)
        return _Arm(offer, index, 1.0 / offer.cost_factor - 1.0, is_due=True, beats=self._beats(index))

    def _weigh_refresh(self, offer: Offer, left: float, wait: float) -> _Arm:
        """Fresh scores that fade: due at the age of the marginal value theorem."""
        lifetime, age = self._evidence.lifetime, self._evidence.age
        uplift = self._evidence.uplift(offer.action)
        stale_rate = self._base_rate() / (1.0 + uplift * math.exp(-age / lifetime))
        index = self._index(lambda stretch: stale_rate * fresh_gain(stretch, uplift, lifetime), offer, left, wait)
        is_due = age >= optimal_age(uplift, lifetime, offer.fixed_cost)
        surplus = refresh_surplus(uplift, lifetime, (1.0 + HYSTERESIS) * offer.fixed_cost, left, age)
        return _Arm(offer, index, uplift, is_due, beats=surplus > 0.0)

    def _weigh_rows(self, offer: Offer, left: float, wait: float) -> _Arm:
        """Other rows: due when these ones teach far slower than they did; at best as well as they did then."""
        best = self._evidence.best_rate or 0.0
        rate, base = max(self._rate, 0.0), self._base_rate()
        promised = min(base * self._evidence.uplift(offer.action) + rate, max(best, rate))
        uplift = promised / base - 1.0 if base > 0 else 0.0
        longest = min(left, self._horizon or left)
        index = self._index(lambda stretch: promised * stretch, offer, longest, wait)
        return _Arm(offer, index, max(uplift, 0.0), is_due=self._rate < STALE * best, beats=self._beats(index))

    def _index(self, gain: Callable[[float], float], offer: Offer, left: float, wait: float) -> float:
        """Index of an offer whose gain over a stretch of training is ``gain``, after going on for ``wait``."""
        longest = (left - offer.fixed_cost) / offer.cost_factor
        if longest <= 0:
            return 0.0
        found = action_index(
            lambda stretch: self._rate * wait + gain(stretch),
            longest,
            fixed_cost=offer.fixed_cost + wait,
            cost_factor=offer.cost_factor,
        )
        return found.value

    def _base_rate(self) -> float:
        """Present rate, but not less than a small share of the best one on these rows."""
        return max(self._rate, FLOOR * (self._evidence.best_rate or 0.0))

    def _beats(self, index: float) -> bool:
        return index > max((1.0 + HYSTERESIS) * self._rate, 0.0)


def _fades(offer: Offer) -> bool:
    return offer.action == FADING and offer.fades
