"""Who leads, who may catch up, and whose next slice is worth its compute.

Each run's readings are one learning curve, fitted as a governor fits its probes. From it a run gets an index, the gain
per compute that its next slice is expected to bring, and a range for its loss if all that is left were spent on it.
The index is held against a threshold shared by all runs, that of the online knapsack problem with densities between
``epsilon * best`` and ``best`` (Zhou, Chakrabarty and Lukose, 2008)::

    tau(z) = (e / epsilon) ** z * epsilon * best / e,      z = spent share of the budget

It rises to ``best``, the highest gain rate seen early, as the budget runs out: what is left is worth more elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hf_eff.contracts.governor import ProbeReading, Telemetry
from hf_eff.engines.gain_thresholds import reservation_rate
from hf_eff.engines.probe_history import FEWEST_PROBES, Outlook, ProbeHistory
from hf_eff.race.plan import RacePlan
from hf_eff.race.record import RaceRecord, Reading, RunRecord

_DISCOUNT, _PRIOR_SCALE, _WINDOW = 0.95, 3.0, 8


@dataclass(frozen=True)
class Standing:
    """One run at the end of a round.

    Attributes:
        name: Its name.
        loss: Held-out loss.
        rate: Gain expected of the next slice per compute, nats per whole budget; None before the curve can be fitted.
        probability: Chance that the next slice gains more than the threshold asks for.
        recent_rate: Robust gain rate over the last readings.
        end, end_sd: Loss expected if all that is left were spent on this run, and its standard deviation.
        verdict: Why it is stopped, else empty.
    """

    name: str
    loss: float
    rate: float | None = None
    probability: float | None = None
    recent_rate: float | None = None
    end: float | None = None
    end_sd: float | None = None
    verdict: str = ""


def threshold(spent_share: float, best_rate: float, epsilon: float) -> float:
    """Least gain rate that is worth its compute; 0 without a scale.

    Args:
        spent_share: z in [0, 1].
        best_rate: Highest gain rate seen early, nats per whole budget.
        epsilon: Lowest density relative to it, in [0, 1].
    """
    if epsilon <= 0.0 or best_rate <= 0.0:
        return 0.0
    return reservation_rate(spent_share, best_rate, epsilon)


def best_rate(runs: Iterable[RunRecord]) -> float:
    """Highest gain per compute between two readings of a run; 0 when none gained."""
    rates = [
        (now.paired_delta or 0.0) / (now.position - before.position)
        for run in runs
        for before, now in zip(run.readings, run.readings[1:], strict=False)
        if now.position > before.position
    ]
    return max(0.0, *rates) if rates else 0.0


def judge(plan: RacePlan, record: RaceRecord) -> list[Standing]:
    """Compare all runs at the end of a round; live ones may get a verdict.

    A run is stopped when its loss is not finite; when its next slice probably gains less than the threshold asks for
    and its last readings agree; or when it is dominated: even by the lower end of its range, all that is left would
    not bring it to what the leader has now. What the leader may still gain does not count: no run is stopped for
    another's extrapolation.
    """
    left = record.left_share()
    asked = threshold(1.0 - left, record.best_rate, plan.epsilon)
    step = min(plan.slice_share, left)
    standings = [
        _forecast(run, left, step, asked) if not run.ended else Standing(run.name, run.loss)
        for run in record.runs.values()
        if not run.failed
    ]
    judged = []
    for each in standings:
        reason = "" if record.runs[each.name].ended else _verdict(plan, each, standings, asked)
        judged.append(Standing(**{**vars(each), "verdict": reason}))
    return judged


def telemetry(readings: Sequence[Reading]) -> list[Telemetry]:
    """The readings as a governor would have seen them; compute counts in shares of the shared budget."""
    looks, peak, last = [], 0.0, 0.0
    for place, reading in enumerate(readings):
        # Before the first step there is no rate yet; the one that training began with stands in for it.
        later = readings[min(place + 1, len(readings) - 1)].learning_rate
        rate = reading.learning_rate if reading.learning_rate is not None else later or 0.0
        rising = place > 0 and rate > last * (1.0 + 1e-9)
        peak = max(peak, rate)
        mean = math.nan if reading.mean is None else reading.mean
        looks.append(
            Telemetry(
                step=reading.step,
                max_steps=0,
                spent={},
                limits={},
                compute=reading.position,
                compute_limit=1.0,
                probe=ProbeReading(mean, reading.paired_delta, reading.paired_se, 0),
                learning_rate=rate,
                peak_learning_rate=peak,
                in_warmup=rising,
            )
        )
        last = rate
    return looks


def outlook_of(readings: Sequence[Reading]) -> Outlook | None:
    """The curve through a run's readings; None while there are too few since it began or broke."""
    history = ProbeHistory(discount=_DISCOUNT, prior_scale=_PRIOR_SCALE, window=_WINDOW)
    looks = telemetry(readings)
    for look in looks:
        history.take_in(look)
    if not looks or history.since_break < FEWEST_PROBES:
        return None
    return history.outlook(looks[-1])


def _forecast(run: RunRecord, left: float, step: float, asked: float) -> Standing:
    outlook = outlook_of(run.readings)
    if outlook is None or not math.isfinite(run.loss) or step <= 0.0:
        return Standing(run.name, run.loss)
    ahead = outlook.forecast(step, asked * step)
    level, spread = outlook.posterior.predict(outlook.now + left * outlook.per_compute)
    # The curve starts at 0 and is smooth; its drop from here on is what the run's own loss is lowered by.
    return Standing(
        name=run.name,
        loss=run.loss,
        rate=ahead.gain / step,
        probability=ahead.probability,
        recent_rate=outlook.recent_rate,
        end=run.loss + level - outlook.level,
        end_sd=spread,
    )


def _verdict(plan: RacePlan, run: Standing, standings: Sequence[Standing], asked: float) -> str:
    if not math.isfinite(run.loss):
        return "held-out loss is not finite"
    if run.end is None or run.end_sd is None or run.probability is None or run.recent_rate is None:
        return ""
    if run.probability < plan.delta and run.recent_rate < asked:
        return f"gain rate {run.rate:.3g} is below the threshold {asked:.3g}"
    leader = min(standings, key=lambda other: other.loss)
    lowest = run.end - plan.margin * run.end_sd
    if lowest > leader.loss:
        return f"dominated by {leader.name}: {lowest:.4g} at best, against {leader.loss:.4g} already"
    return ""
