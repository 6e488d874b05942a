"""What refresh policies lose on problems whose staleness is known.

The budget is 1. Rows of age s teach at the rate 1 + u exp(-s / h) of stale ones; a refresh costs c and makes s = 0. The
logarithm of the loss falls by ln(1 + k P) / k with P the integral of that rate: by P itself at k = 0, as a power law in
effective training at k > 0. The regret of a policy is the logarithm of its final loss less that of the best period in
hindsight, never among them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_eff.contracts.governor import DriftReading, Offer, ProbeReading, Telemetry
from hf_eff.engines.reallocation_rule import ReallocationRule
from hf_eff.numerics.refresh_law import fresh_gain, optimal_age, refresh_surplus
from hf_eff.numerics.robust_slope import robust_slope

UPLIFTS = (0.0, 0.3, 1.0, 3.0)
LIFETIMES = (0.02, 2.0)
COSTS = (0.003, 0.16)
NOISES = (0.003, 0.03)
"""Standard deviation of one probe, in the logarithm of the loss."""
LOOKS = 120
"""Probes a budget."""
PROBE_COST = 0.0002
DRIFT_EXAMPLES = 64
PERIODS = (*np.geomspace(0.005, 0.9, 48).tolist(), math.inf)
"""Periods that hindsight chooses from."""
SLOPE_PROBES = 8
SLACK = 0.7
"""The undamped policy refreshes when the slope is below this share of its best."""


@dataclass(frozen=True)
class Problem:
    """One run to be.

    Attributes:
        uplift: u, how much faster fresh rows teach.
        lifetime: h, share of the budget in which freshness falls to 1/e.
        cost: c of a refresh, share of the budget.
        noise: Standard deviation of one probe.
        bend: k, how much returns diminish.
        seed: Seed of the noise.
    """

    uplift: float
    lifetime: float
    cost: float
    noise: float
    bend: float
    seed: int


@dataclass
class Run:
    """State of one simulated run; all amounts are shares of the budget.

    Attributes:
        problem: Its truth.
        spent: Compute spent.
        overhead: Part of it spent on probes and refreshes.
        age: Training since the rows were chosen.
        effective: P, training in units of that on stale rows.
        refreshes: Refreshes so far.
        levels: What the probes read.
        clocks: Training compute at each.
        phases: Refreshes at each.
        generator: Source of the noise.
    """

    problem: Problem
    spent: float = 0.0
    overhead: float = 0.0
    age: float = 0.0
    effective: float = 0.0
    refreshes: int = 0
    levels: list[float] = field(default_factory=list)
    clocks: list[float] = field(default_factory=list)
    phases: list[int] = field(default_factory=list)
    generator: np.random.Generator = field(default_factory=np.random.default_rng)

    @property
    def remaining(self) -> float:
        """Budget left."""
        return 1.0 - self.spent

    @property
    def log_loss(self) -> float:
        """Logarithm of the loss, relative to the start."""
        bend = self.problem.bend
        return -math.log1p(bend * self.effective) / bend if bend else -self.effective

    def train(self, amount: float) -> None:
        """Spend ``amount`` on training."""
        uplift, lifetime = self.problem.uplift, self.problem.lifetime
        freshness = math.exp(-self.age / lifetime)
        self.effective += fresh_gain(amount, uplift * freshness, lifetime)
        self.age += amount
        self.spent += amount

    def refresh(self) -> None:
        """Choose rows again."""
        self.spent += self.problem.cost
        self.overhead += self.problem.cost
        self.age = 0.0
        self.refreshes += 1

    def probe(self) -> None:
        """Pay for a probe and note what it reads."""
        self.spent += PROBE_COST
        self.overhead += PROBE_COST
        self.levels.append(self.log_loss + float(self.generator.normal(0.0, self.problem.noise)))
        self.clocks.append(self.spent - self.overhead)
        self.phases.append(self.refreshes)

    def recent_rate(self, probes: int) -> float | None:
        """Theil-Sen slope of the last probes on these rows, as a gain; None below two."""
        since = min(probes, sum(phase == self.refreshes for phase in self.phases))
        return -robust_slope(self.clocks, self.levels, since) if since >= 2 else None


Policy = Callable[[Run], bool]
"""Whether to refresh now; asked after each probe, while a refresh can be paid."""


def make_problems(seed: int, count: int, bend: float = 0.0) -> list[Problem]:
    """Problems with each uplift equally often; lifetimes, costs and noise log-uniform."""
    generator = np.random.default_rng([seed, 4])
    problems = []
    for index, uplift in zip(range(count), itertools.cycle(UPLIFTS)):
        lifetime, cost, noise = (
            float(math.exp(generator.uniform(math.log(low), math.log(high))))
            for low, high in (LIFETIMES, COSTS, NOISES)
        )
        problems.append(Problem(uplift, lifetime, cost, noise, bend, seed=index))
    return problems


def play(problem: Problem, policy: Policy, seed: int = 0, *, probing: bool = True) -> Run:
    """Spend the budget, asking ``policy`` after each of ``LOOKS`` equal stretches of training."""
    run = Run(problem, generator=np.random.default_rng([seed, problem.seed, 5]))
    stretch = 1.0 / LOOKS
    while run.remaining > 1e-12:
        run.train(min(stretch, run.remaining))
        if probing and run.remaining > PROBE_COST:
            run.probe()
        if problem.cost < run.remaining and policy(run):
            run.refresh()
    return run


def play_period(problem: Problem, period: float) -> float:
    """Logarithm of the final loss when rows are chosen again after each ``period`` of training."""
    run = Run(problem)
    while run.remaining > period + problem.cost:
        run.train(period)
        run.refresh()
    run.train(run.remaining)
    return run.log_loss


def best_in_hindsight(problem: Problem) -> float:
    """Least final logarithm of the loss among all ``PERIODS``."""
    return min(play_period(problem, period) for period in PERIODS)


def know_all(run: Run) -> bool:
    """The refresh law with the true uplift and lifetime."""
    truth = run.problem
    due = run.age >= optimal_age(truth.uplift, truth.lifetime, truth.cost) - 0.5 / LOOKS
    return due and refresh_surplus(truth.uplift, truth.lifetime, truth.cost, run.remaining, run.age) > 0.0


@dataclass(frozen=True)
class _RefreshOnly:
    actions: str = "refresh"


class Governed:
    """The governor's own rule, on the telemetry that a real run would give it."""

    def __init__(self) -> None:
        self._rule = ReallocationRule(_RefreshOnly())
        self._previous: float | None = None

    def __call__(self, run: Run) -> bool:
        """Show the rule the last probe and a drift reading, and ask it."""
        look = self._look(run)
        rate = run.recent_rate(SLOPE_PROBES)
        self._rule.note_probe(look, 0.0 if rate is None else rate)
        if rate is None:
            return False
        return self._rule.consider(look, max(rate, 0.0), 0.0, 0.05) is not None

    def _look(self, run: Run) -> Telemetry:
        level, noise = run.levels[-1], run.problem.noise
        delta = None if self._previous is None else self._previous - level
        self._previous = level
        correlation = _rank_correlation(math.exp(-run.age / run.problem.lifetime), run.generator)
        return Telemetry(
            step=len(run.levels),
            max_steps=LOOKS,
            spent={"flops": run.spent},
            limits={"flops": 1.0},
            compute=run.spent,
            compute_limit=1.0,
            probe=ProbeReading(level, delta, None if delta is None else math.sqrt(2.0) * noise, 128),
            probe_spent=PROBE_COST * len(run.levels),
            overhead_spent=run.overhead,
            offers=(Offer("refresh", fixed_cost=run.problem.cost, fades=True),),
            drift=DriftReading(run.age, correlation, DRIFT_EXAMPLES),
            data_phase=run.refreshes,
        )


