"""The forecast against published numbers, plain bisection and curves that are known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_eff.errors import DataError, OptionError
from hf_eff.loss_forecast import Pilot, Prospect, forecast, probe_spacing
from hf_eff.numerics.payback import PayBack

UNIQUE = 1e6
R = 15.387756


def prospect(**changes):
    return Prospect(**{"params": 1e7, "tokens": 4e6, "unique_tokens": UNIQUE, "token_flops": 6e7, **changes})


def literal_worth(epochs):
    return UNIQUE * (min(epochs, 1.0) + R * (1.0 - math.exp(-max(0.0, epochs - 1.0) / R)))


def true_loss(epochs):
    """L = E + B' D'^-beta."""
    return 1.5 + 60.0 * literal_worth(epochs) ** -0.4


def literal_stop(price):
    """Epochs at which the next token takes ``price`` nats off, by plain bisection."""
    low, high = 1e-3, 1e3
    for _ in range(100):
        middle = (low + high) / 2
        gain = 0.4 * 60.0 * literal_worth(middle) ** -1.4 * math.exp(-max(0.0, middle - 1.0) / R)
        low, high = (middle, high) if gain > price else (low, middle)
    return low


def pilot(until=1.0, noise=0.0, count=20, loss=true_loss):
    epochs = np.geomspace(until / 40, until, count)
    losses = [loss(each) for each in epochs] + noise * np.random.default_rng(0).normal(size=count)
    return Pilot((epochs * UNIQUE).tolist(), losses.tolist(), "pilot.csv")


def price_of_stop(epochs):
    return 0.4 * 60.0 * literal_worth(epochs) ** -1.4 * math.exp(-(epochs - 1.0) / R)


def test_table_and_gains_of_a_135m_model_on_1e9_unique_tokens():
    run = prospect(params=135e6, tokens=64e9, unique_tokens=1e9, token_flops=6 * 135e6)
    rows = {round(point.epochs): point for point in forecast(run).table}
    assert sorted(rows) == [2, 4, 8, 16, 32, 64]
    for epochs, share, value in [(2, 0.984, 0.937), (4, 0.931, 0.823), (32, 0.448, 0.133), (64, 0.252, 0.017)]:
        assert rows[epochs].share == pytest.approx(share, abs=5e-4)
        assert rows[epochs].token_value == pytest.approx(value, abs=5e-4)
    once = forecast(prospect(params=135e6, tokens=1e9, unique_tokens=1e9, token_flops=6 * 135e6))
    gains = [once.table[-1].gain, rows[4].gain, rows[16].gain]
    assert [gain * 1e18 for gain in gains] == pytest.approx([0.434, 0.060, 0.0067], rel=0.01)


@pytest.mark.parametrize(("until", "noise", "tolerance"), [(1.0, 0.0, 0.05), (1.0, 0.003, 0.1), (2.0, 0.01, 0.15)])
def test_a_known_curve_gives_back_where_the_price_ends_the_run(until, noise, tolerance):
    price = price_of_stop(3.0)
    assert literal_stop(price) == pytest.approx(3.0)
    found = forecast(prospect(price=price, pilot=pilot(until, noise)))
    assert found.price_epochs == pytest.approx(3.0, rel=tolerance)
    assert found.price_range[0] <= found.price_epochs <= found.price_range[1]
    assert found.price_range[0] < 3.1
    assert found.price_range[1] > 2.9
    assert found.price_loss == pytest.approx(true_loss(3.0), abs=0.03)
    assert (found.ended_by, found.end.epochs) == ("price", found.price_epochs)


def test_the_predicted_loss_and_the_next_epoch_are_those_of_the_curve():
    found = forecast(prospect(pilot=pilot(2.0)))
    assert (found.ended_by, found.end.epochs) == ("budget", 4.0)
    assert found.end.loss == pytest.approx(true_loss(4.0), abs=0.01)
    assert found.end.sd < 0.05
    assert found.next_epoch_gain == pytest.approx(true_loss(4.0) - true_loss(5.0), rel=0.1)
    assert found.price_epochs is None
    assert not found.shape_only
    assert found.exponent == pytest.approx(0.4, abs=0.05)


@given(st.floats(1e-12, 1e-4), st.floats(1e4, 1e9))
@settings(max_examples=40, deadline=None)
def test_at_the_stop_the_next_token_is_worth_its_price(price, tokens):
    run = prospect(price=price, tokens=tokens)
    found = forecast(run)
    assert found.end.epochs == pytest.approx(min(run.epochs, found.price_epochs))
    at = found.price_epochs
    if at > 0:
        slope = 0.3526596 * math.exp(7.3049974) * literal_worth(at) ** -1.3526596
        assert slope * math.exp(-max(0.0, at - 1.0) / R) == pytest.approx(price, rel=1e-5)


def test_without_a_pilot_only_the_shape_is_told():
    found = forecast(prospect())
    assert found.shape_only
    assert found.end.sd is None
    assert "shape only" in str(found)
    assert any("no pilot" in note for note in found.warnings)
    assert any("can make the held-out loss rise" in note for note in found.warnings)
    once = forecast(prospect(tokens=5e5))
    assert not any("rise" in note for note in once.warnings)


def u_curve(epochs):
    return true_loss(epochs) + 0.05 * max(0.0, epochs - 3.0) ** 2


def test_a_pilot_that_rises_ends_the_run_at_its_bottom():
    epochs = np.linspace(0.25, 8.0, 32)
    rising = Pilot((epochs * UNIQUE).tolist(), [u_curve(each) for each in epochs])
    found = forecast(prospect(tokens=2e7, pilot=rising))
    assert found.bottom_epochs == pytest.approx(epochs[np.argmin(rising.losses)], abs=0.3)
    assert (found.ended_by, found.end.epochs) == ("bottom", found.bottom_epochs)
    assert found.end.loss == pytest.approx(u_curve(found.bottom_epochs), abs=0.05)
    assert any("rises after epoch" in note for note in found.warnings)


def test_a_pilot_that_only_rises_is_refused():
    epochs = np.linspace(0.25, 8.0, 32)
    worse = Pilot((epochs * UNIQUE).tolist(), (1.0 + epochs).tolist())
    with pytest.raises(DataError, match="rises from its point 1 on"):
        forecast(prospect(pilot=worse))
    with pytest.raises(DataError, match="3 points; a pilot needs 6"):
        forecast(prospect(pilot=pilot(count=3)))


def test_far_extrapolation_and_unseen_repeats_are_told():
    notes = forecast(prospect(tokens=2e7, pilot=pilot(1.0))).warnings
    assert any("the pilot ends at epoch 1 and the forecast goes on to 20" in note for note in notes)
    assert any("saw hardly any row twice" in note for note in notes)
    assert forecast(prospect(pilot=pilot(3.0))).warnings == ()


def test_selection_breaks_even_refreshes_and_widens():
    payback = PayBack(selection_flops=1e12, training_flops=2.4e14, speedup=2.0)
    found = forecast(prospect(payback=payback, tokens=2e7))
    assert found.break_even_flops == pytest.approx(1e12 / (1 - 1 / 2.0))
    assert found.widen_epochs == pytest.approx(1 + R * math.log(2.0))
    assert any("rows that were left out teach more" in note for note in found.warnings)
    budget, u, c = 2e7 * 6e7, 1.0, 1e12
    h, age = 0.2 * budget, found.refresh_flops
    average = (age + u * h * (1 - math.exp(-age / h))) / (age + c)
    assert 1 + u * math.exp(-age / h) == pytest.approx(average, rel=1e-6)


def test_selection_that_teaches_nothing_never_pays_and_none_is_not_priced():
    useless = forecast(prospect(payback=PayBack(1e12, 2.4e14, 1.0)))
    assert (useless.break_even_flops, useless.refresh_flops, useless.widen_epochs) == (math.inf, math.inf, None)
    assert useless.to_dict()["break_even_flops"] is None
    assert "selecting   pays never" in str(useless)
    free = forecast(prospect(payback=PayBack(0.0, 2.4e14, 1.5)))
    assert (free.break_even_flops, free.refresh_flops) == (0.0, None)
    none = forecast(prospect())
    assert (none.break_even_flops, none.refresh_flops, none.widen_epochs) == (None, None, None)


@given(st.floats(1e3, 1e12), st.floats(1.0, 1e5))
@settings(max_examples=50, deadline=None)
def test_probes_are_rare_enough_and_never_closer_than_a_step(probe_flops, step_tokens):
    run = prospect(probe_flops=probe_flops, step_tokens=step_tokens)
    spacing = probe_spacing(run)
    assert spacing.least_flops >= step_tokens * 6e7
    assert spacing.least_flops <= spacing.most_flops
    assert spacing.probes * spacing.least_flops <= 4e6 * 6e7 + spacing.least_flops
    assert spacing.share == pytest.approx(spacing.probes * probe_flops / (4e6 * 6e7))


def test_probes_are_recommended_where_they_are_priced():
    found = forecast(prospect(probe_flops=1e9, step_tokens=1e3))
    assert found.probes.probes > 40
    assert found.probes.share < 0.03
    assert f": {found.probes.probes} probes" in str(found)
    assert forecast(prospect()).probes is None


def test_over_trained_models_and_short_plans_are_told():
    notes = forecast(prospect(pretrained_tokens=2e12, limit="flops", planned_tokens=1e6)).warnings
    assert any("over-trained (200,000 tokens a parameter" in note for note in notes)
    assert any("planned epochs end the run at epoch 1, before the flops limit does at 4" in note for note in notes)
    assert not any("over-trained" in note for note in forecast(prospect()).warnings)


def test_a_price_that_nothing_is_worth_trains_nothing():
    found = forecast(prospect(price=1e3, pilot=pilot()))
    assert found.price_epochs == 0.0
    assert any("nothing should be trained" in note for note in found.warnings)
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_forecast_is_json_and_names_what_it_rests_on():
    run = prospect(price=price_of_stop(3.0), pilot=pilot(), payback=PayBack(1e12, 2e14, 1.5), probe_flops=1e9)
    facts = json.loads(json.dumps(forecast(run).to_dict(), allow_nan=False))
    assert facts["run"]["epochs"] == 4.0
    assert facts["run"]["effective_tokens"] == pytest.approx(literal_worth(4.0))
    assert facts["pilot"]["losses"] == list(run.pilot.losses)
    assert facts["source"] == "pilot.csv"
    assert len(facts["curve"]) > 30
    assert facts["comparison"]["chinchilla_loss"] == pytest.approx(
        1.8172 + 482.01 / 1e7**0.3478 + 2085.43 / 4e6**0.3658
    )
    assert facts["probes"]["probes"] > 0


@pytest.mark.parametrize("name", ["params", "tokens", "unique_tokens", "token_flops", "price"])
@pytest.mark.parametrize("amount", [0.0, -1.0, math.inf, math.nan])
def test_amounts_that_make_no_sense_are_refused(name, amount):
    with pytest.raises(OptionError, match=f"{name} must be above zero and finite"):
        prospect(**{name: amount})
