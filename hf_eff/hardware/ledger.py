"""What a run has spent, by currency and by purpose, and whether the next unit of work still fits its budget."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

from hf_eff.contracts.budget import Budget
from hf_eff.errors import BudgetExceededError, CheckpointError, OptionError
from hf_eff.hardware.energy import ESTIMATED, UNAVAILABLE, EnergyMeter
from hf_eff.hardware.estimated_power import EstimatedPower
from hf_eff.hardware.probe import PeakMemory
from hf_eff.units import format_amount

Purpose = Literal["train", "probe", "select", "save", "eval"]
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)
COUNTED = ("flops", "tokens", "useful_tokens", "loss_tokens", "steps")
"""What ``charge`` takes. ``tokens`` includes padding; it is the one that a token budget limits."""
_SPENT = ("flops", "tokens", "steps")


class Ledger:
    """Amounts spent since the first step of a run, resumes included.

    Seconds are those inside ``clock``; energy is read from counters, or estimated from a wattage where there are none
    (``energy_source`` says so), and money is seconds times a price. Energy and money are absent from ``spent()`` where
    they are unknown. Peak bytes are the process's (on a CPU) or the allocator's (on an accelerator) since the ledger
    was made.
    """

    def __init__(
        self,
        budget: Budget | None = None,
        price_per_hour: float | None = None,
        *,
        power_watts: float | None = None,
        energy: EnergyMeter | None = None,
        memory: PeakMemory | None = None,
    ) -> None:
        """Open an empty ledger.

        Args:
            budget: Limits; None or empty for none.
            price_per_hour: USD per hour of the machine, or None when unknown.
            power_watts: The machine's power at full load, to estimate energy from where nothing counts it; None for no
                estimate.
            energy: Meter to read; None for one that finds its own counter.
            memory: Window to read the peak from; None for a new one that opens now.
        """
        self.budget = budget or Budget()
        self.price_per_hour = price_per_hour
        self._counts = {purpose: dict.fromkeys(COUNTED, 0.0) for purpose in PURPOSES}
        # Totals are added up charge by charge, as ``require`` adds, so that rounding cannot pass a limit.
        self._totals = dict.fromkeys(COUNTED, 0.0)
        self._seconds = dict.fromkeys(PURPOSES, 0.0)
        self._running: list[Purpose] = []
        self._mark = 0.0
        self._earlier_kwh: float | None = 0.0
        self._earlier_usd, self._earlier_seconds = 0.0, 0.0
        self._memory = memory or PeakMemory().start()
        estimate = None if power_watts is None else EstimatedPower(power_watts)
        self._energy = energy or EnergyMeter(estimate=estimate)
        self._energy.start()
        self._estimated_before = False

    # -- spending ---------------------------------------------------------------------------------------------------

    def charge(
        self,
        purpose: Purpose,
        *,
        flops: float = 0.0,
        tokens: float = 0.0,
        useful_tokens: float = 0.0,
        loss_tokens: float = 0.0,
        steps: float = 0.0,
    ) -> None:
        """Add what was spent.

        Args:
            purpose: One of ``PURPOSES``.
            flops: Floating-point operations.
            tokens: Tokens paid for, padding included.
            useful_tokens: Tokens without padding.
            loss_tokens: Tokens that carried loss.
            steps: Optimizer steps.

        Raises:
            OptionError: The purpose is unknown, or an amount is negative or not finite.
        """
        _check_purpose(purpose)
        amounts = zip(COUNTED, (flops, tokens, useful_tokens, loss_tokens, steps), strict=True)
        for name, amount in amounts:
            if not 0.0 <= amount < math.inf:
                raise OptionError(f"A charge of {amount!r} {name} is not possible; amounts are finite and >= 0.")
            self._counts[purpose][name] += amount
            self._totals[name] += amount

    @contextmanager
    def clock(self, purpose: Purpose) -> Iterator[None]:
        """Charge the seconds of the ``with`` block to a purpose. An inner clock takes its time from the outer one.

        Raises:
            OptionError: The purpose is unknown.
        """
        _check_purpose(purpose)
        self._settle()
        depth = len(self._running)
        self._running.append(purpose)
        try:
            yield
        finally:
            self._settle()
            del self._running[depth:]

    def _settle(self) -> None:
        """Book the time since the last mark on the innermost clock."""
        now = time.perf_counter()
        if self._running:
            self._seconds[self._running[-1]] += now - self._mark
        self._mark = now

    # -- reading ----------------------------------------------------------------------------------------------------

    def spent(self) -> dict[str, float]:
        """Amounts by currency, as far as they are known: FLOPs, tokens, steps, seconds, peak bytes, kWh, USD."""
        return {**self._additive(), "bytes": float(self._memory.peak())}

    def by_purpose(self) -> dict[str, dict[str, float]]:
        """What each purpose took: the keys of ``COUNTED`` and ``seconds``."""
        self._settle()
        return {purpose: {**self._counts[purpose], "seconds": self._seconds[purpose]} for purpose in PURPOSES}

    def share(self) -> float:
        """Spent part of the scarcest limit, in [0, 1]; 0 without one."""
        return self.budget.share(self._additive())

    def shares(self) -> dict[str, float]:
        """Spent part of each limit that can be read, in the order of the budget; memory by its peak."""
        return self.budget.shares(self.spent())

    def binding(self) -> str | None:
        """The currency whose limit is the closest to being reached, peak memory aside; None without a limit."""
        return self.budget.binding(self._additive())

    @property
    def energy_source(self) -> str:
        """Where ``kwh`` comes from: a counter's name, ``"estimated"`` if any part of it is, or ``"unavailable"``."""
        if self._earlier_kwh is None:
            return UNAVAILABLE
        known = self._energy.source != UNAVAILABLE
        return ESTIMATED if known and self._estimated_before else self._energy.source

    def _additive(self) -> dict[str, float]:
        """Amounts that add up over time; cheaper than ``spent``, which asks the system for the peak."""
        self._settle()
        seconds = math.fsum(self._seconds.values())
        amounts = {name: self._totals[name] for name in _SPENT}
        amounts["seconds"] = seconds
        kwh = self._energy.kwh() if self._earlier_kwh is not None else None
        if kwh is not None and self._earlier_kwh is not None:
            amounts["kwh"] = self._earlier_kwh + kwh
        if self.price_per_hour is not None:
            hours = (seconds - self._earlier_seconds) / 3600.0
            amounts["usd"] = self._earlier_usd + hours * self.price_per_hour
        return amounts

    # -- the budget -------------------------------------------------------------------------------------------------

    def need_fits(self, need: Mapping[str, float]) -> str | None:
        """The currency whose limit spending ``need`` would pass, or None when all of it fits.

        A limit on energy that can no longer be read counts as passed: it could not be kept.

        Args:
            need: Amounts by currency. ``seconds`` also counts as money at the ledger's price.
        """
        if not self.budget:
            return None
        spent = self.spent() if "bytes" in self.budget.limits else self._additive()
        if "kwh" in self.budget.limits and "kwh" not in spent:
            return "kwh"
        if self.price_per_hour is not None and "seconds" in need and "usd" not in need:
            need = {**need, "usd": need["seconds"] / 3600.0 * self.price_per_hour}
        return self.budget.first_passed(spent, need)

    def require(self, need: Mapping[str, float], what: str) -> None:
        """Refuse work that does not fit. Nothing is charged.

        Args:
            need: Amounts by currency.
            what: The work, as the subject of a sentence: ``"optimizer step 12"``.

        Raises:
            BudgetExceededError: A limit would be passed.
        """
        currency = self.need_fits(need)
        if currency is None:
            return
        limit, spent = self.budget.limits[currency], self.spent().get(currency, 0.0)
        raise BudgetExceededError(
            f"{what} needs {format_amount(currency, need.get(currency, 0.0))}, but {format_amount(currency, spent)} "
            f"of the budget's {format_amount(currency, limit)} is spent; raise budget= or ask for less."
        )

    # -- resuming ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state; floats keep every bit through ``json``."""
        spent = self.spent()
        return {
            "counts": {purpose: dict(counts) for purpose, counts in self._counts.items()},
            "totals": dict(self._totals),
            "seconds": dict(self._seconds),
            "peak_bytes": int(spent["bytes"]),
            "kwh": spent.get("kwh"),
            "energy_source": self.energy_source,
            "usd": spent.get("usd", self._earlier_usd),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state: replaces all amounts; a running clock keeps running from now.

        Raises:
            CheckpointError: The state is incomplete.
        """
        try:
            saved = state["counts"]
            counts = {purpose: {name: float(saved[purpose][name]) for name in COUNTED} for purpose in PURPOSES}
            totals = {name: float(state["totals"][name]) for name in COUNTED}
            seconds = {purpose: float(state["seconds"][purpose]) for purpose in PURPOSES}
            kwh, usd, peak = state["kwh"], float(state["usd"]), int(state["peak_bytes"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the ledger's saved state is incomplete: {error!r}.") from error
        self._counts, self._totals, self._seconds = counts, totals, seconds
        self._earlier_kwh = None if kwh is None else float(kwh)
        self._estimated_before = state.get("energy_source") == ESTIMATED
        self._earlier_usd, self._earlier_seconds = usd, math.fsum(seconds.values())
        self._memory.raise_to(peak)
        self._energy.start()
        self._mark = time.perf_counter()


def _check_purpose(purpose: str) -> None:
    if purpose not in PURPOSES:
        raise OptionError(f"Ledger purpose {purpose!r} does not exist; use one of {list(PURPOSES)}.")
