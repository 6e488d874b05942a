"""Feeds a governor with telemetry, takes its decision on rank 0 and writes the audit log."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from hf_eff.contracts.governor import Decision, Governor, Offer, Telemetry

if TYPE_CHECKING:
    from hf_eff.contracts.budget import Budget
    from hf_eff.engines.drift_probe import DriftProbe
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
        drift: A sample of the pool, or None when nothing could be scored again.

    Attributes:
        offers: What the run could do now, asked at each probe; called with the model.
        situation: Fields of the telemetry that the run knows: ``phase`` and ``data_phase``.
        with_reserve: Adds to what a probe needs what has to be left after it.
        spent_before: Amounts spent before the first step; the choice of rows then is no reallocation.
        level: Loss at a probe of this step relative to the first probe, or None where none was taken.
        readings: How often held-out examples and the pool were read.
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
        drift: DriftProbe | None = None,
    ) -> None:
        self.governor = governor
        self.ledger = ledger
        self.ranks = ranks
        self.probe = probe
        self.log = log
        self.drift = drift
        self.offers: Callable[[Any], tuple[Offer, ...]] = lambda _model: ()
        self.situation: Callable[[], Mapping[str, Any]] = dict
        self.with_reserve: Callable[[Mapping[str, float]], Mapping[str, float]] = lambda need: need
        self.spent_before: Mapping[str, float] = {}
        self.level: float | None = None
        self.max_steps = max_steps
        self.currency = governing_currency(ledger.budget)
        self.compute_limit = _limit(ledger.budget, self.currency, compute_limit)
        self.peak_rate = 0.0
        self.last_rate = 0.0
        self.last_decision = _CONTINUE
        self.readings = {"probe": 0, "drift": 0}
        # A policy with neither rule needs no telemetry, and its run no messages between ranks.
        self.passive = _inherits(governor, "observe") and _inherits(governor, "next_probe")

    def after_step(self, step: int, model: Any, *, loss: float | None, learning_rate: float) -> Decision:
        """Look at the run after an optimizer step; probe if the governor asks; return its decision."""
        if self.passive:
            return _CONTINUE
        telemetry = self._telemetry(step, loss, learning_rate)
        seen = self._maybe_probe(telemetry, model)
        if seen:
            telemetry = dataclasses.replace(self._telemetry(step, loss, learning_rate), **seen)
        self.peak_rate = max(self.peak_rate, learning_rate)
        self.last_rate = learning_rate
        decision = self.ranks.broadcast(self.governor.observe(telemetry))
        self.last_decision = decision
        if self.log is not None and self.ranks.is_first and (seen or decision.action != "continue"):
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
            overhead_spent=self._overhead(by_purpose, spent),
            **self.situation(),
        )

    def _amount(self, spent: Mapping[str, float]) -> float:
        if self.currency == "share":
            return self.ledger.budget.share(spent)
        return float(spent.get(self.currency, 0.0))

    def _overhead(self, by_purpose: Mapping[str, Mapping[str, float]], spent: Mapping[str, float]) -> float:
        """Governing currency spent on probes and on choosing rows again."""
        probes, choices = by_purpose.get("probe", {}), by_purpose.get("select", {})
        names = {*probes, *choices}
        both = {name: probes.get(name, 0.0) + choices.get(name, 0.0) for name in names}
        later = {name: max(0.0, amount - self.spent_before.get(name, 0.0)) for name, amount in both.items()}
        return self._amount({**_by_time(later.get("seconds", 0.0), spent), **later})

    def compute(self, spent: Mapping[str, float] | None = None) -> float:
        """Amounts in the governing currency; without any, those spent so far."""
        return self._amount(self.ledger.spent() if spent is None else spent)

    def trained(self) -> float:
        """Governing currency spent on training so far."""
        amounts = self.ledger.by_purpose()["train"]
        return self._amount({**_by_time(amounts["seconds"], self.ledger.spent()), **amounts})

    def _maybe_probe(self, telemetry: Telemetry, model: Any) -> dict[str, Any]:
        """What a look at the model shows, as fields of the telemetry; none where no look is due or can be paid."""
        self.level = None
        if self.probe is None:
            return {}
        need, reads_pool = self.probe_need(), self._reads_pool()
        due = self.governor.next_probe(telemetry, self.price(need, telemetry.spent))
        fits = self.ledger.need_fits(self.with_reserve(need)) is None
        if not self.ranks.broadcast(due and fits):
            return {}
        trained = self.trained()
        self.ledger.charge("probe", **need)
        with self.ledger.clock("probe"):
            seen: dict[str, Any] = {"probe": self.probe.read(model)}
            if self.drift is not None and reads_pool:
                seen["drift"] = self.drift.drift(model, trained)
        self.readings["probe"] += 1
        self.readings["drift"] += reads_pool
        self.level = self.probe.level
        # What can be paid or fits is asked of the first process; what it saw counts for all.
        return {**seen, "offers": self.ranks.broadcast(self.offers(model))}

    def probe_need(self) -> dict[str, float]:
        """FLOPs and tokens of one look at the model."""
        parts = [self.probe, self.drift if self._reads_pool() else None]
        taken = [part for part in parts if part is not None]
        return {
            "flops": float(sum(part.cost_flops for part in taken)),
            "tokens": float(sum(part.cost_tokens for part in taken)),
        }

    def _reads_pool(self) -> bool:
        """Whether the next look is at the pool too: as often as that takes no more than held-out examples do.

        A sample of the pool may cost many times a probe, and a purse that pays for both each time pays for too few
        probes to see a rising loss.
        """
        if self.probe is None or self.drift is None or self.drift.noted_at is None:
            return False
        cost = (self.readings["drift"] + 1) * self.drift.cost_flops
        return cost <= (self.readings["probe"] + 1) * self.probe.cost_flops

    def note_drift(self, model: Any) -> None:
        """Note how the rows of the pool rank now that they were chosen, if that can be paid."""
        if self.drift is None:
            return
        need = {"flops": self.drift.cost_flops, "tokens": self.drift.cost_tokens}
        if not self.ranks.broadcast(self.ledger.need_fits(self.with_reserve(need)) is None):
            return
        self.ledger.charge("probe", **need)
        with self.ledger.clock("probe"):
            self.drift.note(model, self.trained())

    def price(self, need: Mapping[str, float], spent: Mapping[str, float] | None = None) -> float:
        """Cost of FLOPs and tokens in the governing currency; time-like ones by the run's own speed.

        Args:
            need: ``flops`` and ``tokens``; ``seconds`` too, where they are known better.
            spent: Amounts spent so far; None to ask the ledger.
        """
        spent = self.ledger.spent() if spent is None else spent
        if self.currency in need:
            return need[self.currency]
        flops = spent.get("flops", 0.0)
        pace = spent.get("seconds", 0.0) / flops if flops else 0.0
        seconds = need.get("seconds", need["flops"] * pace)
        if self.currency == "share":
            return self.ledger.budget.share({**need, "seconds": seconds})
        return seconds * _per_second(spent, self.currency)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state: policy, probe and learning-rate history."""
        return {
            "governor": self.governor.state_dict(),
            "probe": self.probe.state_dict() if self.probe is not None else None,
            "peak_rate": self.peak_rate,
            "last_rate": self.last_rate,
            "readings": dict(self.readings),
            **({} if self.drift is None else {"drift": self.drift.state_dict()}),
        }

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Restore, and cut the log back to the decisions up to ``step``."""
        self.governor.load_state_dict(state["governor"])
        if self.probe is not None and state["probe"] is not None:
            self.probe.load_state_dict(state["probe"])
        if self.drift is not None:
            self.drift.load_state_dict(state["drift"])
        self.peak_rate = float(state["peak_rate"])
        self.last_rate = float(state["last_rate"])
        self.readings = {**self.readings, **state.get("readings", {})}
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


def _by_time(seconds: float, spent: Mapping[str, float]) -> dict[str, float]:
    """Energy and money of some seconds, at the run's own rates."""
    return {name: seconds * _per_second(spent, name) for name in ("kwh", "usd") if name in spent}


def _per_second(spent: Mapping[str, float], currency: str) -> float:
    seconds = spent.get("seconds", 0.0)
    return spent.get(currency, 0.0) / seconds if seconds else 0.0


def _inherits(governor: Governor, hook: str) -> bool:
    return getattr(type(governor), hook, None) is getattr(Governor, hook)
