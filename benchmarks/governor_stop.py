"""Where does each stopping policy stop on synthetic loss curves, and what does that cost?

    python benchmarks/governor_stop.py [--curves 200] [--probe-cost 0.0003] [--first-seed 0]

A curve is a noiseless held-out loss L(c) over training compute c, a share of the budget. A policy sees it through
probes with noise of standard deviation 0.003 to 0.05 and autocorrelation 0 to 0.5. Compute has a price, 0.05 to 2 nats
for the whole budget, and a probe costs compute like everything else:

    J = L(c) + price * (c + probes * probe_cost),    regret = J where the policy stops - least J without probes

The default takes about a minute.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from hf_eff.contracts.governor import Governor, ProbeReading, Telemetry
from hf_eff.governor.marginal_gain import MarginalGain, MarginalGainConfig

STEPS = 1000
EVALUATIONS = 120
SHARES = np.arange(STEPS + 1) / STEPS
FULL_RATE = np.ones(STEPS + 1)
POLICIES = ("marginal_gain", "patience-3", "patience-10", "fixed-1/3", "full")

Random = np.random.Generator
Shape = tuple[np.ndarray, np.ndarray]
Table = dict[str, dict[str, list[float]]]


@dataclasses.dataclass(frozen=True)
class Curve:
    """One run: held-out loss and learning rate at every step, noise of a probe, price of the whole budget."""

    family: str
    loss: np.ndarray
    learning_rate: np.ndarray
    noise: float
    correlation: float
    price: float
    seed: int

    def probe_noise(self) -> Iterator[float]:
        """Draw the same endless noise for every policy.

        Yields:
            Error of the next probe.
        """
        generator = np.random.default_rng([self.seed, 1])
        value = generator.normal()
        while True:
            yield self.noise * value
            value = self.correlation * value + math.sqrt(1.0 - self.correlation**2) * generator.normal()

    def loss_at(self, share: float) -> float:
        """Noiseless loss after a share of the budget."""
        return float(np.interp(share, SHARES, self.loss))


def _log_uniform(random: Random, low: float, high: float) -> float:
    return float(np.exp(random.uniform(np.log(low), np.log(high))))


def _power(random: Random) -> np.ndarray:
    return (1.0 + SHARES / _log_uniform(random, 0.003, 0.3)) ** -random.uniform(0.2, 1.5)


def _exponential(random: Random) -> np.ndarray:
    return np.exp(-SHARES / _log_uniform(random, 0.02, 0.5))


def power(random: Random) -> Shape:
    """Inside the governor's grid of curves, as is ``exponential``."""
    return _power(random), FULL_RATE


def exponential(random: Random) -> Shape:
    return _exponential(random), FULL_RATE


def late(random: Random) -> Shape:
    """A plateau, then a second drop that nothing announces."""
    first = np.exp(-SHARES / _log_uniform(random, 0.02, 0.1))
    start, width = random.uniform(0.3, 0.7), random.uniform(0.02, 0.08)
    return first + random.uniform(0.2, 0.8) / (1.0 + np.exp(-(start - SHARES) / width)), FULL_RATE


def overfit(random: Random) -> Shape:
    """Falls, then rises."""
    turn = random.uniform(0.15, 0.6)
    rise = random.uniform(0.3, 1.5) * np.maximum(0.0, SHARES - turn) ** random.uniform(1.0, 2.0)
    return _exponential(random) + rise, FULL_RATE


def lr_drop(random: Random) -> Shape:
    """A power law, and a drop when the learning rate is divided by ten; nothing announces the moment."""
    start = random.uniform(0.3, 0.7)
    drop = 1.0 - np.exp(-np.maximum(0.0, SHARES - start) / random.uniform(0.02, 0.1))
    return _power(random) - random.uniform(0.1, 0.4) * drop, np.where(start <= SHARES, 0.1, 1.0)


def linear_decay(random: Random) -> Shape:
    """A power law over the integrated rate, plus noise of the optimizer that shrinks with the rate."""
    rate = 1.0 - SHARES
    clock = SHARES - SHARES**2 / 2.0
    falling = (1.0 + clock / _log_uniform(random, 0.003, 0.3)) ** -random.uniform(0.2, 1.5)
    return falling + random.uniform(0.0, 0.1) * rate, rate


