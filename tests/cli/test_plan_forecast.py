"""``hf-eff plan`` end to end: a pilot in, the epochs at which a price ends the run out."""

from __future__ import annotations

import argparse
import json
import math

import numpy as np
import pytest

from hf_eff.cli import loss_plan, main, pay_back
from hf_eff.cli.loss_plan import affordable_tokens, parse_forecast, parse_price, token_cost
from hf_eff.contracts.cost import BlockFacts, Facts, HardwareFacts, ModelFacts, PoolFacts, RunFacts
from hf_eff.contracts.governor import Decision, ProbeReading, Telemetry
from hf_eff.engines.decision_log import GovernorLog
from hf_eff.errors import OptionError
from hf_eff.numerics.payback import PayBack
from hf_eff.options import EffOptions
from hf_eff.plan import make_plan

UNIQUE = 2e6
R = 15.387756


def literal_worth(tokens):
    repeats = max(0.0, tokens / UNIQUE - 1.0)
    return min(tokens, UNIQUE) + UNIQUE * R * (1.0 - math.exp(-repeats / R))


def literal_loss(tokens):
    """L = E + B' D'^-beta with E = 1.2, B' = 90 and beta = 0.42."""
    return 1.2 + 90.0 * literal_worth(tokens) ** -0.42


def literal_stop(price):
    """Epochs at which one more token takes ``price`` nats off, by plain bisection."""
    low, high = 1e-3, 1e3
    for _ in range(100):
        middle = (low + high) / 2
        gain = 0.42 * 90.0 * literal_worth(middle * UNIQUE) ** -1.42 * math.exp(-max(0.0, middle - 1.0) / R)
        low, high = (middle, high) if gain > price else (low, middle)
    return low


def pilot_csv(path, clock, unit, noise=0.0):
    tokens = np.geomspace(0.03, 1.2, 20) * UNIQUE
    errors = noise * np.random.default_rng(1).normal(size=20)
    rows = [
        f"{float(each * unit)},{float(literal_loss(each) + error)}" for each, error in zip(tokens, errors, strict=True)
    ]
    path.write_text("\n".join([f"{clock},loss", *rows]))
    return path


@pytest.fixture(scope="module")
def toy(material):
    return ["plan", "--model", str(material / "model"), "--task", "trainer", "--max_tokens", "64"]


def answer(words, capsys):
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_pilot_of_a_known_curve_gives_back_where_the_price_ends_the_run(toy, tmp_path, capsys):
    expected = literal_stop(8e-9)
    assert 2.5 < expected < 3.5  # far beyond the pilot, which ends at 1.2
    run = [*toy, "--unique_tokens", "2Mtok", "--budget", "40Mtok"]
    by_tokens = pilot_csv(tmp_path / "tokens.csv", "tokens", 1.0, noise=0.002)
    figure = tmp_path / "forecast.svg"
    found = answer([*run, "--pilot", str(by_tokens), "--price", "0.008/1Mtok", "--figure", str(figure)], capsys)
    forecast = found["loss_forecast"]
    assert found["format"] == "hf_eff.plan"
    assert forecast["price_epochs"] == pytest.approx(expected, rel=0.1)
    assert forecast["price_range"][0] < expected < forecast["price_range"][1]
    assert forecast["run"]["epochs"] == pytest.approx(20.0)
    assert forecast["ended_by"] == "price"
    assert ">price" in figure.read_text()

    # The same pilot by FLOPs, and the same price as one per FLOP.
    flops = forecast["run"]["token_flops"]
    by_compute = pilot_csv(tmp_path / "compute.csv", "compute", flops, noise=0.002)
    price = f"{8e-9 * 1e12 / flops}/1Tflop"
    other = answer([*run, "--pilot", str(by_compute), "--price", price], capsys)["loss_forecast"]
    assert other["price_epochs"] == pytest.approx(forecast["price_epochs"], rel=1e-6)


def test_the_log_of_a_governed_run_gives_curve_and_speed(toy, tmp_path, capsys):
    log = GovernorLog(tmp_path / "governor.jsonl")
    log.start({"predicted": {"step_tokens": 1e5}})
    for step in range(1, 21):
        spent = {"flops": 1e9 * step, "seconds": 0.5 * step}
        probe = ProbeReading(literal_loss(1e5 * step), None, None, 16)
        seen = Telemetry(step, 20, spent, {}, compute=1e9 * step, compute_limit=2e10, probe=probe)
        log.append(seen, Decision("continue", "test"))
    words = [*toy, "--unique_tokens", "2Mtok", "--budget", "1h", "--pilot", str(log.path), "--price", "0.008/1Mtok"]
    found = answer(words, capsys)
    forecast = found["loss_forecast"]
    assert forecast["run"]["tokens"] == pytest.approx(3600 * 2e9 / forecast["run"]["token_flops"])
    assert forecast["price_epochs"] == pytest.approx(literal_stop(8e-9), rel=0.1)
    assert forecast["source"] == "governor.jsonl"
    assert found["predicted"]["seconds"] is not None


