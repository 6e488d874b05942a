"""Where policies stop on synthetic curves, and what that costs.

Compute has a price, and a probe costs compute like training does::

    J = L(c) + price * (c + probes * probe_cost),    regret = J where a policy stops - least J without probes

A policy that takes no price is judged by the same J.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from hf_eff.contracts.governor import Decision, Governor, ProbeReading, Telemetry
from hf_eff.governor import new_governor
from hf_eff.registry import get_method
from hf_eff.report.markdown import table
from hf_eff.simulation.curves import INSIDE, OUTSIDE, SMOOTH, STEPS, Curve, make_curves
from hf_eff.simulation.rivals import PROBES, RIVALS

PROBE_COST = 0.0003
"""Share of the budget that a probe costs."""
GOVERNOR = "marginal_gain"
"""The policy that the criteria are about."""
FAR = 0.1
"""Share of the budget by which a stop is called early or late."""


@dataclass(frozen=True)
class Aims:
    """What a user may tell a governor.

    Attributes:
        price: Nats that a unit of the governing currency must buy.
        target: Loss that is good enough, nats.
    """

    price: float
    target: float


Maker = Callable[[Aims], Governor]


def registered(name: str, options: Mapping[str, Any], aims: Aims) -> Governor:
    """A registered governor, told the price or the target where it can be; ``options`` come first.

    Raises:
        UnknownMethodError: The name is not registered.
        OptionError: An option is not one of its own.
    """
    fields = {field.name: field for field in dataclasses.fields(get_method("governor", name).config)}
    thresholds = fields["threshold"].metadata.get("choices") if "threshold" in fields else None
    if thresholds and "price" in thresholds:
        told: dict[str, Any] = {"threshold": "price", "price": aims.price}
    else:
        told = {each: getattr(aims, each) for each in ("price", "target") if each in fields}
    return new_governor(name, {**told, **options})


def policies() -> dict[str, Maker]:
    """What compute priced in nats is for: ``marginal_gain``, the habitual rules and the slope rules."""
    makers: dict[str, Maker] = {label: partial(registered, *entry) for label, entry in _PRICED.items()}
    return makers | {label: partial(_rival, label) for label in RIVALS}


def unpriced_policies() -> dict[str, Maker]:
    """Governors that no price tells what to do: two thresholds of their own, and a loss to reach."""
    return {label: partial(registered, label, {}) for label in _UNPRICED}


_PRICED: dict[str, tuple[str, dict[str, Any]]] = {
    GOVERNOR: (GOVERNOR, {}),
    "patience-3": ("patience", {"patience": 3, "probes": PROBES}),
    "patience-10": ("patience", {"patience": 10, "probes": PROBES}),
    "patience-3, 40 probes": ("patience", {"patience": 3, "probes": 40}),
    "fixed-1/3": ("fixed", {"share": 1 / 3}),
    "full": ("budget", {}),
}
_UNPRICED = ("tail", "reservation", "target")


def _rival(label: str, aims: Aims) -> Governor:
    return RIVALS[label](aims.price)


@dataclass(frozen=True)
class Stop:
    """Where a policy ended a run.

    Attributes:
        share: Share of the budget that went into training.
        probed: Share that went into probes.
    """

    share: float
    probed: float


def watch(governor: Governor, curve: Curve, probe_cost: float = PROBE_COST) -> Iterator[tuple[Telemetry, Decision]]:
    """Show a curve to a fresh governor, step by step, until the budget of 1 is spent.

    Yields:
        look: What it saw.
        decision: What it decided; the run goes on all the same.
    """
    noise, probes, previous = curve.probe_noise(), 0, None
    peaks = np.maximum.accumulate(curve.learning_rate[1:]).tolist()
    for step in range(1, STEPS + 1):
        if step / STEPS + probes * probe_cost > 1.0:
            return
        look = _look(curve, step, probes * probe_cost, peaks[step - 1])
        if look.compute + probe_cost <= 1.0 and governor.next_probe(look, probe_cost):
            probes += 1
            mean = float(curve.loss[step]) + next(noise)
            look = _look(curve, step, probes * probe_cost, peaks[step - 1])
            look = dataclasses.replace(look, probe=_reading(mean, previous, curve.noise))
            previous = mean
        yield look, governor.observe(look)


def ends(decision: Decision) -> bool:
    """Whether a decision ends the run; nothing is left to decide once the learning rate is being lowered."""
    return decision.action in ("stop", "cooldown")


def play(governor: Governor, curve: Curve, probe_cost: float = PROBE_COST) -> Stop:
    """Where a fresh governor ends a run: at its first stop, or where the budget is spent."""
    look = None
    for look, decision in watch(governor, curve, probe_cost):  # noqa: B007 - the last look counts
        if ends(decision):
            break
    return Stop(0.0, 0.0) if look is None else Stop(look.step / STEPS, look.probe_spent)


def _look(curve: Curve, step: int, probed: float, peak: float) -> Telemetry:
    """What a trainer would report after a step, in units of which the budget has 1."""
    spent = step / STEPS + probed
    return Telemetry(
        step=step,
        max_steps=STEPS,
        spent={"flops": spent},
        limits={"flops": 1.0},
        compute=spent,
        compute_limit=1.0,
        learning_rate=float(curve.learning_rate[step]),
        peak_learning_rate=peak,
        probe_spent=probed,
        overhead_spent=probed,
    )


def _reading(mean: float, previous: float | None, noise: float) -> ProbeReading:
    """A reading whose paired error is that of two levels of this noise."""
    if previous is None:
        return ProbeReading(mean=mean, paired_delta=None, paired_se=None, num_examples=128)
    return ProbeReading(mean=mean, paired_delta=previous - mean, paired_se=math.sqrt(2.0) * noise, num_examples=128)


def aims_of(curve: Curve) -> Aims:
    """Its price, and nine tenths of the gain that it has to give as a target."""
    start, best = float(curve.loss[0]), float(curve.loss.min())
    return Aims(curve.price, start - 0.9 * (start - best))


@dataclass(frozen=True)
class PolicyRow:
    """How one policy did on many curves.

    Attributes:
        policy: Its name.
        mean: Mean regret, nats.
        se: Standard error of it.
        median: Median regret.
        p90: Nine of ten curves cost less regret.
        families: Mean regret by family.
        share: Mean share of the budget spent on training.
        early: Share of the curves that it stopped more than ``FAR`` before the best stop.
        late: The same, after it.
        forgone: Mean share of the attainable gain that was not had.
    """

    policy: str
    mean: float
    se: float
    median: float
    p90: float
    families: dict[str, float]
    share: float
    early: float
    late: float
    forgone: float


def judge(label: str, maker: Maker, curves: Sequence[Curve], probe_cost: float = PROBE_COST) -> PolicyRow:
    """Play all curves to one policy, a fresh governor each; there must be two or more."""
    stops = [play(maker(aims_of(curve)), curve, probe_cost) for curve in curves]
    pairs = list(zip(curves, stops, strict=True))
    regrets = np.array([curve.regret(stop.share, stop.share + stop.probed) for curve, stop in pairs])
    ahead = np.array([stop.share - curve.best_stop for curve, stop in pairs])
    names = [curve.family for curve in curves]
    families = {name: [regrets[i] for i, each in enumerate(names) if each == name] for name in dict.fromkeys(names)}
    return PolicyRow(
        policy=label,
        mean=float(regrets.mean()),
        se=float(regrets.std(ddof=1) / math.sqrt(len(regrets))),
        median=float(np.median(regrets)),
        p90=float(np.quantile(regrets, 0.9)),
        families={name: float(np.mean(values)) for name, values in families.items()},
        share=float(np.mean([stop.share for stop in stops])),
        early=float(np.mean(ahead < -FAR)),
        late=float(np.mean(ahead > FAR)),
        forgone=float(np.mean([_forgone(curve, stop) for curve, stop in pairs])),
    )


def _forgone(curve: Curve, stop: Stop) -> float:
    best = float(curve.loss.min())
    return (curve.loss_at(stop.share) - best) / (float(curve.loss[0]) - best)


@dataclass(frozen=True)
class Criterion:
    """One thing that was to be shown, fixed before it was measured.

    Attributes:
        claim: What.
        value: What came out.
        bound: What it must not pass.
    """

    claim: str
    value: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether it was shown."""
        return self.value <= self.bound


