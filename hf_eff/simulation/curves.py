"""Synthetic runs: a held-out loss over compute, the noise of its probes, and a price of compute.

The clock c is compute as a share of the budget. A member of a family is drawn from a seed; the same seed gives every
policy the same curve and the same noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hf_eff.errors import OptionError

STEPS = 1000
SHARES = np.arange(STEPS + 1) / STEPS
"""[STEPS + 1] the clock at every step, the start included."""

Random = np.random.Generator
Shape = tuple[np.ndarray, np.ndarray]
"""[STEPS + 1] loss between about 1 and 0, and learning rate relative to its peak."""

_FULL_RATE = np.ones(STEPS + 1)


@dataclass(frozen=True)
class Curve:
    """One run that nobody stops.

    Attributes:
        family: Kind of curve.
        loss: [STEPS + 1] noiseless held-out loss, nats.
        learning_rate: [STEPS + 1] relative to its peak.
        noise: Standard deviation of a probe, nats.
        correlation: Of the noise of one probe with the next one's.
        price: Nats that the whole budget must buy.
        seed: What it was drawn from.
    """

    family: str
    loss: np.ndarray
    learning_rate: np.ndarray
    noise: float
    correlation: float
    price: float
    seed: int

    @property
    def best_stop(self) -> float:
        """Share of the budget at which loss plus price is least."""
        return float(SHARES[np.argmin(self.loss + self.price * SHARES)])

    def loss_at(self, share: float) -> float:
        """Noiseless loss after a share of the budget."""
        return float(np.interp(share, SHARES, self.loss))

    def regret(self, stop: float, paid: float) -> float:
        """Loss plus price at a stop, above the least on the curve.

        Args:
            stop: Share of the budget that went into training.
            paid: The same with probes; they cost what training costs.
        """
        return self.loss_at(stop) + self.price * paid - float(np.min(self.loss + self.price * SHARES))

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


def _log_uniform(random: Random, low: float, high: float) -> float:
    return float(np.exp(random.uniform(np.log(low), np.log(high))))


def _falling_power(random: Random, clock: np.ndarray = SHARES) -> np.ndarray:
    return (1.0 + clock / _log_uniform(random, 0.003, 0.3)) ** -random.uniform(0.2, 1.5)


def _falling_exponential(random: Random) -> np.ndarray:
    return np.exp(-SHARES / _log_uniform(random, 0.02, 0.5))


def _power(random: Random) -> Shape:
    return _falling_power(random), _FULL_RATE


def _exponential(random: Random) -> Shape:
    return _falling_exponential(random), _FULL_RATE


def _late(random: Random) -> Shape:
    """A plateau, then a second drop that nothing announces."""
    first = np.exp(-SHARES / _log_uniform(random, 0.02, 0.1))
    start, width = random.uniform(0.3, 0.7), random.uniform(0.02, 0.08)
    return first + random.uniform(0.2, 0.8) / (1.0 + np.exp(-(start - SHARES) / width)), _FULL_RATE


def _overfit(random: Random) -> Shape:
    """Falls, then rises."""
    turn = random.uniform(0.15, 0.6)
    rise = random.uniform(0.3, 1.5) * np.maximum(0.0, SHARES - turn) ** random.uniform(1.0, 2.0)
    return _falling_exponential(random) + rise, _FULL_RATE


def _lr_drop(random: Random) -> Shape:
    """A power law, and a drop when the learning rate is divided by ten; nothing announces the moment."""
    start = random.uniform(0.3, 0.7)
    drop = 1.0 - np.exp(-np.maximum(0.0, SHARES - start) / random.uniform(0.02, 0.1))
    return _falling_power(random) - random.uniform(0.1, 0.4) * drop, np.where(start <= SHARES, 0.1, 1.0)


def _weibull(random: Random) -> Shape:
    return np.exp(-((SHARES / _log_uniform(random, 0.02, 0.4)) ** random.uniform(0.4, 1.8))), _FULL_RATE


def _janoschek(random: Random) -> Shape:
    return np.exp(-_log_uniform(random, 2.0, 30.0) * SHARES ** random.uniform(0.4, 1.8)), _FULL_RATE


def _mmf(random: Random) -> Shape:
    """Morgan, Mercer and Flodin: h^d / (h^d + c^d)."""
    half, exponent = _log_uniform(random, 0.02, 0.4), random.uniform(0.6, 2.5)
    return half**exponent / (half**exponent + SHARES**exponent), _FULL_RATE


def _double_descent(random: Random) -> Shape:
    """Falls, rises to a hump, falls again."""
    centre, width = random.uniform(0.2, 0.5), random.uniform(0.04, 0.12)
    hump = random.uniform(0.1, 0.4) * np.exp(-0.5 * ((SHARES - centre) / width) ** 2)
    return _falling_power(random) + hump, _FULL_RATE


def _linear_decay(random: Random) -> Shape:
    """A power law over the integrated rate, plus noise of the optimizer that shrinks with the rate."""
    rate = 1.0 - SHARES
    falling = _falling_power(random, SHARES - SHARES**2 / 2.0)
    return falling + random.uniform(0.0, 0.1) * rate, rate


_SHAPES: dict[str, Callable[[Random], Shape]] = {
    "power": _power,
    "exponential": _exponential,
    "late": _late,
    "overfit": _overfit,
    "lr-drop": _lr_drop,
    "weibull": _weibull,
    "janoschek": _janoschek,
    "mmf": _mmf,
    "double descent": _double_descent,
    "linear decay": _linear_decay,
}
SMOOTH = ("power", "exponential")
"""Families whose members are nearly curves of the estimator's grid."""
INSIDE = (*SMOOTH, "late", "overfit", "lr-drop")
"""Families that the estimator was made with in mind; all but the smooth ones break its model."""
OUTSIDE = ("weibull", "janoschek", "mmf", "double descent", "linear decay")
"""Families outside the grid, which must be reported apart."""


def make_curve(family: str, seed: int) -> Curve:
    """One random member of a family: height 0.3 to 1.5 nats, probe noise 0.003 to 0.05 nats, price 0.05 to 2 nats.

    Raises:
        OptionError: There is no such family.
    """
    if family not in _SHAPES:
        raise OptionError(f"family must be one of {list(_SHAPES)}, got {family!r}.")
    random = np.random.default_rng([seed, 0])
    height = random.uniform(0.3, 1.5)
    shape, rate = _SHAPES[family](random)
    return Curve(
        family=family,
        loss=random.uniform(0.5, 2.5) + height * shape,
        learning_rate=rate,
        noise=_log_uniform(random, 0.003, 0.05),
        correlation=random.uniform(0.0, 0.5),
        price=_log_uniform(random, 0.05, 2.0),
        seed=seed,
    )


def make_curves(families: Sequence[str], seeds: range) -> list[Curve]:
    """One curve a seed, dealt round the families."""
    return [make_curve(families[seed % len(families)], seed) for seed in seeds]