def weibull(random: Random) -> Shape:
    """Outside the grid, as are ``janoschek`` and ``mmf``."""
    return np.exp(-((SHARES / _log_uniform(random, 0.02, 0.4)) ** random.uniform(0.4, 1.8))), FULL_RATE


def janoschek(random: Random) -> Shape:
    return np.exp(-_log_uniform(random, 2.0, 30.0) * SHARES ** random.uniform(0.4, 1.8)), FULL_RATE


def mmf(random: Random) -> Shape:
    half, exponent = _log_uniform(random, 0.02, 0.4), random.uniform(0.6, 2.5)
    return half**exponent / (half**exponent + SHARES**exponent), FULL_RATE


SHAPES: dict[str, Callable[[Random], Shape]] = {
    "power": power,
    "exponential": exponential,
    "late": late,
    "overfit": overfit,
    "lr-drop": lr_drop,
    "weibull": weibull,
    "janoschek": janoschek,
    "mmf": mmf,
    "linear decay": linear_decay,
}
SMOOTH = ("power", "exponential")
FAMILIES = (*SMOOTH, "late", "overfit", "lr-drop")
OUTSIDE = ("weibull", "janoschek", "mmf", "linear decay")


def make_curve(family: str, seed: int) -> Curve:
    """One random member of a family."""
    random = np.random.default_rng([seed, 0])
    height = random.uniform(0.3, 1.5)
    shape, rate = SHAPES[family](random)
    return Curve(
        family=family,
        loss=random.uniform(0.5, 2.5) + height * shape,
        learning_rate=rate,
        noise=_log_uniform(random, 0.003, 0.05),
        correlation=random.uniform(0.0, 0.5),
        price=_log_uniform(random, 0.05, 2.0),
        seed=seed,
    )


def run_governor(governor: Governor, curve: Curve, probe_cost: float, limit: float = 1.0) -> tuple[float, int]:
    """Play a curve to a governor, in units of which the budget has ``limit``.

    Returns:
        Training compute at the stop, a share of the budget, and the number of probes.
    """
    noise, probes, previous = curve.probe_noise(), 0, None
    for step in range(1, STEPS + 1):
        if step / STEPS + probes * probe_cost > 1.0:
            return (step - 1) / STEPS, probes
        look = telemetry(curve, step, probes, probe_cost, limit)
        fits = step / STEPS + (probes + 1) * probe_cost <= 1.0
        if governor.next_probe(look, probe_cost * limit) and fits:
            probes += 1
            mean = float(curve.loss[step] + next(noise))
            reading = make_reading(mean, previous, curve.noise)
            look = dataclasses.replace(telemetry(curve, step, probes, probe_cost, limit), probe=reading)
            previous = mean
        if governor.observe(look).action == "stop":
            return step / STEPS, probes
    return 1.0, probes


def telemetry(curve: Curve, step: int, probes: int, probe_cost: float, limit: float) -> Telemetry:
    """What a trainer would report after a step."""
    spent = (step / STEPS + probes * probe_cost) * limit
    return Telemetry(
        step=step,
        max_steps=STEPS,
        spent={"flops": spent},
        limits={"flops": limit},
        compute=spent,
        compute_limit=limit,
        learning_rate=float(curve.learning_rate[step]),
        peak_learning_rate=float(curve.learning_rate[1 : step + 1].max()),
        probe_spent=probes * probe_cost * limit,
    )


def make_reading(mean: float, previous: float | None, noise: float) -> ProbeReading:
    """Reading whose paired error is that of two levels of this noise."""
    if previous is None:
        return ProbeReading(mean=mean, paired_delta=None, paired_se=None, num_examples=128)
    return ProbeReading(mean=mean, paired_delta=previous - mean, paired_se=math.sqrt(2.0) * noise, num_examples=128)


def run_patience(curve: Curve, patience: int, probe_cost: float) -> tuple[float, int]:
    """Stop after ``patience`` evaluations in a row without a new best, at evenly spaced evaluations."""
    noise, best, bad = curve.probe_noise(), math.inf, 0
    for evaluation in range(1, EVALUATIONS + 1):
        trained = evaluation / EVALUATIONS
        if trained + evaluation * probe_cost > 1.0:
            return (evaluation - 1) / EVALUATIONS, evaluation - 1
        seen = curve.loss_at(trained) + next(noise)
        best, bad = (seen, 0) if seen < best else (best, bad + 1)
        if bad >= patience:
            return trained, evaluation
    return 1.0, EVALUATIONS


