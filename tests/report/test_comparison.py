from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from hf_eff.report import build_report, render_report
from hf_eff.report.run_report import binding_sentence

PLAN = {
    "methods": {"selection:less": {"fraction": 0.1}, "memory:badam": {}, "governor:budget": {}},
    "options": {"selection": "less", "memory": "badam"},
    "budget": {"flops": 1000.0, "seconds": 60.0},
    "predicted": {
        "bytes": {"weights": 400.0, "gradients": 40.0, "optimizer": 80.0, "activations": 300.0, "rest": 10.0},
        "peak_bytes": 830.0,
        "flops": {"select": 100.0, "train": 2000.0, "probe": 50.0},
        "seconds": 99.0,
        "step_flops": 20.0,
        "step_tokens": 8.0,
        "selection_tokens": 16.0,
        "steps": 100,
        "stop_step": 42,
    },
    "warnings": ["selection takes much."],
}
LEDGER = {
    "spent": {"flops": 990.0, "tokens": 344.0, "seconds": 30.0, "kwh": None},
    "by_purpose": {
        "select": {"flops": 110.0, "tokens": 24.0, "seconds": 6.0},
        "train": {"flops": 840.0, "tokens": 320.0, "seconds": 21.0},
        "probe": {"flops": 40.0, "seconds": 1.5},
        "save": {"flops": 0, "seconds": 1.5},
    },
}
MEASURED = {
    "bytes": {"weights": 400.0, "gradients": 44.0, "optimizer": 80.0, "activations": 330.0},
    "peak_bytes": 913.0,
    "steps": 40,
    "stopped_by": "flops",
}


@pytest.fixture
def report():
    return build_report(PLAN, LEDGER, MEASURED, {"method": "less", "rows": 4}, {"decisions": 2}, {"python": "3.11"})


def test_memory_terms_stand_beside_their_prediction(report):
    assert report["memory"]["activations"] == {"predicted": 300.0, "measured": 330.0, "ratio": pytest.approx(1.1)}
    assert report["memory"]["rest"] == {"predicted": 10.0, "measured": None, "ratio": None}
    assert report["memory"]["peak"]["ratio"] == pytest.approx(1.1)


def test_currencies_are_predicted_to_the_planned_end_and_shares_are_of_the_limit(report):
    flops = report["currencies"]["flops"]
    assert flops["predicted"] == 100 + 50 + 42 * 20
    assert flops["ratio"] == pytest.approx(990 / 990)
    assert (flops["limit"], flops["share"]) == (1000.0, pytest.approx(0.99))
    assert report["currencies"]["tokens"]["predicted"] == 16 + 42 * 8
    assert report["currencies"]["steps"] == {
        "predicted": 42, "measured": 40, "ratio": pytest.approx(40 / 42), "limit": None, "share": None,
    }  # fmt: skip
    # 99 s was predicted for 100 steps, the plan ends at 42: nothing comparable was predicted
    assert report["currencies"]["seconds"]["predicted"] is None
    assert report["currencies"]["seconds"]["share"] == pytest.approx(0.5)
    assert report["currencies"]["kwh"]["measured"] is None


def test_figures_per_step_divide_training_by_the_steps_done(report):
    assert report["per_step"]["flops"] == {"predicted": 20.0, "measured": 21.0, "ratio": pytest.approx(1.05)}
    assert report["per_step"]["tokens"]["measured"] == 8.0
    assert report["per_step"]["seconds"] == {"predicted": None, "measured": pytest.approx(0.525), "ratio": None}


def test_purposes_name_their_methods_and_their_share_of_the_time(report):
    rows = {row["purpose"]: row for row in report["purposes"]}
    assert list(rows) == ["select", "train", "probe", "save"]
    assert rows["select"]["methods"] == ["less"]
    assert rows["train"]["methods"] == ["badam"]
    assert rows["probe"]["methods"] == ["budget"]
    assert rows["save"]["methods"] == []
    assert rows["train"]["flops"] == {"predicted": 840.0, "measured": 840.0, "ratio": 1.0}
    assert sum(row["time_share"] for row in rows.values()) == pytest.approx(1.0)
    assert rows["train"]["time_share"] == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("stopped_by", "budget", "sentence"),
    [
        ("flops", PLAN["budget"], "Binding resource: FLOPs, 99.0% of its limit used; the next step would have passed"),
        ("seconds", PLAN["budget"], "Binding resource: time, 50.0% of its limit used"),
        (None, PLAN["budget"], "No limit was reached; the closest is FLOPs, 99.0% of its limit used."),
        ("governor", PLAN["budget"], "the governor ended it because more compute no longer paid. No limit was reached"),
        (None, {}, "The run did 40 of 100 planned optimizer steps. No limit was set."),
    ],
)
def test_the_binding_resource_is_the_one_that_ended_the_run(stopped_by, budget, sentence):
    report = build_report({**PLAN, "budget": budget}, LEDGER, {**MEASURED, "stopped_by": stopped_by})
    assert sentence in binding_sentence(report)


def test_the_page_says_unavailable_where_nothing_was_measured(report):
    page = render_report(report)
    assert "| energy | unavailable | unavailable |  | none |  |" in page
    assert "| rest | 10 B | unavailable |  |" in page
    assert "| train | badam | 840 FLOP | 840 FLOP | 1.00 | 320 tok | 21.0s | 70.0% |" in page
    assert "| save | trainer |" in page
    assert "- selection takes much." in page
    assert "| decisions | 2 |" in page


def test_a_run_without_anything_measured_still_gives_a_page():
    report = build_report({}, {}, {})
    page = render_report(report)
    assert "an unknown number of an unknown number" in page
    assert "## Selection" not in page
    assert all(row["measured"] is None for row in report["memory"].values())


def test_the_report_is_strict_json_and_holds_no_secret():
    secret = "hf_" + "a" * 34
    report = build_report(
        {**PLAN, "options": {"hub_token": "plain"}},
        LEDGER,
        {**MEASURED, "peak_bytes": math.nan},
        {"note": f"from {secret}", "score": math.inf},
        None,
        {"command": f"hf-eff train --hub_token {secret} --seed 1"},
    )
    text = json.dumps(report, allow_nan=False)
    assert secret not in text
    assert "plain" not in text
    assert report["selection"] == {"note": "from hf_***", "score": None}
    assert report["environment"]["command"] == "hf-eff train --hub_token *** --seed 1"


def test_reports_need_no_torch():
    heavy = "{'torch', 'transformers', 'datasets'}"
    code = f"import sys, hf_eff.report, hf_eff.report.card; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
