"""Amounts with units: what people type, what machines print."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_eff.errors import OptionError
from hf_eff.units import CURRENCIES, format_amount, format_bytes, format_seconds, parse_quantity

READINGS = {
    "2h": ("seconds", 7200.0),
    "90 min": ("seconds", 5400.0),
    "1d": ("seconds", 86400.0),
    "1.5s": ("seconds", 1.5),
    ".5h": ("seconds", 1800.0),
    "3e15flop": ("flops", 3e15),
    "2Tflop": ("flops", 2e12),
    "1.5PFLOPs": ("flops", 1.5e15),
    "20Mtok": ("tokens", 2e7),
    "7 tokens": ("tokens", 7.0),
    "3ktok": ("tokens", 3e3),
    "100steps": ("steps", 100.0),
    "22GiB": ("bytes", 22 * 2.0**30),
    "22GB": ("bytes", 22e9),
    "512MiB": ("bytes", 512 * 2.0**20),
    "0.5kWh": ("kwh", 0.5),
    "500Wh": ("kwh", 0.5),
    "3.6e6J": ("kwh", 1.0),
    "3e6 J": ("kwh", 3e6 / 3.6e6),
    "3600kJ": ("kwh", 1.0),
    "7.2MJ": ("kwh", 2.0),
    "1MWh": ("kwh", 1000.0),
    "4usd": ("usd", 4.0),
    "4.20USD": ("usd", 4.2),
}


@pytest.mark.parametrize(("text", "expected"), READINGS.items())
def test_reads(text, expected):
    currency, amount = parse_quantity(text)
    assert currency == expected[0]
    assert amount == pytest.approx(expected[1], rel=1e-12)


@pytest.mark.parametrize("text", ["", "2", "h", "2 hours ago", "2x", "-2h", "0h", "1e999flop", "nanh", "2h3", "2,5h"])
def test_refuses(text):
    with pytest.raises(OptionError, match="budget="):
        parse_quantity(text)


def test_error_names_what_was_given_and_what_is_allowed():
    with pytest.raises(OptionError) as caught:
        parse_quantity("3 euros")
    assert "'3 euros'" in str(caught.value)
    assert "flop" in str(caught.value)


@given(st.sampled_from(["h", "s", "flop", "Mtok", "GiB", "kWh", "usd", "steps"]), st.floats(1e-6, 1e12))
def test_reading_is_linear(unit, amount):
    one, many = parse_quantity(f"1{unit}"), parse_quantity(f"{amount!r}{unit}")
    assert one[0] == many[0]
    assert many[1] == pytest.approx(amount * one[1], rel=1e-12)


@pytest.mark.parametrize(
    ("currency", "amount", "text"),
    [
        ("seconds", 7200, "2h 00m 00s"),
        ("seconds", 59.94, "59.9s"),
        ("seconds", 61, "1m 01s"),
        ("flops", 3e15, "3.00 PFLOP"),
        ("flops", 12, "12 FLOP"),
        ("tokens", 2e7, "20.00 Mtok"),
        ("bytes", 22 * 2**30, "22.00 GiB"),
        ("kwh", 0.5, "0.5 kWh"),
        ("kwh", 1e-5, "36 J"),
        ("kwh", 0.0, "0 kWh"),
        ("usd", 4, "4 USD"),
        ("steps", 100, "100 steps"),
    ],
)
def test_prints(currency, amount, text):
    assert format_amount(currency, amount) == text


@given(st.sampled_from(CURRENCIES), st.floats(0, 1e18))
def test_printing_never_fails(currency, amount):
    assert any(letter.isdigit() for letter in format_amount(currency, amount))


@given(st.floats(1, 1e15))
def test_printed_bytes_keep_three_digits(amount):
    number, unit = format_bytes(amount).split()
    scale = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}[unit]
    assert float(number) * scale == pytest.approx(amount, rel=6e-3, abs=0.51)


@given(st.floats(60, 1e6))
def test_printed_seconds_keep_the_second(amount):
    parts = dict.fromkeys("hms", 0)
    for part in format_seconds(amount).split():
        parts[part[-1]] = int(part[:-1])
    assert math.isclose(3600 * parts["h"] + 60 * parts["m"] + parts["s"], amount, abs_tol=0.51)