def run_policy(name: str, curve: Curve, probe_cost: float) -> tuple[float, int]:
    """Training compute at the stop and number of probes of one policy on one curve."""
    if name == "marginal_gain":
        config = MarginalGainConfig(threshold="price", price=curve.price)
        return run_governor(MarginalGain(config), curve, probe_cost)
    if name.startswith("patience-"):
        return run_patience(curve, int(name.removeprefix("patience-")), probe_cost)
    return {"fixed-1/3": 1.0 / 3.0, "full": 1.0}[name], 0


def regret(curve: Curve, stop: float, probes: int, probe_cost: float) -> float:
    """Cost of stopping there, above the least cost on the curve."""
    paid = curve.price * (stop + probes * probe_cost)
    return curve.loss_at(stop) + paid - float(np.min(curve.loss + curve.price * SHARES))


def simulate(families: Sequence[str], seeds: range, probe_cost: float, policies: Sequence[str] = POLICIES) -> Table:
    """Regret by policy and family over one curve a seed, dealt round the families."""
    table: Table = {name: {family: [] for family in families} for name in policies}
    for seed in seeds:
        curve = make_curve(families[seed % len(families)], seed)
        for name in policies:
            stop, probes = run_policy(name, curve, probe_cost)
            table[name][curve.family].append(regret(curve, stop, probes, probe_cost))
    return table


def simulate_tail(families: Sequence[str], seeds: range, probe_cost: float) -> Table:
    """Threshold ``tail``: compute left over, and share of the attainable gain forgone, by family."""
    table: Table = {name: {family: [] for family in families} for name in ("compute saved", "gain forgone")}
    for seed in seeds:
        curve = make_curve(families[seed % len(families)], seed)
        stop, probes = run_governor(MarginalGain(MarginalGainConfig()), curve, probe_cost)
        best = float(curve.loss.min())
        table["compute saved"][curve.family].append(1.0 - stop - probes * probe_cost)
        forgone = (curve.loss_at(stop) - best) / (float(curve.loss[0]) - best)
        table["gain forgone"][curve.family].append(forgone)
    return table


def all_of(by_family: dict[str, list[float]]) -> np.ndarray:
    """Values of all families together."""
    return np.concatenate([np.array(values) for values in by_family.values()])


def format_table(head: str, table: Table) -> str:
    """The table in Markdown: mean, standard error, median, 90th percentile, then the mean of each family."""
    families = list(next(iter(table.values())))
    lines = [
        f"| {head} | mean (se) | median | p90 | " + " | ".join(families) + " |",
        "|---" * (4 + len(families)) + "|",
    ]
    for name, by_family in table.items():
        values = all_of(by_family)
        error = values.std(ddof=1) / math.sqrt(len(values))
        cells = [f"{values.mean():.3f} ({error:.3f})", f"{np.median(values):.3f}", f"{np.quantile(values, 0.9):.3f}"]
        cells += [f"{np.mean(by_family[family]):.3f}" for family in families]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--curves", type=int, default=200)
    parser.add_argument("--probe-cost", type=float, default=0.0003, help="cost of one probe, a share of the budget")
    parser.add_argument("--first-seed", type=int, default=0, help="other curves of the same families")
    args = parser.parse_args()
    seeds = range(args.first_seed, args.first_seed + args.curves)
    size = f"{args.curves} curves, one probe costs {args.probe_cost:g} of the budget"
    print(f"\nRegret, families of the design ({size})\n")
    print(format_table("policy", simulate(FAMILIES, seeds, args.probe_cost)))
    print(f"\nRegret, families outside the governor's grid ({size})\n")
    print(format_table("policy", simulate(OUTSIDE, seeds, args.probe_cost)))
    print(f"\nThreshold 'tail' of marginal_gain ({size})\n")
    print(format_table("share", simulate_tail((*FAMILIES, *OUTSIDE), seeds, args.probe_cost)))


if __name__ == "__main__":
    main()