def test_the_forecast_stands_under_the_plan(named, tmp_path, capsys):
    assert main(["plan", *named, "--selection", "random", "--budget", "1Tflop"]) == 0
    text = capsys.readouterr().out
    for words in (
        "selection   random",
        "peak",
        "loss from   shape only",
        "D'/D",
        "ends by     budget",
        "note: no pilot",
    ):
        assert words in text
    assert text.index("peak") < text.index("loss from")


def test_the_planned_epochs_are_forecast_without_a_budget(named, capsys):
    found = answer(["plan", *named, "--num_train_epochs", "2"], capsys)
    forecast = found["loss_forecast"]
    assert forecast["run"]["limit"] is None
    assert forecast["run"]["epochs"] == pytest.approx(2.0)
    facts = found["facts"]
    lengths, rows = facts["pool"]["length_quantiles"], facts["run"]["batch_size"]
    longest = np.random.default_rng(0).choice(lengths, size=(100_000, rows)).max(axis=1)  # rows are padded to it
    assert longest.mean() > 1.05 * facts["pool"]["mean_tokens"]
    assert forecast["run"]["unique_tokens"] == pytest.approx(24 * longest.mean(), rel=0.01)
    assert forecast["probes"]["probes"] > 0


def test_wrong_flags_are_one_sentence_before_anything_is_read(toy, tmp_path, capsys):
    bad = tmp_path / "bad.csv"
    bad.write_text("steps,loss\n1,2\n")
    for words, sentence in [
        (["--unique_tokens", "2Mtok", "--pilot", str(bad)], "no column 'tokens' or 'compute'"),
        (["--unique_tokens", "2h"], "unique_tokens='2h' must be a number above zero"),
        (["--unique_tokens", "2Mtok", "--price", "cheap"], "price='cheap' must be nats above zero"),
        (["--unique_tokens", "2Mtok", "--figure", "out.bmp"], "must end in one of"),
        ([], "dataset"),
    ]:
        assert main([*toy, *words]) == 2
        errors = capsys.readouterr().err
        assert sentence in errors
        assert len(errors.splitlines()) == 1


