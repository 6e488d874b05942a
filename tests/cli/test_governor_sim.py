from __future__ import annotations

import json
from functools import partial

import pytest

from hf_eff.cli import governor_sim, main
from hf_eff.contracts.governor import Decision, Governor
from hf_eff.simulation import stopping, traces
from hf_eff.simulation.rivals import RIVALS

SMALL = ("marginal_gain", "patience-3", "fixed-1/3", *RIVALS)


class StopsAtOnce(Governor):
    def observe(self, telemetry):
        return Decision("stop", "by hand")


@pytest.fixture
def few(monkeypatch):
    """The names that the claims are about, all played by one quick rule but the governor's."""
    quick = dict.fromkeys(SMALL, lambda aims: StopsAtOnce())
    quick["marginal_gain"] = partial(stopping.registered, "fixed", {"share": 0.05})
    for module in (stopping, traces):
        monkeypatch.setattr(module, "policies", lambda: quick)
        monkeypatch.setattr(module, "unpriced_policies", lambda: {"tail": quick["patience-3"]})


def test_stop_prints_three_tables_and_the_claims(few, capsys):
    assert main(["governor", "sim", "stop", "--curves", "40", "--seed", "7"]) == 0
    text = capsys.readouterr().out
    assert "Regret, nats: 40 curves from seed 7" in text
    assert "outside the estimator's grid: 20 curves from seed 7" in text
    assert "without a price, all families: 10 curves from seed 7" in text
    assert "double descent" in text
    assert "| NO |" in text  # a twentieth of the budget is no governor


def test_json_is_on_stdout_and_in_the_file(few, capsys, tmp_path):
    words = ["governor", "sim", "stop", "--curves", "40", "--json", "--output", str(tmp_path / "sim.json")]
    assert main(words) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == json.loads((tmp_path / "sim.json").read_text(encoding="utf-8"))
    assert (facts["format"], facts["seed"], facts["curves"]) == ("hf_eff.governor_simulation", 0, 40)
    assert [row["policy"] for row in facts["stop"]["inside"]] == list(SMALL)
    assert [each["holds"] for each in facts["stop"]["criteria"]][-1] is False


def test_another_governor_can_be_named(few, capsys):
    assert main(["governor", "sim", "stop", "--curves", "40", "--policy", "fixed", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [row["policy"] for row in facts["stop"]["inside"]] == [*SMALL, "fixed"]
    assert facts["stop"]["inside"][-1]["share"] == pytest.approx(0.334)
    assert main(["governor", "sim", "stop", "--policy", "fixd"]) == 2
    assert "Did you mean 'fixed'?" in capsys.readouterr().err


def test_all_runs_every_part(monkeypatch, capsys):
    for name in governor_sim.PARTS:
        monkeypatch.setitem(governor_sim.PARTS, name, lambda options, each=name: ({"part": each}, f"## {each}"))
    assert main(["governor", "sim", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [facts[name] for name in ("stop", "refresh", "trace", "calibration")] == [
        {"part": name} for name in ("stop", "refresh", "trace", "calibration")
    ]
    assert main(["governor", "sim", "all"]) == 0
    assert capsys.readouterr().out.split() == [w for name in governor_sim.PARTS for w in ("##", name)]


def test_trace_reads_the_runs_of_a_folder(few, capsys, tmp_path):
    assert main(["governor", "sim", "trace", "--traces", str(tmp_path)]) == 2
    assert "holds no recorded runs" in capsys.readouterr().err
    assert main(["governor", "sim", "trace", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["trace"]
    assert [row["policy"] for row in rows] == [*SMALL, "tail"]
    assert set(rows[0]["traces"]) == {"constant", "constant_fast", "cosine", "small_data"}


def test_refresh_prints_a_table_for_each_bend(monkeypatch, capsys):
    asked = []

    def table(seed, problems, bend):
        asked.append((seed, problems, bend))
        return [{"policy": "never", "mean": 0.5}]

    monkeypatch.setattr("hf_eff.simulation.refreshing.refresh_table", table)
    assert main(["governor", "sim", "refresh", "--seed", "3", "--curves", "80"]) == 0
    assert asked == [(3, 40, bend) for bend in governor_sim.BENDS]
    assert "| never | 0.500 |" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--curves", "39"], ["--seed", "-1"], ["nonsense"]])
def test_wrong_usage_is_one_sentence(words, capsys):
    assert main(["governor", "sim", *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1
