from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from hf_eff.cli import COMMANDS, main
from hf_eff.contracts.spec import KINDS
from hf_eff.registry import list_methods

HEAVY = {"torch", "transformers", "datasets", "numpy", "trl", "huggingface_hub"}


def imported_by(words):
    """Heavy modules that a command loads, seen from inside its process."""
    code = (
        f"import sys; from hf_eff.cli import main; code = main({words!r}); "
        f"print(code, sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr.strip()


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"], ["methods"], ["methods", "memory", "--json"]])
def test_help_and_listing_import_nothing_heavy(words):
    assert imported_by(words) == "0 []"


def test_the_probe_for_heavy_imports_can_fail():
    code = f"import sys, numpy; print(sorted({HEAVY!r} & set(sys.modules)))"
    assert "numpy" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("words", [["--help"], ["methods"]])
def test_help_and_listing_answer_in_half_a_second(words):
    # Processor time: what a quiet machine would show on the clock.
    durations = []
    for _ in range(3):
        before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
        subprocess.run([sys.executable, "-m", "hf_eff.cli", *words], capture_output=True, check=True)
        durations.append(sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before)
    assert 0 < min(durations) < 0.5


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name}" in text and line in text for name, line in COMMANDS.items())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_page_and_refuses_unknown_flags_in_one_sentence(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"hf-eff {command}" in capsys.readouterr().out
    assert main([command, "--no-such-flag"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("hf-eff: ")
    assert len(errors.splitlines()) == 1


def test_a_wrong_command_is_one_sentence_with_the_nearest_name(capsys):
    assert main(["trian"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("hf-eff: 'trian' is no command. Did you mean 'train'? Commands: train, select")
    assert len(output.err.splitlines()) == 1


def test_methods_prints_every_name_with_its_summary_as_text_json_and_markdown(capsys):
    main(["methods", "--json"])
    listing = json.loads(capsys.readouterr().out)
    assert {kind: list(lines) for kind, lines in listing.items()} == {kind: list_methods(kind) for kind in KINDS}
    assert all(line for lines in listing.values() for line in lines.values())
    main(["methods"])
    text = capsys.readouterr().out
    main(["methods", "--markdown"])
    markdown = capsys.readouterr().out
    for kind, lines in listing.items():
        for name, line in lines.items():
            assert f"  {name} " in text
            assert f'| `{kind}="{name}"` | {line} |' in markdown


def test_methods_shows_a_card_by_kind_and_name_or_by_name_alone(capsys):
    assert main(["methods", "memory", "badam"]) == 0
    card = capsys.readouterr().out
    assert '`memory="badam"`' in card
    assert main(["methods", "badam"]) == 0
    assert capsys.readouterr().out == card
    assert main(["methods", "badam", "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)
    assert (entry["kind"], entry["name"], entry["card"].strip()) == ("memory", "badam", card.strip())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["memory", "badan"], "memory='badan' is not registered. Did you mean 'badam'?"),
        (["badan"], "Did you mean 'badam'?"),
        (["memroy", "badam"], "Method kind 'memroy' does not exist. Did you mean 'memory'?"),
    ],
)
def test_a_wrong_method_name_is_a_usage_error_with_the_nearest_name(words, sentence, capsys):
    assert main(["methods", *words]) == 2
    output = capsys.readouterr()
    assert sentence in output.err
    assert "Traceback" not in output.err


def test_report_prints_what_the_run_wrote(tmp_path, capsys):
    (tmp_path / "report.md").write_text("# Report\n", encoding="utf-8")
    (tmp_path / "report.json").write_text('{"format": "hf_eff.report"}\n', encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "# Report\n"
    assert main(["report", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"format": "hf_eff.report"}


def test_report_of_a_folder_without_one_is_a_usage_error(tmp_path, capsys):
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "give the output_dir of a run that has ended" in capsys.readouterr().err


def test_failures_of_a_run_are_code_1_and_an_interrupt_is_130(monkeypatch, capsys):
    import hf_eff.cli.report as command
    from hf_eff.errors import BudgetExceededError

    def fail(argv):
        raise BudgetExceededError("the budget is spent.")

    monkeypatch.setattr(command, "run", fail)
    assert main(["report"]) == 1
    assert capsys.readouterr().err == "hf-eff: the budget is spent.\n"

    def interrupt(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", interrupt)
    assert main(["report"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_bug_is_not_dressed_up_as_a_usage_error(monkeypatch):
    import hf_eff.cli.report as command

    def bug(argv):
        raise ZeroDivisionError

    monkeypatch.setattr(command, "run", bug)
    with pytest.raises(ZeroDivisionError):
        main(["report"])


def test_the_table_of_the_readme_is_the_one_the_command_prints(capsys):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    table = readme.split("<!-- methods: hf-eff methods --markdown -->\n")[1].split("<!-- /methods -->")[0]
    main(["methods", "--markdown"])
    assert table.strip() == capsys.readouterr().out.strip()
