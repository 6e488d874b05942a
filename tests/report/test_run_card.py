from __future__ import annotations

import pytest
import yaml

from hf_eff.report import build_report, render_report, render_run_card
from hf_eff.report.run_card import add_to_card
from hf_eff.report.secrets import mask_secrets

PLAN = {
    "methods": {"selection:less": {"fraction": 0.1}, "memory:badam": {}, "governor:none": {}},
    "budget": {"tokens": 100.0},
    "predicted": {"steps": 4, "stop_step": 4, "step_tokens": 20.0},
}


def card(**environment):
    measured = {"steps": 4, "stopped_by": None}
    return render_run_card(build_report(PLAN, {"spent": {"tokens": 80.0}}, measured, environment=environment))


def test_the_head_is_yaml_that_the_hub_reads():
    text = card(base_model="org/model", datasets=["org/data"], library_name="peft", tags=["sft"])
    head = yaml.safe_load(text.split("---\n")[1])
    assert head == {
        "tags": ["governor-none", "hf_eff", "memory-badam", "selection-less", "sft"],
        "library_name": "peft",
        "base_model": "org/model",
        "datasets": ["org/data"],
    }


@pytest.mark.parametrize("name", ["x\n---\n# gone", "/home/me/model", "model", "a: b", "../up", "https://u:p@h/d"])
def test_only_names_that_the_hub_can_link_to_enter_the_head(name):
    text = card(base_model=name, datasets=[name, "org/data"])
    head, body = text.removeprefix("---\n").split("\n---\n", 1)
    assert "base_model" not in yaml.safe_load(head)
    assert yaml.safe_load(head)["datasets"] == ["org/data"]
    assert body.startswith("\n# Budgeted fine-tuning run")


def test_a_folder_that_looks_like_a_repository_is_not_named(tmp_path, monkeypatch):
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in card(base_model="org/model")


def test_the_body_holds_methods_figures_and_the_command():
    text = card(command="hf-eff train --seed 1", versions={"torch": "2.13"})
    assert "| selection | `less` | `fraction=0.1` |" in text
    assert "| tokens | 80 tok | 80 tok | 1.00 | 100 tok | 80.0% |" in text
    assert "```bash\nhf-eff train --seed 1\n```" in text
    assert "Versions: torch 2.13." in text


def test_plan_evaluation_and_figures_are_shown():
    report = build_report(PLAN, {}, {})
    origin = {"repo_id": "org/code", "revision": "a" * 40, "config": None, "split": "test", "num_rows": 1000}
    report["plan"] = ["memory  badam", "```", "steps  4"]
    report["evaluation"] = {"metrics": {"eval_loss": 1.25}, "step": 4, "datasets": {"": origin, "mine": None}}
    text = render_run_card(report, ["governor figure.svg"])
    assert "## Plan\n\n```text\nmemory  badam\n\nsteps  4\n```" in text
    assert "| Metric | At step 4 |\n|---|---|\n| `eval_loss` | 1.25 |" in text
    assert "Measured on [org/code](https://huggingface.co/datasets/org/code), split `test`" in text
    assert "![governor figure](governor%20figure.svg)" in text
    assert "## Plan" not in card()
    assert "## Evaluation" not in card()


def test_added_to_another_card_both_heads_become_one():
    before = "---\nlicense: mit\ntags: sft\nbase_model: theirs/model\n---\n\n# Model\n\nText.\n"
    text = add_to_card(before, card(base_model="org/model", datasets=["org/data"]))
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["tags"][0] == "sft"
    assert {"hf_eff", "memory-badam"} <= set(head["tags"])
    assert (head["license"], head["base_model"], head["datasets"]) == ("mit", "theirs/model", ["org/data"])
    assert text.index("# Model") < text.index("# Budgeted fine-tuning run")
    assert text.count("---\n") - text.count("|---\n") - text.count("---|\n") <= 2
    assert add_to_card("# Bare\n", card()).count("# Bare") == 1
    assert "# Odd" in add_to_card("---\n[1\n---\n# Odd\n", card())


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("hf_" + "Ab1" * 12, "hf_***"),
        ("key sk-" + "x" * 30 + " end", "key sk-*** end"),
        ("--hub_token plain --seed 1", "--hub_token *** --seed 1"),
        ("api_key='abc' rest", "api_key='***' rest"),
        ('"password": "abc"', '"password": "***"'),
        ("https://me:pass@host/x", "https://***@host/x"),
        ("hf_eff.selection hf_eff_state.json --eos_token <|im_end|> tokens: 300", None),
    ],
)
def test_secrets_are_masked_and_plain_words_are_not(text, kept):
    assert mask_secrets(text) == (text if kept is None else kept)


def test_no_secret_reaches_the_card():
    secret = "hf_" + "Z9" * 17
    text = card(command=f"HF_TOKEN={secret} hf-eff train", title=f"Run {secret}", datasets=[f"https://u:{secret}@h/d"])
    assert secret not in text
    assert "Z9Z9" not in text


@pytest.mark.parametrize("render", [render_report, render_run_card])
def test_a_report_that_was_not_cleaned_is_masked_too(render):
    report = build_report(PLAN, {}, {})
    report["environment"] = {"command": "HF_TOKEN=hf_" + "Z9" * 17}
    assert "Z9Z9" not in render(report)
