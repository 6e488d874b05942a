import dataclasses
import json
import math
import os

import pytest

from hf_eff.contracts.governor import Decision, Governor, ProbeReading, Telemetry
from hf_eff.errors import DataError, OptionError
from hf_eff.governor import MODES, GovernorLog, compare, effective, replay
from hf_eff.governor.marginal_gain import MarginalGain, MarginalGainConfig
from hf_eff.testing.tapes import Tape, falling, play, rising


def governor(**options):
    return MarginalGain(MarginalGainConfig(epsilon=0.1, probe_share=0.1, **options))


def recorded(tape=None, **options):
    """The looks of a run at which a probe was taken, with the wall clock of one particular machine."""
    recording = play(governor(**options), tape or Tape(falling, limit=144.0))
    pairs = zip(recording.telemetry, recording.decisions, strict=True)
    return [(look, each) for look, each in pairs if look.probe is not None]


def with_seconds(look, pace):
    return dataclasses.replace(look, spent={**look.spent, "seconds": pace * look.step, "bytes": 1e9 * pace})


def write(log, pairs, pace=1.0):
    for look, decision in pairs:
        log.append(with_seconds(look, pace), decision)


@pytest.fixture
def log(tmp_path):
    return GovernorLog(tmp_path / "governor.jsonl")


def test_reads_back_what_was_written(log):
    pairs = recorded()
    log.start({"plan": {"budget": {"flops": 144.0}}})
    write(log, pairs)
    log.finish({"stopped_by": "governor"})
    assert log.header()["run"] == {"plan": {"budget": {"flops": 144.0}}}
    assert [(each.telemetry, each.decision) for each in log.decisions()] == [
        (with_seconds(look, 1.0), decision) for look, decision in pairs
    ]
    assert log.summary() == {"stopped_by": "governor"}
    first = json.loads(log.path.read_text().splitlines()[0])
    assert (first["kind"], first["format"], first["format_version"]) == ("header", "hf_eff.governor_log", 1)


def test_each_record_is_on_disk_when_append_returns(log):
    log.start({})
    for count, (look, decision) in enumerate(recorded()[:5], start=1):
        log.append(look, decision)
        # Another reader: nothing waits in a buffer that a kill would lose.
        assert len(GovernorLog(log.path).decisions()) == count


def test_an_interrupted_log_equals_an_uninterrupted_one(tmp_path):
    pairs = recorded()
    whole = GovernorLog(tmp_path / "whole.jsonl")
    whole.start({})
    write(whole, pairs)
    for cut, (checkpoint, _) in enumerate(pairs):
        for overrun in (0, 1, 3):
            log = GovernorLog(tmp_path / "resumed.jsonl")
            log.start({})
            write(log, pairs[: cut + 1 + overrun], pace=2.0)
            log.finish({"stopped_by": "signal"})
            log.truncate_after(checkpoint.step)
            write(log, pairs[cut + 1 :], pace=3.0)
            assert log.comparable() == whole.comparable()
            assert log.summary() is None
    assert log.path.read_bytes() != whole.path.read_bytes()


def test_without_measured_the_bytes_are_the_same(tmp_path):
    def bytes_of(log):
        return "".join(log.comparable())

    texts = []
    for pace in (1.0, 7.0):
        log = GovernorLog(tmp_path / f"{pace}.jsonl")
        log.start({})
        write(log, recorded(), pace)
        texts.append(bytes_of(log))
        for line in log.path.read_text().splitlines():
            assert not {"seconds", "kwh", "usd", "bytes"} & set(json.loads(line).get("telemetry", {}).get("spent", {}))
    assert texts[0] == texts[1]


