"""Stopping policies replayed on recorded training runs that nobody stopped.

A stop changes nothing that came before it, so what a policy would have paid is exact: the loss of the best probe up to
its stop, whose weights are put back, plus the price of the compute up to the stop. The loss is that of other held-out
rows than the governor saw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hf_eff.contracts.governor import Governor, Telemetry
from hf_eff.errors import DataError
from hf_eff.governor import GovernorLog, LoggedDecision, outcome
from hf_eff.report.markdown import table
from hf_eff.simulation.stopping import Aims, Maker, policies, unpriced_policies

PRICES: tuple[float, ...] = tuple(float(price) for price in np.geomspace(0.03, 3.0, 9))
"""Nats that the whole budget must buy."""


@dataclass(frozen=True)
class Trace:
    """One recorded run.

    Attributes:
        path: Its governor log.
        records: [n] one a probe.
        test: [n] mean loss of rows that no governor sees, at the same moments.
    """

    path: Path
    records: tuple[LoggedDecision, ...]
    test: np.ndarray

    @property
    def looks(self) -> list[Telemetry]:
        """[n] what a governor sees at each probe."""
        return [record.telemetry for record in self.records]

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.path.stem

    @property
    def shares(self) -> np.ndarray:
        """[n] compute spent at each look, as a share of the whole run's."""
        return np.array([look.compute / look.compute_limit for look in self.looks])

    @property
    def seen(self) -> np.ndarray:
        """[n] mean of each probe."""
        return np.array([look.probe.mean for look in self.looks if look.probe is not None])

    @property
    def restored(self) -> np.ndarray:
        """[n] test loss of the weights that had the best probe up to each look."""
        best = [int(np.argmin(self.seen[: count + 1])) for count in range(len(self.records))]
        return self.test[best]

    def aims(self, price: float) -> Aims:
        """What to tell a governor: ``price`` is for the whole budget, the target nine tenths of the gain."""
        seen = self.seen
        return Aims(price / self.records[0].telemetry.compute_limit, float(seen[0] - 0.9 * (seen[0] - seen.min())))

    def regret(self, stop: int, price: float) -> float:
        """Loss plus price at a look, above the least over all looks."""
        paid = self.restored + price * self.shares
        return float(paid[stop] - paid.min())


def read_trace(path: Path) -> Trace:
    """Read a log whose footer has ``test_loss``, one value a probe.

    Raises:
        DataError: It is no such log.
    """
    log = GovernorLog(path)
    records = tuple(log.decisions())
    test = np.array((log.summary() or {}).get("test_loss", ()), dtype=np.float64)
    if len(records) < 2 or any(record.telemetry.probe is None for record in records):
        raise DataError(f"{str(path)!r} is no recorded run: it needs two looks or more, each with a probe.")
    if len(test) != len(records):
        raise DataError(f"{str(path)!r} has {len(records)} probes and {len(test)} values of 'test_loss' in its footer.")
    return Trace(path, records, test)


def read_traces(folder: Path) -> list[Trace]:
    """All traces of a folder, by name.

    Raises:
        DataError: It has none.
    """
    paths = sorted(folder.glob("*.jsonl"))
    if not paths:
        raise DataError(f"{str(folder)!r} holds no recorded runs (*.jsonl); benchmarks/governor_traces.py makes some.")
    return [read_trace(path) for path in paths]


def stop_of(trace: Trace, governor: Governor) -> int:
    """Index of the look at which a fresh governor ends the run; the last one when it never does."""
    end = outcome(trace.records, governor)
    return [record.telemetry.step for record in trace.records].index(end.step)


@dataclass(frozen=True)
class TraceRow:
    """How one policy did over traces and prices.

    Attributes:
        policy: Its name.
        mean: Mean regret, nats.
        worst: Largest regret.
        traces: Mean regret by trace.
        share: Mean share of the run that was trained.
    """

    policy: str
    mean: float
    worst: float
    traces: dict[str, float]
    share: float


def trace_rows(traces: Sequence[Trace], more: Mapping[str, Maker] | None = None) -> list[TraceRow]:
    """Every policy, shipped or in ``more``, on every trace at every price."""
    chosen = {**policies(), **unpriced_policies(), **(more or {})}
    return [_row(label, maker, traces) for label, maker in chosen.items()]


def _row(label: str, maker: Maker, traces: Sequence[Trace]) -> TraceRow:
    regrets, shares = {}, []
    for trace in traces:
        stops = [stop_of(trace, maker(trace.aims(price))) for price in PRICES]
        regrets[trace.name] = [trace.regret(stop, price) for stop, price in zip(stops, PRICES, strict=True)]
        shares += trace.shares[stops].tolist()
    everything = np.array(list(regrets.values()))
    return TraceRow(
        policy=label,
        mean=float(everything.mean()),
        worst=float(everything.max()),
        traces={name: float(np.mean(values)) for name, values in regrets.items()},
        share=float(np.mean(shares)),
    )


def render_traces(rows: Sequence[TraceRow]) -> str:
    """Markdown table."""
    names = list(rows[0].traces)
    cells = [
        [row.policy, *(f"{value:.3f}" for value in (row.mean, row.worst, *row.traces.values())), f"{row.share:.2f}"]
        for row in rows
    ]
    return table(["policy", "mean", "worst", *names, "mean C"], cells)
