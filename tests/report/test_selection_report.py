"""The page about a selection, against figures counted by hand."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from datasets import Dataset

from hf_eff import select_dataset
from hf_eff.cli import main
from hf_eff.manifest import Selection
from hf_eff.report.histogram import histogram_svg
from hf_eff.report.selection_report import FOLDER
from hf_eff.testing.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
POOL = Dataset.from_list(
    [{"prompt": f"question {i:02d}", "completion": "x" * (i + 1), "source": "ab"[i % 2]} for i in range(30)]
    + [{"prompt": "p" * 90, "completion": "lost", "source": "a"}]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("selection")
    select_dataset(POOL, "length", processing_class=TOKENIZER, num_examples=6, max_length=60, output_dir=folder, seed=1)
    return folder


def test_numbers_are_those_counted_by_hand(folder):
    facts = json.loads((folder / FOLDER / "report.json").read_text())
    assert (facts["rows"], facts["chosen"]) == (31, 6)
    assert facts["sources"] == {"a": {"pool": 16, "chosen": 3}, "b": {"pool": 15, "chosen": 3}}
    assert facts["length"]["spearman_with_score"] == pytest.approx(1.0)
    assert facts["length"]["mean_loss_tokens_chosen"] > facts["length"]["mean_loss_tokens_pool"]
    assert facts["invalid"] == {"no_loss_tokens": 1}
    assert sum(facts["scores"]["all"]) == 30
    assert sum(facts["scores"]["chosen"]) == 6
    assert facts["scores"]["chosen"][-3:] == facts["scores"]["all"][-3:]
    assert 0 <= facts["overlap"]["with_balanced_random"] < 0.6


def test_the_page_quotes_the_extremes(folder):
    page = (folder / FOLDER / "report.md").read_text()
    highest, lowest = page.split("## Lowest scores")
    assert "question 29 " + "x" * 30 in highest
    assert "question 00 x" in lowest
    assert highest.split("## Highest scores")[1].count("question") == 10 == lowest.count("question")
    assert "no loss tokens | 1" in page


def test_the_figure_is_a_drawing_of_the_counts(folder):
    root = ET.fromstring((folder / FOLDER / "scores.svg").read_text())
    heights = [float(bar.get("height")) for bar in root.iter("{http://www.w3.org/2000/svg}rect")][1:]
    facts = json.loads((folder / FOLDER / "report.json").read_text())["scores"]
    scale = 200 / max(facts["all"])
    assert heights == pytest.approx([scale * count for count in [*facts["all"], *facts["chosen"]]], abs=0.06)


def test_titles_cannot_break_the_figure():
    ET.fromstring(histogram_svg([0, 1], [1], [0], 'a < b & "c"'))


def test_a_choice_without_scores_has_a_page_too(tmp_path):
    select_dataset(POOL, "random", processing_class=TOKENIZER, num_examples=6, output_dir=tmp_path)
    page = (tmp_path / FOLDER / "report.md").read_text()
    assert "no scores" in page
    assert "Highest" not in page
    assert not (tmp_path / FOLDER / "scores.svg").exists()


# comparison


def select(folder, **options):
    select_dataset(
        POOL, "length", processing_class=TOKENIZER, max_length=60, output_dir=folder, **{"num_examples": 10, **options}
    )
    return str(folder)


def test_selections_are_compared(tmp_path, capsys):
    names = [select(tmp_path / "a"), select(tmp_path / "b", num_examples=5), select(tmp_path / "c", order="shortest")]
    assert main(["compare-selections", *names, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    chosen = [set(Selection.load(name).indices.tolist()) for name in names]
    expected = [[len(a & b) / len(a | b) for b in chosen] for a in chosen]
    assert np.allclose(facts["overlap"], expected)
    assert facts["overlap"][0][1] == 0.5
    # Every row's score is at hand, not only those of shared rows; what is best for one is worst for the other.
    assert np.allclose(facts["agreement"], [[1, 1, -1], [1, 1, -1], [-1, -1, 1]])
    assert main(["compare-selections", *names]) == 0
    assert "| 10 of 31 |" in capsys.readouterr().out


def test_without_reports_shared_rows_are_compared(tmp_path, capsys):
    names = [select(tmp_path / "a"), select(tmp_path / "b", num_examples=5)]
    for name in names:
        for path in (tmp_path / name / FOLDER).iterdir():
            path.unlink()
    assert main(["compare-selections", *names, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["agreement"][0][1] == pytest.approx(1.0)


def test_selections_of_different_datasets_are_refused(tmp_path, capsys):
    other = str(tmp_path / "other")
    select_dataset(POOL.select(range(9)), "random", processing_class=TOKENIZER, num_examples=2, output_dir=other)
    assert main(["compare-selections", select(tmp_path / "a"), other]) == 2
    assert "were made from different datasets (31 and 9 rows" in capsys.readouterr().err


def test_one_selection_is_too_few(tmp_path, capsys):
    assert main(["compare-selections", select(tmp_path / "a")]) == 2
    assert "at least two selections, got 1" in capsys.readouterr().err
