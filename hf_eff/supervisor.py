"""Feeds a governor with telemetry, takes its decision on rank 0 and writes the audit log."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hf_eff.contracts.governor import Decision, Governor, ProbeReading, Telemetry

if TYPE_CHECKING:
    from hf_eff.contracts.budget import Budget
    from hf_eff.engines.gain_probe import GainProbe
    from hf_eff.engines.ranks import Ranks
    from hf_eff.governor import GovernorLog
    from hf_eff.hardware.ledger import Ledger

_CONTINUE = Decision("continue", "no rule applies")


class Supervisor:
    """One governor at work on one run.

    Args:
        governor: The policy.
        ledger: Where probes are charged and spending is read.
        ranks: The processes of the run.
        compute_limit: Planned amount of the governing currency when no budget limits it.
        max_steps: Planned optimizer steps.
        probe: Held-out examples, or None when the governor never asks.
        log: Audit log, or None.
    """

    def __init__(
        self,
        governor: Governor,
        ledger: Ledger,
        ranks: Ranks,
        *,
        compute_limit: float,
        max_steps: int,
        probe: GainProbe | None = None,
        log: GovernorLog | None = None,
    ) -> None:
        self.governor = governor
        self.ledger = ledger
        self.ranks = ranks
        self.probe = probe
        self.log = log
        self.max_steps = max_steps
        self.currency = governing_currency(ledger.budget)
        self.compute_limit = _limit(ledger.budget, self.currency, compute_limit)
        self.peak_rate = 0.0
        self.last_rate = 0.0
        self.last_decision = _CONTINUE
        # A policy with neither rule needs no telemetry, and its run no messages between ranks.
        self.passive = _inherits(governor, "observe") and _inherits(governor, "next_probe")

    def after_step(self, step: int, model: Any, *, loss: float | None, learning_rate: float) -> Decision:
        """Look at the run after an optimizer step; probe if the governor asks; return its decision."""
        if self.passive:
            return _CONTINUE
        telemetry = self._telemetry(step, loss, learning_rate)
        reading = self._maybe_probe(telemetry, model)
        if reading is not None:
            telemetry = dataclasses.replace(self._telemetry(step, loss, learning_rate), probe=reading)
        self.peak_rate = max(self.peak_rate, learning_rate)
        self.last_rate = learning_rate
        decision = self.ranks.broadcast(self.governor.observe(telemetry))
        self.last_decision = decision
        if self.log is not None and self.ranks.is_first and (reading is not None or decision.action != "continue"):
            self.log.append(telemetry, decision)
        return decision

    def _telemetry(self, step: int, loss: float | None, learning_rate: float) -> Telemetry:
        spent = self.ledger.spent()
        by_purpose = self.ledger.by_purpose()
        return Telemetry(
            step=step,
            max_steps=self.max_steps,
            spent=spent,
            limits=dict(self.ledger.budget.limits),
            compute=self._amount(spent),
            compute_limit=self.compute_limit,
            loss=loss,
            learning_rate=learning_rate,
            peak_learning_rate=max(self.peak_rate, learning_rate),
            in_warmup=learning_rate > self.last_rate,
            probe_spent=self._amount(by_purpose.get("probe", {})),
        )

    def _amount(self, spent: Mapping[str, float]) -> float:
        if self.currency == "share":
            return self.ledger.budget.share(spent)
        return float(spent.get(self.currency, 0.0))

    def _maybe_probe(self, telemetry: Telemetry, model: Any) -> ProbeReading | None:
        if self.probe is None:
            return None
        need = {"flops": self.probe.cost_flops, "tokens": self.probe.cost_tokens}
        due = self.governor.next_probe(telemetry, self._probe_cost(need, telemetry))
        fits = self.ledger.need_fits(need) is None
        if not self.ranks.broadcast(due and fits):
            return None
        self.ledger.charge("probe", **need)
        with self.ledger.clock("probe"):
            return self.probe.read(model)

    def _probe_cost(self, need: Mapping[str, float], telemetry: Telemetry) -> float:
        """Cost of a probe in the governing currency; time-like ones by the run's own speed."""
        if self.currency in need:
            return need[self.currency]
        if self.currency == "share":
            return self.ledger.budget.share({**need, "seconds": self._seconds(need, telemetry)})
        return self._seconds(need, telemetry) * _per_second(telemetry.spent, self.currency)

    def _seconds(self, need: Mapping[str, float], telemetry: Telemetry) -> float:
        flops = telemetry.spent.get("flops", 0.0)
        return need["flops"] * telemetry.spent.get("seconds", 0.0) / flops if flops else 0.0

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state: policy, probe and learning-rate history."""
        return {
            "governor": self.governor.state_dict(),
            "probe": self.probe.state_dict() if self.probe is not None else None,
            "peak_rate": self.peak_rate,
            "last_rate": self.last_rate,
        }

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Restore, and cut the log back to the decisions up to ``step``."""
        self.governor.load_state_dict(state["governor"])
        if self.probe is not None and state["probe"] is not None:
            self.probe.load_state_dict(state["probe"])
        self.peak_rate = float(state["peak_rate"])
        self.last_rate = float(state["last_rate"])
        if self.log is not None and self.ranks.is_first:
            self.log.truncate_after(step)


def governing_currency(budget: Budget) -> str:
    """The one additive currency of a budget, ``"share"`` for several, FLOPs for none or for steps alone.

    Steps do not price a probe, so FLOPs stand in for them.
    """
    additive = [currency for currency in budget.limits if currency not in ("bytes", "steps")]
    if len(additive) == 1:
        return additive[0]
    return "share" if additive else "flops"


def _limit(budget: Budget, currency: str, planned: float) -> float:
    if currency == "share":
        return 1.0
    return float(budget.limits.get(currency, planned))


def _per_second(spent: Mapping[str, float], currency: str) -> float:
    seconds = spent.get("seconds", 0.0)
    return spent.get(currency, 0.0) / seconds if seconds else 0.0


def _inherits(governor: Governor, hook: str) -> bool:
    return getattr(type(governor), hook, None) is getattr(Governor, hook)
