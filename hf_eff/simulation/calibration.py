"""Whether the chances that ``marginal_gain`` states come true, and its predictions of the next probe.

At each of its checks it says how likely the next stretch is to gain more than its price; here the run goes on, so the
gain is known. A check is not independent of the one before: the counts overstate how much is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from hf_eff.contracts.governor import Decision, Telemetry
from hf_eff.engines.probe_history import FEWEST_PROBES, ProbeHistory
from hf_eff.governor import replay
from hf_eff.registry import get_method
from hf_eff.report.markdown import table
from hf_eff.simulation.curves import STEPS, Curve
from hf_eff.simulation.stopping import GOVERNOR, aims_of, registered, watch
from hf_eff.simulation.traces import PRICES, Trace

BINS = 10
Check = tuple[float, bool]
"""Stated chance of a gain above the threshold, and whether there was one."""


@dataclass(frozen=True)
class Calibration:
    """Stated chances against what came.

    Attributes:
        checks: Number of stated chances.
        brier: Mean squared error of the chances; 0 is perfect.
        brier_of_rate: The same, had each been the share of gains above the threshold.
        counts: [BINS] checks whose chance lies in each tenth.
        stated: [BINS] mean chance in it; None where there is none.
        came: [BINS] share of gains above the threshold in it; None where there is none.
        predictions: Number of predicted probes.
        ranks: [BINS] share of the probes in each tenth of their predicted distribution; 0.1 each is perfect.
        distance: Kolmogorov-Smirnov distance of those ranks from even ones.
    """

    checks: int
    brier: float
    brier_of_rate: float
    counts: list[int]
    stated: list[float | None]
    came: list[float | None]
    predictions: int
    ranks: list[float]
    distance: float


def calibration_on_curves(curves: Sequence[Curve], probe_cost: float) -> Calibration:
    """On synthetic curves, each at its own price and played to the end; gains are noiseless."""
    checks: list[Check] = []
    ranks: list[float] = []
    for curve in curves:
        seen = list(watch(registered(GOVERNOR, {}, aims_of(curve)), curve, probe_cost))
        checks += _checks(seen, partial(_gain_on, curve))
        ranks += next_probe_ranks(look for look, _ in seen)
    return summarise(checks, ranks)


def _gain_on(curve: Curve, look: Telemetry, stretch: float) -> float:
    start = look.step / STEPS
    return curve.loss_at(start) - curve.loss_at(start + stretch)


def calibration_on_traces(traces: Sequence[Trace]) -> Calibration:
    """On recorded runs at all prices; gains are those of rows that the governor does not see."""
    checks: list[Check] = []
    ranks: list[float] = []
    for trace in traces:
        for price in PRICES:
            decisions = replay(trace.path, registered(GOVERNOR, {}, trace.aims(price)))
            seen = list(zip(trace.looks, decisions, strict=True))
            checks += _checks(seen, partial(_gain_of, trace))
        ranks += next_probe_ranks(trace.looks)
    return summarise(checks, ranks)


def _gain_of(trace: Trace, look: Telemetry, stretch: float) -> float:
    compute = [each.compute for each in trace.looks]
    before, after = np.interp([look.compute, look.compute + stretch], compute, trace.test)
    return float(before - after)


def _checks(seen: Sequence[tuple[Telemetry, Decision]], gain: Callable[[Telemetry, float], float]) -> list[Check]:
    """One for each decision that states a chance; ``gain(look, stretch)`` is what the stretch brought."""
    facts = [(look, each.details) for look, each in seen if "probability" in each.details]
    return [(float(said["probability"]), gain(look, said["stretch"]) > said["needed"]) for look, said in facts]


def next_probe_ranks(looks: Iterable[Telemetry]) -> list[float]:
    """Rank in [0, 1] of each probe in the distribution that the probes before it predict."""
    config: Any = get_method("governor", GOVERNOR).config()
    history = ProbeHistory(discount=config.discount, prior_scale=config.prior_scale, window=config.slope_window)
    ranks: list[float] = []
    previous: Telemetry | None = None
    level = 0.0
    for look in looks:
        predicted = None if previous is None else _predicted(history, previous, look)
        if look.probe is None or not history.take_in(look):
            continue
        level -= look.probe.paired_delta or 0.0
        if predicted is not None:
            mean, sd = predicted
            ranks.append(0.5 * math.erfc((mean - level) / (sd * math.sqrt(2.0))))
        previous = look
    return ranks


def _predicted(history: ProbeHistory, previous: Telemetry, look: Telemetry) -> tuple[float, float] | None:
    """Mean and standard deviation of the level at ``look``; None while there are too few probes."""
    if look.probe is None or history.since_break < FEWEST_PROBES:
        return None
    outlook = history.outlook(previous)
    trained = look.compute - previous.compute - (look.probe_spent - previous.probe_spent)
    return outlook.posterior.predict(outlook.now + trained * outlook.per_compute)


def summarise(checks: Sequence[Check], ranks: Sequence[float]) -> Calibration:
    """Counts and scores; there must be one or more of both."""
    chance = np.array([each for each, _ in checks])
    came = np.array([float(each) for _, each in checks])
    tenth = np.minimum((chance * BINS).astype(int), BINS - 1)
    counts = np.bincount(tenth, minlength=BINS)
    shares = np.histogram(ranks, bins=BINS, range=(0.0, 1.0))[0] / len(ranks)
    ordered = np.sort(ranks)
    edges = np.arange(len(ordered) + 1) / len(ordered)
    return Calibration(
        checks=len(chance),
        brier=float(np.mean((chance - came) ** 2)),
        brier_of_rate=float(came.mean() * (1.0 - came.mean())),
        counts=counts.tolist(),
        stated=[float(chance[tenth == each].mean()) if counts[each] else None for each in range(BINS)],
        came=[float(came[tenth == each].mean()) if counts[each] else None for each in range(BINS)],
        predictions=len(ordered),
        ranks=shares.tolist(),
        distance=float(np.max(np.maximum(edges[1:] - ordered, ordered - edges[:-1]))),
    )


def render_calibration(found: Calibration) -> str:
    """Markdown table of the tenths, and a line of scores."""
    rows = [
        [
            f"{each / BINS:.1f} to {(each + 1) / BINS:.1f}",
            found.counts[each],
            _number(found.stated[each]),
            _number(found.came[each]),
            f"{found.ranks[each]:.3f}",
        ]
        for each in range(BINS)
    ]
    scores = (
        f"{found.checks} checks: Brier score {found.brier:.3f}, {found.brier_of_rate:.3f} for a constant chance. "
        f"{found.predictions} predicted probes: Kolmogorov-Smirnov distance of their ranks {found.distance:.3f}."
    )
    head = ["tenth", "checks", "chance stated", "gain came", "probes with such a rank"]
    return f"{table(head, rows)}\n\n{scores}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
