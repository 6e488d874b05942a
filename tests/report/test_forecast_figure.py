import importlib.util
import re

import numpy as np
import pytest

from hf_eff.errors import MissingDependencyError, OptionError
from hf_eff.loss_forecast import Pilot, Prospect, forecast
from hf_eff.report.forecast_figure import draw_forecast

pytest.importorskip("matplotlib")


def facts(**changes):
    tokens = np.geomspace(2e4, 1e6, 12)
    pilot = Pilot(tokens.tolist(), (1.5 + 60 * tokens**-0.4).tolist(), "pilot.csv")
    run = {"params": 1e7, "tokens": 4e6, "unique_tokens": 1e6, "token_flops": 6e7, "price": 3e-8, "pilot": pilot}
    return forecast(Prospect(**{**run, **changes})).to_dict()


def line(text, colour):
    """Points in pixels of the first path that is drawn as a line of a colour."""
    for points, style in re.findall(r'<path d="(M [^"]+)" clip-path[^>]+style="([^"]+)"', text):
        if f"stroke: {colour}" in style:
            numbers = [float(number) for number in re.findall(r"-?\d+\.?\d*", points)]
            return np.array(numbers).reshape(-1, 2)
    return None


def test_the_price_touches_the_loss_where_it_ends_the_run(tmp_path):
    found = facts()
    text = draw_forecast(found, tmp_path / "new" / "out.svg").read_text()
    for word in ("pilot", "predicted loss", "one standard deviation", "budget, 4", "price", "epochs"):
        assert f">{word}" in text
    assert f"beyond {found['price_epochs']:.3g}" in text
    loss, price = line(text, "#2f6fde"), line(text, "#e08a2e")
    # In pixels, y points down: the loss is never below its tangent, and meets it at e*.
    tangent = np.interp(loss[:, 0], *price.T)
    above = tangent - loss[:, 1]
    assert above.min() > -0.5
    at = found["price_epochs"] / found["curve"][-1]["epochs"]
    touch = price[0, 0] + at * (price[1, 0] - price[0, 0])
    assert loss[np.argmin(above), 0] == pytest.approx(touch, abs=0.05 * (price[1, 0] - price[0, 0]))


def test_without_pilot_and_price_there_is_neither_band_nor_tangent(tmp_path):
    text = draw_forecast(facts(pilot=None, price=None), tmp_path / "out.svg").read_text()
    assert "shape only" in text
    assert "up to a constant" in text
    for word in (">pilot", ">price", ">one standard deviation"):
        assert word not in text


def test_the_bottom_of_a_pilot_is_marked_and_a_far_price_is_not(tmp_path):
    epochs = np.linspace(0.25, 8.0, 32)
    losses = 1.5 + 1.0 / epochs + 0.05 * np.maximum(0.0, epochs - 3.0) ** 2
    rising = Pilot((epochs * 1e6).tolist(), losses.tolist())
    found = facts(pilot=rising, price=1e-12)
    text = draw_forecast(found, tmp_path / "out.svg").read_text()
    assert f">lowest of the pilot, {found['bottom_epochs']:.3g}" in text
    assert ">price" not in text


def test_equal_forecasts_give_equal_files(tmp_path):
    first, second = (draw_forecast(facts(), tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
    assert first == second


@pytest.mark.parametrize(("name", "head"), [("out.png", b"\x89PNG"), ("out.pdf", b"%PDF")])
def test_other_formats(tmp_path, name, head):
    assert draw_forecast(facts(), tmp_path / name).read_bytes().startswith(head)


def test_what_cannot_be_drawn_is_told(tmp_path, monkeypatch):
    with pytest.raises(OptionError, match="must end in one of"):
        draw_forecast(facts(), tmp_path / "out.bmp")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="matplotlib"):
        draw_forecast(facts(), tmp_path / "out.png")
    assert not list(tmp_path.iterdir())
