from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from hf_eff.contracts.governor import Decision, Governor, ProbeReading, Telemetry
from hf_eff.errors import DataError
from hf_eff.governor import GovernorLog
from hf_eff.simulation.traces import PRICES, read_trace, read_traces, render_traces, stop_of, trace_rows

LOOKS = 40
RECORDED = Path(__file__).parents[2] / "benchmarks" / "traces"


def write_log(path, seen, test, *, probed=True):
    log = GovernorLog(path)
    log.start({"trace": path.stem})
    for index, level in enumerate(seen):
        delta = seen[index - 1] - level if index else None
        reading = ProbeReading(level, delta, None if delta is None else 0.01, 64) if probed else None
        look = Telemetry(
            step=index + 1,
            max_steps=len(seen),
            spent={"flops": 1e9 * (index + 1)},
            limits={},
            compute=1e9 * (index + 1),
            compute_limit=1e9 * len(seen),
            probe=reading,
            learning_rate=1e-3,
            peak_learning_rate=1e-3,
        )
        log.append(look, Decision("continue", "nobody stops it"))
    log.finish({"test_loss": test})


@pytest.fixture
def overfit(tmp_path):
    """A run whose held-out loss turns after 20 of 40 looks; what it tests on differs from what it sees."""
    seen = [2.0 - 0.05 * min(i, 19) + 0.04 * max(0, i - 19) for i in range(LOOKS)]
    write_log(tmp_path / "overfit.jsonl", seen, [level + 0.1 + 0.06 * math.sin(2 * i) for i, level in enumerate(seen)])
    return read_trace(tmp_path / "overfit.jsonl")


class StopsAt(Governor):
    def __init__(self, look, action="stop"):
        self.look, self.action, self.seen = look, action, 0

    def observe(self, telemetry):
        self.seen += 1
        return Decision(self.action if self.seen > self.look else "continue", "by hand")


def test_the_best_probe_so_far_is_what_is_kept(overfit):
    seen, test = overfit.seen.tolist(), overfit.test.tolist()
    for stop in range(LOOKS):
        best = min(range(stop + 1), key=lambda i: seen[i])
        assert overfit.restored[stop] == test[best]
    assert min(test) < overfit.restored[-1] == test[19] < test[-1]


def test_regret_is_loss_and_price_above_the_least(overfit):
    for price in (0.03, 1.0, 3.0):
        costs = [overfit.restored[i] + price * (i + 1) / LOOKS for i in range(LOOKS)]
        assert [overfit.regret(i, price) for i in range(LOOKS)] == pytest.approx(np.array(costs) - min(costs))


@pytest.mark.parametrize("action", ["stop", "cooldown"])
def test_the_stop_is_the_first_one(overfit, action):
    assert stop_of(overfit, StopsAt(12, action)) == 12
    assert stop_of(overfit, StopsAt(10**6)) == LOOKS - 1


def test_what_a_governor_is_told(overfit):
    aims = overfit.aims(2.0)
    assert aims.price == pytest.approx(2.0 / (LOOKS * 1e9))
    assert aims.target == pytest.approx(2.0 - 0.9 * 19 * 0.05)


def test_rows_are_means_over_traces_and_prices(overfit, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_eff.simulation.traces.policies", dict)
    monkeypatch.setattr("hf_eff.simulation.traces.unpriced_policies", dict)
    write_log(
        tmp_path / "falling.jsonl", [3.0 - 0.02 * i for i in range(LOOKS)], [3.0 - 0.02 * i for i in range(LOOKS)]
    )
    traces = read_traces(tmp_path)
    assert [trace.name for trace in traces] == ["falling", "overfit"]
    (row,) = trace_rows(traces, {"twelfth": lambda aims: StopsAt(11)})
    regrets = {trace.name: [trace.regret(11, price) for price in PRICES] for trace in traces}
    assert row.policy == "twelfth"
    assert row.traces == {name: pytest.approx(np.mean(values)) for name, values in regrets.items()}
    assert row.mean == pytest.approx(np.mean([value for values in regrets.values() for value in values]))
    assert row.worst == pytest.approx(max(value for values in regrets.values() for value in values))
    assert row.share == pytest.approx(12 / LOOKS)
    assert "| twelfth |" in render_traces([row])


def test_prices_are_nine_and_cover_two_decades():
    assert len(PRICES) == 9
    assert (PRICES[0], PRICES[-1]) == pytest.approx((0.03, 3.0))


@pytest.mark.parametrize(
    ("seen", "test", "probed", "message"),
    [
        ([2.0, 1.9, 1.8], [2.0, 1.9], True, "3 probes and 2 values"),
        ([2.0, 1.9, 1.8], [2.0, 1.9, 1.8], False, "each with a probe"),
        ([2.0], [2.0], True, "two looks or more"),
    ],
)
def test_logs_of_another_kind_are_refused(tmp_path, seen, test, probed, message):
    write_log(tmp_path / "run.jsonl", seen, test, probed=probed)
    with pytest.raises(DataError, match=message):
        read_trace(tmp_path / "run.jsonl")


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no recorded runs"):
        read_traces(tmp_path)


# the runs that are shipped


def test_the_recorded_runs_are_whole_small_and_learnt_something():
    traces = {trace.name: trace for trace in read_traces(RECORDED)}
    assert set(traces) == {"constant", "constant_fast", "cosine", "small_data"}
    assert sum(trace.path.stat().st_size for trace in traces.values()) < 200_000
    for trace in traces.values():
        assert trace.shares[-1] == pytest.approx(1.0)
        assert trace.restored[-1] < trace.test[0] - 1.0
        for before, after in itertools.pairwise(trace.looks):
            assert after.probe.paired_delta == pytest.approx(before.probe.mean - after.probe.mean, abs=2e-5)
    assert traces["small_data"].test[-1] > traces["small_data"].test.min() + 0.3
    assert traces["cosine"].looks[-1].learning_rate < 1e-5