def test_truncation_is_atomic(log, monkeypatch):
    log.start({})
    write(log, recorded())
    before = log.path.read_bytes()

    def refuse(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(OSError, match="disk full"):
            log.truncate_after(3)
    assert log.path.read_bytes() == before
    assert os.listdir(log.path.parent) == [log.path.name]


def test_a_line_cut_off_by_a_kill_is_passed_over(log):
    pairs = recorded()
    log.start({})
    write(log, pairs[:4])
    log.path.write_bytes(log.path.read_bytes()[:-20])
    assert len(log.decisions()) == 3
    log.truncate_after(pairs[2][0].step)
    write(log, pairs[3:4])
    assert [each.decision for each in log.decisions()] == [decision for _, decision in pairs[:4]]


def test_a_missing_log_begins_anew_and_says_so(log):
    log.truncate_after(40)
    write(log, recorded()[:1])
    assert log.header()["run"] == {"resumed_after_step": 40}
    assert len(log.decisions()) == 1


def test_starting_replaces_the_log_of_another_run(log):
    log.start({"run": 1})
    write(log, recorded()[:3])
    log.start({"run": 2})
    assert log.decisions() == []
    assert log.header()["run"] == {"run": 2}


def test_numbers_that_json_lacks_survive(log):
    reading = ProbeReading(mean=math.inf, paired_delta=None, paired_se=None, num_examples=0)
    look = Telemetry(1, 5, {"flops": 1.0}, {}, 1.0, math.inf, loss=math.nan, probe=reading)
    log.start({})
    log.append(look, Decision("continue", "NaN", {"gain": -math.inf}))
    json.loads(log.path.read_text().splitlines()[1], parse_constant=pytest.fail)
    back = log.decisions()[0].telemetry
    assert math.isnan(back.loss)
    assert (back.compute_limit, back.probe.mean, back.probe.paired_delta) == (math.inf, math.inf, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json\n", "line 1 of .* is no record"),
        ('{"kind": "other"}\n', "line 1 of .* is no record"),
        ("[1]\n", "line 1 of .* is no record"),
        ('{"kind": "header", "format": "hf_eff.governor_log", "format_version": 9}\n', "is no hf_eff.governor_log of"),
        ("", "is no hf_eff.governor_log of version 1"),
    ],
)
def test_what_is_no_log_is_refused(log, text, message):
    log.path.write_text(text)
    with pytest.raises(DataError, match=message):
        log.decisions()


def test_a_log_that_does_not_exist(log):
    with pytest.raises(DataError, match="does not exist"):
        log.decisions()


# replay


class Patience(Governor):
    """Stops after three probes in a row without a gain."""

    bad = 0

    def observe(self, telemetry):
        self.bad = self.bad + 1 if (telemetry.probe.paired_delta or 1.0) <= 0 else 0
        return Decision("stop" if self.bad >= 3 else "continue", f"{self.bad} probes without a gain")


@pytest.mark.parametrize("curve", [falling, rising])
def test_replays_exactly(log, curve):
    pairs = recorded(Tape(curve, limit=144.0, noise=0.02))
    log.start({})
    write(log, pairs)
    assert replay(log.path, governor()) == [decision for _, decision in pairs]
    assert compare(log.path, governor()) == []


def test_another_policy_is_judged_on_the_same_run(log):
    pairs = recorded(Tape(rising, limit=144.0, noise=0.001), explore_floor=1.0)
    log.start({})
    write(log, pairs)
    expected, bad = [], 0
    for look, _ in pairs:
        bad = bad + 1 if look.probe.paired_delta is not None and look.probe.paired_delta <= 0 else 0
        expected.append("stop" if bad >= 3 else "continue")
    assert [each.action for each in replay(log.path, Patience())] == expected
    assert "stop" in expected


def test_a_changed_option_or_a_forged_line_shows(log):
    pairs = recorded()
    log.start({})
    write(log, pairs)
    stricter = MarginalGain(MarginalGainConfig(epsilon=0.2, probe_share=0.1))
    assert compare(log.path, stricter)
    forged = log.path.read_text().splitlines(keepends=True)
    record = json.loads(forged[8])
    record["telemetry"]["probe"]["paired_delta"] += 0.3
    log.path.write_text("".join([*forged[:8], json.dumps(record) + "\n", *forged[9:]]))
    found = compare(log.path, governor())
    assert found[0].step == record["step"]
    assert found[0].logged != found[0].replayed


# modes


@pytest.mark.parametrize("mode", MODES)
def test_only_act_carries_a_decision_out(mode):
    stop, go = Decision("stop", "too little gain", {"gain": 0.1}), Decision("continue", "pays")
    assert effective(go, mode) is go
    done = effective(stop, mode)
    if mode == "act":
        assert done is stop
    else:
        assert done.action == "continue"
        assert "stop: too little gain" in done.reason
        assert done.details == stop.details


def test_an_unknown_mode():
    with pytest.raises(OptionError, match=r"governor_mode must be one of \['observe', 'advise', 'act'\], got 'watch'"):
        effective(Decision("stop", "x"), "watch")