class Undamped:
    """Refreshes whenever the slope of the last probes is below ``SLACK`` of the best one seen."""

    def __init__(self) -> None:
        self._best = 0.0

    def __call__(self, run: Run) -> bool:
        """Compare the last three probes with the best three."""
        rate = run.recent_rate(3)
        if rate is None:
            return False
        self._best = max(self._best, rate)
        return rate < SLACK * self._best


def refresh_table(seed: int = 0, problems: int = 100, bend: float = 0.0) -> list[dict[str, Any]]:
    """Regret of each policy over random problems.

    Args:
        seed: Names the problems and their noise.
        problems: How many.
        bend: k, how much returns diminish; 0 is a constant rate.

    Returns:
        One row a policy: ``policy``, regret as ``mean``, ``median``, ``p90``, ``max`` and by uplift (``u=0.3``),
        mean ``refreshes`` and mean share of the budget that was ``overhead``.
    """
    cases = make_problems(seed, problems, bend)
    best = [best_in_hindsight(case) for case in cases]
    rows = []
    for name, start in _policies().items():
        runs = [play(case, start(), seed, probing=name not in _BLIND) for case in cases]
        regrets = np.array([run.log_loss - least for run, least in zip(runs, best, strict=True)])
        rows.append(_row(name, cases, regrets, runs))
    return rows


_BLIND = ("oracle", "never", "every 0.1", "every 0.25")


def _policies() -> dict[str, Callable[[], Policy]]:
    return {
        "oracle": lambda: know_all,
        "governor": Governed,
        "every 0.25": lambda: _after(0.25),
        "every 0.1": lambda: _after(0.1),
        "never": lambda: _after(math.inf),
        "undamped": Undamped,
    }


def _after(period: float) -> Policy:
    return lambda run: run.age >= period - 1e-9


def _row(name: str, cases: Sequence[Problem], regrets: np.ndarray, runs: Sequence[Run]) -> dict[str, Any]:
    by_uplift = {}
    for uplift in UPLIFTS:
        own = [regret for case, regret in zip(cases, regrets, strict=True) if case.uplift == uplift]
        by_uplift[f"u={uplift:g}"] = float(np.mean(own)) if own else math.nan
    return {
        "policy": name,
        "mean": float(regrets.mean()),
        "median": float(np.median(regrets)),
        "p90": float(np.quantile(regrets, 0.9)),
        "max": float(regrets.max()),
        **by_uplift,
        "refreshes": float(np.mean([run.refreshes for run in runs])),
        "overhead": float(np.mean([run.overhead for run in runs])),
    }


def _rank_correlation(freshness: float, generator: np.random.Generator) -> float:
    """A sample's correlation around the true one."""
    error = (1.0 - freshness**2) / math.sqrt(DRIFT_EXAMPLES)
    return float(np.clip(freshness + error * generator.normal(), -1.0, 1.0))
