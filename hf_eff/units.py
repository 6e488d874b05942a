"""Quantities with units: parsing what people type and printing what machines count."""

from __future__ import annotations

import re

from hf_eff.errors import OptionError

_PREFIX = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_BINARY = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_DECIMAL_BYTES = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_SECONDS = {"s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_JOULES_PER_KWH = 3.6e6
_NUMBER = re.compile(r"^\s*([0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?|\.[0-9]+)\s*([A-Za-z]+)\s*$")

CURRENCIES = ("flops", "tokens", "steps", "seconds", "bytes", "kwh", "usd")


def _unit_table() -> dict[str, tuple[str, float]]:
    table: dict[str, tuple[str, float]] = {"usd": ("usd", 1.0), "USD": ("usd", 1.0)}
    for prefix, factor in _PREFIX.items():
        for word in ("flop", "flops", "FLOP", "FLOPs"):
            table[prefix + word] = ("flops", factor)
        for word in ("tok", "tokens", "token"):
            table[prefix + word] = ("tokens", factor)
    for word in ("step", "steps"):
        table[word] = ("steps", 1.0)
    for word, seconds in _SECONDS.items():
        table[word] = ("seconds", seconds)
    for word, size in {**_BINARY, **_DECIMAL_BYTES}.items():
        table[word] = ("bytes", float(size))
    for word, kwh in {"Wh": 1e-3, "kWh": 1.0, "kwh": 1.0, "MWh": 1e3}.items():
        table[word] = ("kwh", kwh)
    for prefix in ("", "k", "M", "G"):
        table[prefix + "J"] = ("kwh", _PREFIX[prefix] / _JOULES_PER_KWH)
    return table


_UNITS = _unit_table()


def parse_quantity(text: str) -> tuple[str, float]:
    """Split ``"2h"`` into a currency and an amount in its base unit.

    Args:
        text: A number and a unit, such as ``"3e15flop"``, ``"20Mtok"``, ``"22GiB"`` or ``"4usd"``.

    Returns:
        One of ``CURRENCIES`` and the amount (FLOPs, tokens, steps, seconds, bytes, kWh, USD).

    Raises:
        OptionError: The text is no number with a known unit, or the number is not above zero.

    >>> parse_quantity("2h")
    ('seconds', 7200.0)
    >>> parse_quantity("20Mtok")
    ('tokens', 20000000.0)
    """
    match = _NUMBER.match(text)
    if match is None or match.group(2) not in _UNITS:
        raise OptionError(
            f"budget={text.strip()!r} is not an amount with a unit. Write a number and one of "
            "h, min, s, flop (also Tflop, Pflop), tok (ktok, Mtok), steps, MiB, GiB, kWh, J, usd; "
            "for example '2h, 3e15flop'."
        )
    currency, factor = _UNITS[match.group(2)]
    amount = float(match.group(1)) * factor
    if not amount > 0 or amount == float("inf"):
        raise OptionError(f"budget={text.strip()!r} must be above zero and finite.")
    return currency, amount


def format_amount(currency: str, amount: float) -> str:
    """Print an amount the way people read it.

    >>> format_amount("bytes", 3 * 2**30)
    '3.00 GiB'
    >>> format_amount("flops", 1.5e12)
    '1.50 TFLOP'
    """
    if currency == "bytes":
        return format_bytes(amount)
    if currency == "seconds":
        return format_seconds(amount)
    plain = {"kwh": _format_energy(amount), "usd": f"{amount:.4g} USD", "steps": f"{amount:.0f} steps"}
    if currency in plain:
        return plain[currency]
    word = {"flops": "FLOP", "tokens": "tok"}[currency]
    for prefix in ("E", "P", "T", "G", "M", "k"):
        if amount >= _PREFIX[prefix]:
            return f"{amount / _PREFIX[prefix]:.2f} {prefix}{word}"
    return f"{amount:.0f} {word}"


def _format_energy(kwh: float) -> str:
    """Joules where kilowatt hours would be all zeros."""
    return f"{kwh:.4g} kWh" if kwh == 0 or kwh >= 1e-3 else f"{kwh * _JOULES_PER_KWH:.4g} J"


def format_bytes(amount: float) -> str:
    """Print bytes in binary units.

    >>> format_bytes(1536)
    '1.50 KiB'
    """
    for name in ("TiB", "GiB", "MiB", "KiB"):
        if abs(amount) >= _BINARY[name]:
            return f"{amount / _BINARY[name]:.2f} {name}"
    return f"{amount:.0f} B"


def format_seconds(amount: float) -> str:
    """Print a duration.

    >>> format_seconds(3725)
    '1h 02m 05s'
    >>> format_seconds(1.5)
    '1.5s'
    """
    if amount < 60:
        return f"{amount:.1f}s"
    minutes, seconds = divmod(round(amount), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m {seconds:02d}s" if hours else f"{minutes}m {seconds:02d}s"
