"""Pilots as CSV and as governor logs, and every way in which a file is none."""

from __future__ import annotations

import pytest

from hf_eff.cli.pilot import read_pilot
from hf_eff.contracts.governor import Decision, ProbeReading, Telemetry
from hf_eff.engines.decision_log import GovernorLog
from hf_eff.errors import DataError

ROWS = "100,3.0\n200,2.5\n300,2.2\n400,2.0\n500,1.9\n600,1.85\n"


def written(tmp_path, text, name="pilot.csv"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_tokens_and_compute_are_read(tmp_path):
    found = read_pilot(written(tmp_path, "tokens,loss\n" + ROWS))
    assert (found.clock, found.positions[:2], found.losses[-1]) == ("tokens", (100.0, 200.0), 1.85)
    assert list(found.in_tokens(7.0).tokens) == [100, 200, 300, 400, 500, 600]
    other = read_pilot(written(tmp_path, "compute, loss\n" + ROWS))
    assert list(other.in_tokens(50.0).tokens) == [2, 4, 6, 8, 10, 12]
    assert other.in_tokens(50.0).source == "pilot.csv"


def test_further_columns_are_no_harm_and_tokens_win(tmp_path):
    lines = [f"{number},{row.split(',')[1]},{row.split(',')[0]},x" for number, row in enumerate(ROWS.splitlines())]
    found = read_pilot(written(tmp_path, "compute,loss,tokens,note\n" + "\n".join(lines)))
    assert (found.clock, found.positions[0], found.losses[0]) == ("tokens", 100.0, 3.0)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("steps,loss\n" + ROWS, r"no column 'tokens' or 'compute'; its header names \['steps', 'loss'\]"),
        ("tokens,accuracy\n" + ROWS, "no column 'loss'"),
        ("", "no column 'tokens' or 'compute'"),
        ("tokens,loss\n" + ROWS.replace("2.2", "nan"), "line 4 of .* has nan under 'loss'; it must be finite"),
        ("tokens,loss\n" + ROWS.replace("300", "inf"), "line 4 of .* has inf under 'tokens'"),
        ("tokens,loss\n" + ROWS.replace("2.2", "low"), "line 4 of .* has no number under 'loss', but 'low'"),
        ("tokens,loss\n" + ROWS.replace("300,2.2", "300"), "line 4 of .* has no number under 'loss', but None"),
        ("tokens,loss\n" + ROWS.replace("300", "150"), "goes from 200 to 150 tokens between its points 2 and 3"),
        ("compute,loss\n" + ROWS.replace("300", "200"), "goes from 200 to 200 compute"),
        ("tokens,loss\n" + ROWS.replace("100", "-1"), "begins at -1 tokens"),
        ("tokens,loss\n" + "\n".join(ROWS.splitlines()[:5]), "has 5 points; it needs 6 or more"),
    ],
)
def test_what_is_no_pilot_is_told_in_a_sentence(tmp_path, text, sentence):
    with pytest.raises(DataError, match=sentence):
        read_pilot(written(tmp_path, text))


def test_a_missing_file_and_a_log_of_something_else(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_pilot(tmp_path / "none.csv")
    with pytest.raises(DataError, match="does not exist"):
        read_pilot(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="no record of a governor log"):
        read_pilot(written(tmp_path, '{"a": 1}\n', "other.jsonl"))


def log_of(path, run, steps=8, probed=True):
    log = GovernorLog(path)
    log.start(run)
    for step in range(1, steps + 1):
        seen = Telemetry(
            step=step,
            max_steps=steps,
            spent={"flops": 1e9 * step, "tokens": 130.0 * step, "seconds": 0.5 * step},
            limits={},
            compute=1e9 * step,
            compute_limit=1e10,
            probe=ProbeReading(3.0 / step, None, None, 16) if probed else None,
        )
        log.append(seen, Decision("continue", "test"))
    return path


def test_the_log_of_a_run_gives_tokens_losses_and_speed(tmp_path):
    found = read_pilot(log_of(tmp_path / "governor.jsonl", {"predicted": {"step_tokens": 128.0}}))
    assert found.positions == tuple(128.0 * step for step in range(1, 9))
    assert found.losses == tuple(3.0 / step for step in range(1, 9))
    assert found.flops_per_second == pytest.approx(2e9)


def test_without_a_plan_the_tokens_spent_count(tmp_path):
    found = read_pilot(log_of(tmp_path / "governor.jsonl", {"governor": "none"}))
    assert found.positions == tuple(130.0 * step for step in range(1, 9))


def test_a_log_without_probes_is_no_pilot(tmp_path):
    with pytest.raises(DataError, match="records no probe"):
        read_pilot(log_of(tmp_path / "governor.jsonl", {}, probed=False))
    with pytest.raises(DataError, match="has 3 points"):
        read_pilot(log_of(tmp_path / "governor.jsonl", {}, steps=3))