def criteria(rows: Sequence[PolicyRow]) -> list[Criterion]:
    """The claims about ``marginal_gain`` on the families ``INSIDE``."""
    by_name = {row.policy: row for row in rows}
    ours = by_name[GOVERNOR]
    rival = min(by_name[name].mean for name in RIVALS)
    smooth = float(np.mean([ours.families[family] for family in SMOOTH]))
    return [
        Criterion("mean regret against half of patience-3's", ours.mean, 0.5 * by_name["patience-3"].mean),
        Criterion("mean regret against half of fixed-1/3's", ours.mean, 0.5 * by_name["fixed-1/3"].mean),
        Criterion("mean regret against 1.1 times the best slope rule's", ours.mean, 1.1 * rival),
        Criterion("mean regret on smooth curves, nats", smooth, 0.02),
    ]


def stop_tables(
    seeds: range, more: Mapping[str, Maker] | None = None, probe_cost: float = PROBE_COST
) -> dict[str, list[PolicyRow]]:
    """Regret over one curve a seed.

    Args:
        seeds: Of the curves ``inside``; ``outside`` has every second one, ``unpriced`` every fourth.
        more: Policies besides the shipped ones, by label.
        probe_cost: Share of the budget.

    Returns:
        ``inside`` and, apart, ``outside`` the estimator's grid; ``unpriced``: other governors, on all families.
    """
    chosen = {**policies(), **(more or {})}
    sets = {
        "inside": (chosen, make_curves(INSIDE, seeds)),
        "outside": (chosen, make_curves(OUTSIDE, seeds[: len(seeds) // 2])),
        "unpriced": (unpriced_policies(), make_curves((*INSIDE, *OUTSIDE), seeds[: len(seeds) // 4])),
    }
    return {
        name: [judge(label, maker, curves, probe_cost) for label, maker in makers.items()]
        for name, (makers, curves) in sets.items()
    }


def render_rows(rows: Sequence[PolicyRow]) -> str:
    """Markdown table."""
    families = list(rows[0].families)
    head = ["policy", "mean (se)", "median", "p90", *families, "mean C", "early", "late", "gain forgone"]
    cells = [
        [
            row.policy,
            f"{row.mean:.3f} ({row.se:.3f})",
            f"{row.median:.3f}",
            f"{row.p90:.3f}",
            *(f"{row.families[family]:.3f}" for family in families),
            f"{row.share:.2f}",
            f"{row.early:.2f}",
            f"{row.late:.2f}",
            f"{row.forgone:.3f}",
        ]
        for row in rows
    ]
    return table(head, cells)


def render_criteria(checked: Sequence[Criterion]) -> str:
    """Markdown table."""
    cells = [[each.claim, f"{each.value:.4f}", f"{each.bound:.4f}", "yes" if each.holds else "NO"] for each in checked]
    return table(["marginal_gain", "value", "at most", "holds"], cells)
