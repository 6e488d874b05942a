import importlib.util
import re

import pytest

from hf_eff import profile_memory
from hf_eff.errors import MissingDependencyError, OptionError
from hf_eff.report.memory_figure import draw_memory
from hf_eff.testing.tiny import tiny_config

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def table():
    return profile_memory(tiny_config(), ["full", "mezo", "offload"], 2, 32, budget="4MiB", device="cpu")


def widths(text):
    """Horizontal extent of every drawn bar, in order."""
    paths = re.findall(
        r'<path d="M ([\d.]+) [\d.]+ \nL ([\d.]+) [\d.]+ \nL [\d.]+ [\d.]+ \nL [\d.]+ [\d.]+ \nz\n" clip', text
    )
    return [abs(float(second) - float(first)) for first, second in paths]


def test_bars_are_as_wide_as_their_terms(table, tmp_path):
    from hf_eff.contracts.cost import MEMORY_TERMS

    text = table.save_figure(tmp_path / "new" / "out.svg").read_text()
    bars = widths(text)
    rows = table.rows[:2]
    assert len(bars) == len(MEMORY_TERMS) * len(rows)
    expected = [row[term] for term in MEMORY_TERMS for row in rows]
    scale = bars[0] / expected[0]
    assert bars == pytest.approx([scale * amount for amount in expected], abs=0.01)
    assert "offload" not in text  # a refused method has no bar
    for word in (*MEMORY_TERMS, "full", "mezo", "budget", "peak GiB", "2 x 32 tokens"):
        assert f">{word}" in text or word in text


def test_equal_tables_give_equal_files(table, tmp_path):
    first, second = (table.save_figure(tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
    assert first == second


@pytest.mark.parametrize(("name", "head"), [("out.png", b"\x89PNG"), ("out.pdf", b"%PDF")])
def test_other_formats(table, tmp_path, name, head):
    assert table.save_figure(tmp_path / name).read_bytes().startswith(head)


def test_measured_peaks_and_no_budget(table, tmp_path):
    facts = table.to_dict()
    facts["rows"] = [
        {**facts["rows"][0], "measured": {"total": 2.0**20}},
        {**facts["rows"][1], "measured": {"failed": "x"}},
    ]
    assert "measured" in draw_memory(facts, tmp_path / "out.svg").read_text()
    bare = draw_memory({**table.to_dict(), "budget_bytes": None}, tmp_path / "bare.svg").read_text()
    assert "budget" not in bare
    assert "measured" not in bare
    far = draw_memory({**table.to_dict(), "budget_bytes": 2.0**50}, tmp_path / "far.svg").read_text()
    assert "budget" not in far


def test_what_cannot_be_drawn_is_told(table, tmp_path, monkeypatch):
    with pytest.raises(OptionError, match=r"must end in one of \['.png', '.svg', '.pdf'\]"):
        table.save_figure(tmp_path / "out.bmp")
    with pytest.raises(OptionError, match="every method was refused"):
        draw_memory({**table.to_dict(), "rows": [table.rows[2]]}, tmp_path / "out.svg")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'hf_eff\[plots\]'"):
        table.save_figure(tmp_path / "out.png")
    assert not list(tmp_path.iterdir())
