"""marginal_gain: stop when the loss that further compute is expected to buy is no longer worth it.

Idea
    Every so often the run is probed: losses of a fixed held-out subset, paired example by example with the previous
    probe. A grid of learning curves (powers, exponentials, a line) is fitted to the probes and averaged by evidence.
    The mixture gives the probability that the next stretch of compute h lowers the loss by more than the threshold:

        stop when  P(gain over h > tau * h) < delta  over a confirmation span
              and  Theil-Sen gain of the last probes < tau

    ``threshold="tail"`` looks at all compute that remains: tau * h = epsilon * (gain realised so far).
    ``threshold="price"`` takes tau from a price in loss per unit of compute, ``"reservation"`` from the best gain of
    the beginning and the share that is spent, ``"target"`` from the distance to a loss. A loss that almost surely
    rises, by its curve or by two probes in a row above its best, stops the run at once. Probes are spaced
    geometrically in compute and paid from a purse. ``actions`` names what it may do instead of stopping: going on,
    other rows, other memory and the end are then weighed by one index, gain per compute.

Cost      n probe examples of T tokens, B budget
    flops  one forward of n*T tokens a probe; all probes together at most probe_share * B
    bytes  none beyond a forward without gradients

Use when   a held-out set of the target exists and the budget pays for two dozen probes or more.
Avoid when the loss is known to fall late (then set ``explore_floor``). Under a decaying learning rate a stop forgoes
           the rest of the decay: prefer a constant rate, and ``cooldown``.
Differs    The survey names gain per compute as the signal of such a governor and gives neither an estimator nor a
           threshold. The estimator is a closed-form relative of Domhan et al. (IJCAI 2015), who sample by MCMC.

Paper      Unifying Data, Memory, and Compute Efficiency in LLM training: A Survey (2026), arXiv:2606.10706
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.spec import MethodSpec, Paper, Traits, knob
from hf_eff.engines.gain_rule import GainConfig, GainRule, probing_cost
from hf_eff.engines.gain_thresholds import (
    PriceThreshold,
    ReservationThreshold,
    TailThreshold,
    TargetThreshold,
    Threshold,
)
from hf_eff.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class MarginalGainConfig(GainConfig):
    """Options of ``governor="marginal_gain"``."""

    threshold: str = knob("tail", "What a gain is held against.", choices=("tail", "price", "reservation", "target"))
    epsilon: float = knob(
        0.02,
        "Tail: least share of the gain so far that the rest must add. Reservation: least share of the best rate.",
        low=0.0,
        high=1.0,
    )
    price: float | None = knob(
        None, "Price: loss that one unit of compute must buy.", low=0.0, unit="nats per unit of the governing currency"
    )
    target: float | None = knob(None, "Target: held-out loss at which the run is done, lower is better.", low=-1e30)
    delta: float = knob(0.3, "Stop when the chance of a gain above the threshold is lower.", low=0.0, high=1.0)
    futility: float = knob(0.05, "Target: give up when the chance to reach it is lower.", low=0.0, high=1.0)
    horizon: float = knob(
        0.05, "Price and reservation: stretch of compute looked at.", low=1e-6, high=1.0, unit="share of budget"
    )

    def __post_init__(self) -> None:
        """Check that price and target are given exactly when they are used.

        Raises:
            OptionError: ``threshold`` contradicts another option, or an option lies outside its bounds.
        """
        super().__post_init__()
        for name in ("price", "target"):
            value = getattr(self, name)
            if (self.threshold == name) != (value is not None):
                raise OptionError(
                    f"MarginalGainConfig.{name} must be given with threshold={name!r} and only then, "
                    f"got threshold={self.threshold!r} and {name}={value!r}."
                )
        if self.threshold == "reservation" and self.epsilon == 0.0:
            raise OptionError("MarginalGainConfig.epsilon must be above 0 with threshold='reservation', got 0.0.")


class MarginalGain(GainRule):
    """Holds the expected gain against the threshold that its options name.

    Args:
        config: Options.
    """

    def __init__(self, config: MarginalGainConfig) -> None:
        super().__init__(config, _threshold(config))


def _threshold(config: MarginalGainConfig) -> Threshold:
    if config.price is not None:
        return PriceThreshold(config.price, config.horizon, config.delta)
    if config.target is not None:
        return TargetThreshold(config.target, config.futility)
    if config.threshold == "reservation":
        return ReservationThreshold(config.epsilon, config.horizon, config.delta)
    return TailThreshold(config.epsilon, config.delta)


def cost(config: MarginalGainConfig, facts: Facts) -> Cost:
    """FLOPs of all probes of a run that is never stopped."""
    return probing_cost(config, facts)


SPEC = MethodSpec(
    name="marginal_gain",
    kind="governor",
    slot="policy",
    summary="stop when the loss that further compute is expected to buy is no longer worth it.",
    config=MarginalGainConfig,
    build=MarginalGain,
    cost=cost,
    paper=Paper(
        title="Unifying Data, Memory, and Compute Efficiency in LLM training: A Survey", year=2026, arxiv="2606.10706"
    ),
    traits=Traits(needs_reference_set=True, fsdp2=True, streaming=True),
    tiny={"num_examples": 4},
)
