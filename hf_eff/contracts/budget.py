"""Limits of a run and the rule that keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hf_eff.errors import OptionError
from hf_eff.units import CURRENCIES, format_amount, parse_quantity

DETERMINISTIC = ("flops", "tokens", "steps")
"""Currencies whose next unit is known before it is spent, so that a limit is never passed."""


@dataclass(frozen=True)
class Budget:
    """Upper limits by currency; an absent currency is unlimited.

    Attributes:
        limits: Amounts in base units: FLOPs, tokens (padding included), optimizer steps, seconds,
            peak bytes, kWh, USD.
    """

    limits: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check currencies and amounts.

        Raises:
            OptionError: A currency is unknown or an amount is not above zero.
        """
        for currency, amount in self.limits.items():
            if currency not in CURRENCIES:
                raise OptionError(f"budget currency {currency!r} is unknown; use one of {list(CURRENCIES)}.")
            if not amount > 0:
                raise OptionError(f"budget for {currency} must be above zero, got {amount!r}.")

    @classmethod
    def parse(cls, text: str | Mapping[str, float] | Budget | None) -> Budget:
        """Read ``"2h, 3e15flop, 22GiB"``. Of two limits in one currency the lower one binds.

        Raises:
            OptionError: A part is no amount with a known unit.

        >>> Budget.parse("2h, 3e15flop").limits["seconds"]
        7200.0
        """
        if isinstance(text, Budget):
            return text
        if isinstance(text, Mapping):
            return cls(dict(text))
        limits: dict[str, float] = {}
        for part in (text or "").split(","):
            if part.strip():
                currency, amount = parse_quantity(part)
                limits[currency] = min(amount, limits.get(currency, amount))
        if text is not None and text.strip() and not limits:
            raise OptionError(f"budget={text!r} names no limit.")
        return cls(limits)

    def __bool__(self) -> bool:
        """Whether anything is limited."""
        return bool(self.limits)

    def __str__(self) -> str:
        """The limits as people write them."""
        return ", ".join(format_amount(currency, amount) for currency, amount in self.limits.items())

    def share(self, spent: Mapping[str, float]) -> float:
        """Spent part of the scarcest additive currency, in [0, 1]; 0 without one."""
        shares = [spent.get(currency, 0.0) / limit for currency, limit in self.limits.items() if currency != "bytes"]
        return min(1.0, max(shares, default=0.0))

    def shares(self, spent: Mapping[str, float]) -> dict[str, float]:
        """Spent part of each limit whose currency is among ``spent``; above 1 where a limit was passed.

        >>> Budget.parse("2h, 100steps").shares({"seconds": 3600.0, "steps": 20.0})
        {'seconds': 0.5, 'steps': 0.2}
        """
        return {currency: spent[currency] / limit for currency, limit in self.limits.items() if currency in spent}

    def binding(self, spent: Mapping[str, float]) -> str | None:
        """The additive currency with the largest share, the first of several; None without one.

        >>> Budget.parse("2h, 100steps, 8GiB").binding({"seconds": 3600.0, "steps": 60.0, "bytes": 8e9})
        'steps'
        """
        shares = {currency: spent.get(currency, 0.0) / limit for currency, limit in self.limits.items()}
        shares.pop("bytes", None)
        return max(shares, key=lambda currency: shares[currency], default=None)

    def first_passed(self, spent: Mapping[str, float], need: Mapping[str, float]) -> str | None:
        """The currency that spending ``need`` on top of ``spent`` would pass, or None."""
        for currency, limit in self.limits.items():
            if currency == "bytes":
                total = max(spent.get(currency, 0.0), need.get(currency, 0.0))
            else:
                total = spent.get(currency, 0.0) + need.get(currency, 0.0)
            if total > limit:
                return currency
        return None