def test_help_names_the_flags_of_the_forecast(capsys):
    assert main(["plan", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in ("pilot", "price", "unique_tokens", "pretrained_tokens", "dataset"))


# what a plan says of the run, without a model


def plan_of(budget=None, speed=None, hourly=None, **run):
    block = BlockFacts(params=1200, matmul_params=1000, attention_width=8)
    model = ModelFacts(
        architecture="toy",
        params=2000,
        blocks=(block, block),
        head_matmul_params=400,
        embedding_params=400,
        hidden_size=8,
        vocab_size=50,
    )
    facts = Facts(
        model=model,
        pool=PoolFacts(num_rows=1000, mean_tokens=20.0, max_tokens=30),
        hardware=HardwareFacts(flops_per_second=speed),
        run=RunFacts(batch_size=10, epochs=2.0, **run),
    )
    return make_plan(EffOptions(budget=budget, price_per_hour=hourly), facts)


def wishes(**changes):
    empty = dict.fromkeys(("price", "unique_tokens", "flops_per_second", "pretrained_tokens", "pilot", "figure"))
    return argparse.Namespace(**{**empty, **changes})


def test_the_scarcest_limit_decides_how_many_tokens_there_are():
    plan = plan_of("1Mtok")
    flops = plan.step_flops / plan.step_tokens
    assert affordable_tokens(plan) == (1e6, "tokens", [])
    assert affordable_tokens(plan_of())[:2] == (None, None)
    assert affordable_tokens(plan_of("1GiB"))[:2] == (None, None)
    tokens, limit, _ = affordable_tokens(plan_of("1Mtok, 1Gflop"))
    assert (tokens, limit) == (pytest.approx(1e9 / flops), "flops")
    assert affordable_tokens(plan_of("7steps"))[0] == pytest.approx(7 * 200.0)
    timed = affordable_tokens(plan_of("2h", speed=1e6))
    assert timed[0] == pytest.approx(7200 * 1e6 / flops)
    paid = affordable_tokens(plan_of("3usd", speed=1e6, hourly=1.5))
    assert paid[0] == pytest.approx(timed[0])


def test_time_without_a_speed_is_told_and_left_out():
    tokens, limit, notes = affordable_tokens(plan_of("2h, 1Mtok"))
    assert (tokens, limit) == (1e6, "tokens")
    assert "--flops_per_second" in notes[0]


def test_a_token_costs_its_flops_in_every_currency():
    plan = plan_of("3usd", speed=1e6, hourly=1.5)
    flops = plan.step_flops / plan.step_tokens
    costs = {currency: token_cost(plan, currency, 5e5) for currency in ("flops", "tokens", "steps", "seconds", "usd")}
    expected = {
        "flops": flops,
        "tokens": 1.0,
        "steps": 1 / 200,
        "seconds": flops / 1e6,
        "usd": flops / 1e6 * 1.5 / 3600,
    }
    assert costs == pytest.approx(expected)
    assert token_cost(plan, "share", 5e5) == 2e-6
    for currency in ("seconds", "usd", "kwh"):
        with pytest.raises(OptionError, match="flops_per_second"):
            token_cost(plan_of(), currency, 1.0)


def test_the_prospect_is_that_of_the_plan():
    plan = plan_of("1Mtok", max_steps=30)
    found = loss_plan.prospect_of(plan, wishes(price=("tokens", 2e-9), pretrained_tokens=1e9), None)
    assert (found.tokens, found.unique_tokens, found.planned_tokens) == (1e6, 20000.0, 30 * 200.0)
    assert (found.price, found.limit, found.pretrained_tokens) == (2e-9, "tokens", 1e9)
    assert found.token_flops / found.forward_flops == pytest.approx(3.0, rel=0.02)
    assert loss_plan.prospect_of(plan, wishes(unique_tokens=5e4), None).unique_tokens == 5e4
    bare = loss_plan.prospect_of(plan_of("1Mtok"), wishes(price=(None, 2e-9)), None)
    assert bare.price == 2e-9  # per unit of the budget's currency
    assert bare.planned_tokens == 2 * 20000.0


def test_without_held_out_rows_a_probe_is_priced_by_the_pool():
    found = loss_plan.prospect_of(plan_of("1.1Mtok"), wishes(), None)
    # As many rows of 20 tokens as 3 % of the compute pay for in every 1/120 of it.
    row = 20 * found.forward_flops
    rows = int(0.03 / 120 * found.tokens * found.token_flops / row)
    assert 16 < rows < 128
    assert found.probe_flops == pytest.approx(row * rows)


@pytest.mark.parametrize(
    ("text", "expected"), [("0.05/1Pflop", ("flops", 5e-17)), ("1e-3/2h", ("seconds", 1e-3 / 7200)), ("2", (None, 2.0))]
)
def test_prices(text, expected):
    assert parse_price(text) == pytest.approx(expected) if expected[0] is None else parse_price(text)[0] == expected[0]
    assert parse_price(text)[1] == pytest.approx(expected[1])


@pytest.mark.parametrize("text", ["", "/1flop", "0.1/", "0.1/flop", "-1/1flop", "0", "nan", "inf", "1/0flop"])
def test_what_is_no_price(text):
    with pytest.raises(OptionError, match="must be nats above zero per amount"):
        parse_price(text)


def test_a_dry_run_of_select_tells_the_budget_from_which_on_it_pays():
    facts = pay_back._verdict(PayBack(selection_flops=3e12, training_flops=1e12, speedup=2.0))
    assert facts["break_even_flops"] == pytest.approx(6e12)
    lines = pay_back.pay_back_lines({**facts, "selection": ["less"], "rows": 10, "selected_rows": 5, "notes": []})
    assert any("6.00 TFLOP and more" in line for line in lines)
    assert pay_back._verdict(PayBack(3e12, 1e12, 1.0))["break_even_flops"] is None


def test_flags_of_the_forecast_are_split_off():
    found, rest = parse_forecast(["--model", "x", "--price=0.5/2tok", "--unique_tokens", "3e6", "--budget", "2h"])
    assert (found.price, found.unique_tokens, rest) == (("tokens", 0.25), 3e6, ["--model", "x", "--budget", "2h"])
    assert parse_forecast(["--flops_per_second", "2.5Tflop"])[0].flops_per_second == 2.5e12
    with pytest.raises(OptionError, match="pretrained_tokens='-3' must be"):
        parse_forecast(["--pretrained_tokens", "-3"])
