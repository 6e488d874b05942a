"""The governor's figure, against positions worked out by hand from the log."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from hf_eff.cli import main
from hf_eff.contracts.governor import Decision, ProbeReading, Telemetry
from hf_eff.engines.decision_log import GovernorLog
from hf_eff.errors import DataError
from hf_eff.publish.bundle import bundle_files, figures
from hf_eff.report.governor_figure import FIGURE, draw_governor, figure_of
from hf_eff.report.run_report import pictures, render_report

SVG = "{http://www.w3.org/2000/svg}"
LEFT, RIGHT = 76, 736  # borders of every panel


def look(compute, loss=None, action="continue", target="", **more):
    """One look at a run of at most 100 FLOPs, with a probe if a loss is given."""
    reading = None if loss is None else ProbeReading(loss, None, None, 4)
    details = {key: more.pop(key) for key in ("gain", "needed") if key in more}
    telemetry = Telemetry(
        step=int(compute),
        max_steps=100,
        spent={"flops": compute, "seconds": 1.0},
        limits={"flops": 100.0},
        compute=compute,
        compute_limit=100.0,
        probe=reading,
        probe_spent=compute / 10,
    )
    return replace(telemetry, **more), Decision(action, f"because of {action}", details, target)


def drawn(folder, looks, summary=None):
    log = GovernorLog(folder / "governor.jsonl")
    log.start({"plan": 1})
    for telemetry, decision in looks:
        log.append(telemetry, decision)
    if summary is not None:
        log.finish(summary)
    return read(draw_governor(log.path, folder / FIGURE))


def read(path):
    return ET.fromstring(path.read_text(encoding="utf-8"))


def dots(root, colour):
    return [
        (float(dot.get("cx")), float(dot.get("cy"))) for dot in root.iter(f"{SVG}circle") if dot.get("fill") == colour
    ]


def texts(root):
    return [text.text for text in root.iter(f"{SVG}text")]


def titles(root):
    return [title.text for title in root.iter(f"{SVG}title")]


def bars(root):
    """Name of each part of the budget bar to its width."""
    parts = [part for part in root.iter(f"{SVG}rect") if part.get("y") == "540.0"]
    return {part[0].text.split()[0]: float(part.get("width")) for part in parts}


def test_losses_lie_over_their_compute_and_decisions_are_marked(tmp_path):
    looks = [
        look(10.0, 3.0),
        look(20.0, 2.0),
        look(30.0, action="switch_memory", target="checkpointing on"),
        look(40.0, 1.0, action="refresh"),
        look(50.0, action="stop"),
    ]
    root = drawn(tmp_path, looks)
    places = dots(root, "#2f6fde")
    assert [x for x, _ in places] == pytest.approx([LEFT + 6.6 * share for share in (10, 20, 40)], abs=0.06)
    heights = [y for _, y in places]
    assert heights[1] == pytest.approx((heights[0] + heights[2]) / 2, abs=0.11)  # 2 lies half way from 3 to 1
    assert heights[0] < heights[1] < heights[2]  # pixels count downwards
    marks = [line for line in root.iter(f"{SVG}line") if line.get("class") == "decision"]
    assert [float(mark.get("x1")) for mark in marks] == pytest.approx([274.0, 340.0, 406.0])
    assert len({mark.get("stroke") for mark in marks}) == 3
    assert titles(root)[:3] == [
        "switch_memory:checkpointing on: because of switch_memory",
        "refresh: because of refresh",
        "stop: because of stop",
    ]
    assert {"switch_memory:checkpointing on", "refresh", "stop", "100 FLOP"} <= set(texts(root))


def test_gain_and_threshold_share_a_logarithmic_scale(tmp_path):
    looks = [look(10.0 * n, 3.0, gain=10.0**-n, needed=1e-2) for n in (1, 2, 3)]
    root = drawn(tmp_path, looks)
    gains = [y for _, y in dots(root, "#2f6fde")[3:]]
    needed = [y for _, y in dots(root, "#c0392b")]
    assert gains[1] == pytest.approx(needed[1])
    assert gains[2] - gains[1] == pytest.approx(gains[1] - gains[0], abs=0.11)
    assert len(set(needed)) == 1
    negative = drawn(tmp_path, [look(1.0, 2.0, gain=-0.5, needed=0.0), look(2.0, 2.0, gain=0.5, needed=0.0)])
    assert len(dots(negative, "#c0392b")) == 2


def test_purposes_come_from_the_end_of_the_log_or_else_from_its_last_look(tmp_path):
    looks = [look(50.0, 2.0, overhead_spent=15.0)]
    width = RIGHT - LEFT
    wanted = {"train": 0.35, "probe": 0.05, "select": 0.1, "unspent": 0.5}
    assert bars(drawn(tmp_path, looks)) == pytest.approx(
        {name: width * part for name, part in wanted.items()}, abs=0.06
    )
    told = {"train": {"flops": 20.0}, "probe": {"flops": 5.0}, "save": {"flops": 0.0}, "eval": {"flops": 25.0}}
    root = drawn(tmp_path, looks, {"by_purpose": told})
    wanted = {"train": 0.2, "probe": 0.05, "select": 0.0, "save": 0.0, "eval": 0.25, "unspent": 0.5}
    assert bars(root) == pytest.approx({name: width * part for name, part in wanted.items()}, abs=0.06)
    assert "eval 25.0%" in texts(root)


def test_a_log_without_probes_shows_what_it_has(tmp_path):
    root = drawn(tmp_path, [look(80.0, action="stop")])
    assert "held-out loss: no probe was taken" in texts(root)
    assert "no gain was estimated" in texts(root)
    assert "stop" in texts(root)
    assert not list(root.iter(f"{SVG}circle"))


def test_one_probe_is_one_dot(tmp_path):
    root = drawn(tmp_path, [look(5.0, 2.5)])
    assert len(dots(root, "#2f6fde")) == 1


def test_what_is_not_finite_interrupts_the_line(tmp_path):
    losses = [3.0, 2.9, math.nan, 2.5, math.inf, 2.0, 1.9]
    gains = {0: 0.1, 1: math.nan, 2: math.inf, 3: 0.05}
    looks = [look(n + 1.0, loss, gain=gains.get(n, 0.01), needed=0.02) for n, loss in enumerate(losses)]
    root = drawn(tmp_path, looks)
    lines = [line for line in root.iter(f"{SVG}polyline") if line.get("stroke") == "#2f6fde"]
    assert [len(line.get("points").split()) for line in lines] == [2, 2, 4]  # losses, losses, gains
    text = (tmp_path / FIGURE).read_text()
    assert "nan" not in text
    assert "inf" not in text


def test_limits_that_are_not_finite_or_shares_are_drawn(tmp_path):
    open_end = drawn(tmp_path, [look(5.0, 2.0, compute_limit=math.inf), look(8.0, 1.9, compute_limit=math.inf)])
    assert dots(open_end, "#2f6fde")[1][0] == pytest.approx(RIGHT)
    two = {"limits": {"flops": 100.0, "tokens": 5.0}, "compute_limit": 1.0}
    assert "100.0% of the budget" in texts(drawn(tmp_path, [look(0.5, 2.0, **two)]))
    assert drawn(tmp_path, [look(0.0, 2.0, compute_limit=0.0)]) is not None


def test_repeated_advice_is_one_mark_and_many_marks_have_no_labels(tmp_path):
    advised = [look(float(n), 2.0, action="stop") for n in range(1, 6)]
    root = drawn(tmp_path, advised)
    assert len([line for line in root.iter(f"{SVG}line") if line.get("class") == "decision"]) == 1
    many = [look(float(n), 2.0, action="refresh") for n in range(1, 30)]
    root = drawn(tmp_path, many)
    assert len([line for line in root.iter(f"{SVG}line") if line.get("class") == "decision"]) == 29
    assert "refresh" not in texts(root)


def test_the_cooldown_is_shaded(tmp_path):
    looks = [look(10.0, 2.0), look(20.0, 1.9, action="cooldown"), look(30.0, 1.8, phase="cooldown")]
    assert "cooldown" in titles(drawn(tmp_path, [*looks, look(40.0, 1.7, phase="cooldown")]))


def test_an_old_log_without_the_newer_fields_is_drawn(tmp_path):
    log = tmp_path / "governor.jsonl"
    telemetry, decision = look(10.0, 2.0, action="stop")
    drawn(tmp_path, [(telemetry, decision)])
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for name in ("overhead_spent", "phase", "offers", "drift", "data_phase"):
        del lines[1]["telemetry"][name]
    del lines[1]["target"]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "stop" in texts(read(draw_governor(log, tmp_path / FIGURE)))


def test_equal_logs_give_equal_files_and_text_is_escaped(tmp_path):
    looks = [look(10.0, 2.0, action="switch_memory", target='a < "b" & c')]
    drawn(tmp_path, looks)
    first = (tmp_path / FIGURE).read_bytes()
    drawn(tmp_path, looks)
    assert (tmp_path / FIGURE).read_bytes() == first


def test_nothing_to_draw_is_no_figure_and_no_failure(tmp_path):
    assert figure_of(tmp_path) == []
    log = GovernorLog(tmp_path / "governor.jsonl")
    log.start({})
    assert draw_governor(log.path, tmp_path / FIGURE) is None
    log.path.write_text("no log\n")
    with pytest.raises(DataError, match="no record of a governor log"):
        draw_governor(log.path, tmp_path / FIGURE)
    assert figure_of(tmp_path) == []
    assert not (tmp_path / FIGURE).exists()


def test_it_goes_with_the_run_and_the_report_command_names_it(tmp_path, capsys):
    drawn(tmp_path, [look(10.0, 2.0)])
    (tmp_path / FIGURE).unlink()
    (tmp_path / "report.md").write_text("# Report\n", encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"# Report\nFigure: {tmp_path / FIGURE}\n"
    assert figures(tmp_path) == [FIGURE]
    assert FIGURE in bundle_files(tmp_path)


def test_report_and_card_show_the_pictures_they_are_given():
    assert pictures(["governor figure.svg"]) == ["![governor figure](governor%20figure.svg)"]
    parts = {"binding": {"currency": None, "share": None, "stopped_by": None}, "steps": {"done": 1, "planned": 1}}
    report = {**parts, "currencies": {}, "per_step": {}, "memory": {}, "purposes": []}
    assert "![governor](governor.svg)" in render_report(report, [FIGURE])
    assert "![" not in render_report(report)
