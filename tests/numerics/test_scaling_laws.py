"""Scaling laws against published values, written-out formulas and their own optimality conditions."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_eff.numerics.scaling_laws import (
    CHINCHILLA,
    CHINCHILLA_PUBLISHED,
    REPEATED_DATA,
    effective_params,
    effective_tokens,
    kaplan_loss,
    repeated_data_loss,
    repetition_value,
)

SIZES = st.floats(1e6, 1e12)


@pytest.mark.parametrize(
    ("params", "tokens", "published"),
    [(6.34e9, 242e9, 2.2256440889984477), (8.67e9, 178e9, 2.2269634075087867)],
)
def test_the_authors_check_values_of_the_law_of_repeated_data(params, tokens, published):
    assert repeated_data_loss(params, tokens, 25e9) == pytest.approx(published, rel=1e-15)


def literal_repeated_data(params, tokens, unique):
    """The authors' notebook, line by line."""
    a, b, e, alpha, beta, rd, rn = 6.255414, 7.3049974, 0.6254804, 0.3526596, 0.3526596, 15.387756, 5.309743
    big_a, big_b, big_e = math.exp(a), math.exp(b), math.exp(e)
    g = ((alpha * big_a) / (beta * big_b)) ** (1 / (alpha + beta))
    rep_d = max(tokens / unique - 1, 0)
    un = min(params, (unique * g) ** (beta / alpha) * g)
    rep_n = max(params / un - 1, 0)
    d_prime = min(tokens, unique) + unique * rd * (1 - math.exp(-rep_d / rd))
    n_prime = un + un * rn * (1 - math.exp(-rep_n / rn))
    return big_e + big_a / n_prime**alpha + big_b / d_prime**beta


@given(SIZES, SIZES, SIZES)
def test_repeated_data_loss_is_the_formula(params, tokens, unique):
    expected = literal_repeated_data(params, tokens, unique)
    assert repeated_data_loss(params, tokens, unique) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("epochs", "share", "value"),
    [
        (1, 1.000, 1.000),
        (2, 0.984, 0.937),
        (4, 0.931, 0.823),
        (8, 0.828, 0.635),
        (16, 0.661, 0.377),
        (32, 0.448, 0.133),
        (64, 0.252, 0.017),
    ],
)
def test_table_of_repetition(epochs, share, value):
    assert effective_tokens(epochs * 1e8, 1e8) / (epochs * 1e8) == pytest.approx(share, abs=5e-4)
    assert repetition_value(epochs) == pytest.approx(value, abs=5e-4)


@pytest.mark.parametrize(("epochs", "gain"), [(1, 0.434), (4, 0.060), (16, 0.0067)])
def test_gain_of_an_exaflop_at_135m_parameters_and_1e9_unique_tokens(epochs, gain):
    slope = REPEATED_DATA.slope(effective_tokens(epochs * 1e9, 1e9)) * repetition_value(epochs)
    assert slope / (6 * 135e6) * 1e18 == pytest.approx(gain, rel=0.01)


@given(st.floats(1.0, 100.0))
def test_the_value_of_a_token_is_the_slope_of_effective_tokens(epochs):
    step = 0.01  # wide enough not to cancel, narrow enough for the midpoint rule
    rise = effective_tokens(epochs + step, 1.0) - effective_tokens(epochs, 1.0)
    assert rise / step == pytest.approx(repetition_value(epochs + step / 2), rel=1e-6)


def test_fresh_tokens_are_worth_themselves_and_repeats_are_bounded():
    assert effective_tokens(7.0, 10.0) == 7.0
    assert repetition_value(0.2) == 1.0
    assert effective_tokens(1e9, 1.0) == pytest.approx(1.0 + 15.387756)
    assert effective_tokens(3.0, 1.0, constant=1.0) == pytest.approx(1.0 + 1.0 - math.exp(-2.0))


@given(SIZES, SIZES)
def test_parameters_count_at_most_once(params, unique):
    counted = effective_params(params, unique)
    assert counted <= params * (1 + 1e-12)
    if params <= REPEATED_DATA.params_fed_by(unique):
        assert counted == pytest.approx(params)


@pytest.mark.parametrize(
    ("law", "at_1e21", "at_chinchilla"), [(CHINCHILLA, 21.6, 18.4), (CHINCHILLA_PUBLISHED, 50.1, 92.6)]
)
def test_tokens_a_parameter_at_the_optimum(law, at_1e21, at_chinchilla):
    ratios = [tokens / params for params, tokens in (law.optimum(1e21), law.optimum(5.76e23))]
    assert ratios == pytest.approx([at_1e21, at_chinchilla], abs=0.05)


@given(st.floats(1e18, 1e26), st.floats(0.5, 2.0))
def test_no_other_split_of_the_compute_is_better(flops, factor):
    params, tokens = CHINCHILLA.optimum(flops)
    assert 6 * params * tokens == pytest.approx(flops)
    assert CHINCHILLA.loss(params, tokens) <= CHINCHILLA.loss(params * factor, tokens / factor) + 1e-12
    assert CHINCHILLA.params_fed_by(tokens) == pytest.approx(params, rel=1e-6)


def test_the_slope_is_that_of_the_loss():
    rise = CHINCHILLA.loss(1e9, 1e10) - CHINCHILLA.loss(1e9, 1e10 * (1 + 1e-6))
    assert rise / 1e4 == pytest.approx(CHINCHILLA.slope(1e10), rel=1e-4)


def test_kaplan_has_its_two_limits():
    assert kaplan_loss(1e9, 1e30) == pytest.approx((8.8e13 / 1e9) ** 0.076)
    assert kaplan_loss(1e30, 1e9) == pytest.approx((5.4e13 / 1e9) ** 0.095, rel=1e-6)
