"""What a budget buys: tokens, epochs, the loss they lead to, and where a price ends the run. Pure, spends nothing.

With a pilot the loss is extrapolated from the user's own curve. Without one only its shape is known, that of
pretraining on repeated data, which cannot rise: fine-tuning on few rows can.
"""

# D tokens, U unique tokens, D' the fresh tokens that D are worth; nats are nats per token

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hf_eff.engines.probe_spacing import probe_gap
from hf_eff.errors import DataError, OptionError
from hf_eff.loss_forecast_table import loss_forecast_lines
from hf_eff.numerics.payback import PayBack
from hf_eff.numerics.pilot_fit import FEWEST_POINTS, PilotFit, fit_pilot, turning_point
from hf_eff.numerics.refresh_law import break_even_compute, optimal_age, refresh_surplus
from hf_eff.numerics.scaling_laws import (
    CHINCHILLA,
    REPEAT_CONSTANT,
    REPEATED_DATA,
    effective_params,
    effective_tokens,
    kaplan_loss,
    repeated_data_loss,
    repetition_value,
)

PROBE_GROWTH = 0.08
"""Growth of compute from probe to probe: a power law tells equally much in equal steps of log compute."""
PROBE_SHARE = 0.03
"""Most that probes should take of the compute."""
LIFETIME_SHARE = 0.2
"""Share of the budget after which 1/e of a choice's advantage is taken to be left, until drift is measured."""
OVER_TRAINED = 200.0
"""Tokens a parameter, ten times the compute-optimal number, beyond which low precision is known to cost more."""
_FAR = 2.0  # times the pilot's length
_CURVE_POINTS = 60
_LEAST_EPOCHS = 1e-6


class LossCurve(Protocol):
    """Loss as a function of effective tokens; its slope never rises."""

    def loss(self, x: float) -> tuple[float, float | None]:
        """Mean and standard deviation at ``x``; None where the latter is unknown."""

    def slope(self, x: float) -> float:
        """-dL/dx at ``x``, at least 0."""


@dataclass(frozen=True)
class ShapeOnly:
    """The law of pretraining on repeated data (Muennighoff et al. 2023): good for comparisons, not for its value.

    Attributes:
        params: Those that count, after ``effective_params``.
    """

    params: float

    def loss(self, x: float) -> tuple[float, None]:
        """Loss of pretraining on ``x`` fresh tokens."""
        return REPEATED_DATA.loss(self.params, x), None

    def slope(self, x: float) -> float:
        """-dL/dx."""
        return REPEATED_DATA.slope(x)


@dataclass(frozen=True)
class Pilot:
    """Held-out losses of a short run, on the data and with the method that are planned.

    The learning rate should be constant after its warm-up: under a decay the loss drops by an amount that a longer run
    reaches only at its own end.

    Attributes:
        tokens: [n] training tokens, increasing.
        losses: [n] held-out losses, nats per token.
        source: Where it was read.
    """

    tokens: Sequence[float]
    losses: Sequence[float]
    source: str = "pilot"


@dataclass(frozen=True, kw_only=True)
class Prospect:
    """A planned run, as far as its loss depends on it.

    Attributes:
        params: Parameters of the model.
        tokens: Training tokens that the budget buys, padding included.
        unique_tokens: Different ones among those, for one epoch.
        token_flops: FLOPs of training on a token, with the method that is planned.
        forward_flops: FLOPs of a token's forward.
        step_tokens: Tokens of an optimizer step.
        limit: Currency that decides ``tokens``; None where the planned epochs do.
        planned_tokens: Tokens after which the planned epochs or steps end, or None.
        price: Nats that one token must take off the loss to be worth its cost, or None.
        pilot: A pilot run, or None.
        payback: Of the selection; None where nothing is selected.
        probe_flops: Cost of one probe; 0 when there is none.
        pretrained_tokens: Tokens that the model has seen before, 0 when unknown.
        repeat_constant: R_D*, how many further epochs wear tokens down to 1/e of their worth.
        notes: What the user should know of how these numbers came about.
    """

    params: float
    tokens: float
    unique_tokens: float
    token_flops: float
    forward_flops: float = 0.0
    step_tokens: float = 1.0
    limit: str | None = None
    planned_tokens: float | None = None
    price: float | None = None
    pilot: Pilot | None = None
    payback: PayBack | None = None
    probe_flops: float = 0.0
    pretrained_tokens: float = 0.0
    repeat_constant: float = REPEAT_CONSTANT
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the amounts.

        Raises:
            OptionError: One is not above zero.
        """
        for name in ("params", "tokens", "unique_tokens", "token_flops", "step_tokens", "repeat_constant", "price"):
            amount = getattr(self, name)
            if amount is not None and not 0.0 < amount < math.inf:
                raise OptionError(f"{name} must be above zero and finite, got {amount!r}.")

    @property
    def epochs(self) -> float:
        """Epochs that the budget buys."""
        return self.tokens / self.unique_tokens

    def worth(self, epochs: float) -> float:
        """D' after so many epochs."""
        return effective_tokens(epochs * self.unique_tokens, self.unique_tokens, self.repeat_constant)

    def token_value(self, epochs: float) -> float:
        """Worth of the next token relative to a fresh one."""
        return repetition_value(epochs, self.repeat_constant)


@dataclass(frozen=True)
class CurvePoint:
    """The run after some epochs.

    Attributes:
        epochs: Passes over the unique tokens.
        share: D' / D.
        token_value: Worth of the next token relative to a fresh one.
        gain: Nats that the next FLOP takes off the loss.
        loss: Predicted loss.
        sd: Its standard deviation; None without a pilot.
    """

    epochs: float
    share: float
    token_value: float
    gain: float
    loss: float
    sd: float | None


@dataclass(frozen=True)
class ProbeSpacing:
    """When to look at the held-out loss.

    Attributes:
        growth: Next look after this share of the compute since the first one ...
        least_flops: ... but not sooner than after this many FLOPs: one step, and what keeps probes cheap ...
        most_flops: ... nor later than after this many.
        probes: Looks that this makes in the whole run.
        share: Part of the compute that they take.
    """

    growth: float
    least_flops: float
    most_flops: float
    probes: int
    share: float


@dataclass(frozen=True, kw_only=True)
class LossForecast:
    """What a run is expected to reach, and when it stops paying.

    Attributes:
        prospect: The run.
        source: Where the curve comes from: the pilot's name, or ``"shape only"``.
        price_epochs: e*, where the next token is no longer worth its price; None without a price.
        price_loss: Predicted loss there.
        price_range: Epochs at which that is the case with probabilities .1 and .9; None without price and pilot.
        bottom_epochs: Where the pilot's loss began to rise; None where it did not.
        end: The run where it should end: by budget, price or bottom, whichever is first.
        ended_by: ``"budget"``, ``"price"`` or ``"bottom"``.
        next_epoch_gain: Nats that one epoch more than the budget buys would take off.
        table: The run at a few epochs, the last those of the budget.
        curve: The run at many epochs, for a figure.
        floor, exponent: E and beta of the fitted curves, on average; None without a pilot.
        break_even_flops: B*, the budget of selection and training together above which selecting pays; infinite when
            it never does, None when nothing is selected.
        refresh_flops: T*, training between two choices of the rows; infinite or None likewise.
        widen_epochs: Epochs after which rows that were left out teach more than chosen ones again; None likewise.
        probes: Recommended spacing; None when no probe is priced.
        comparison: What laws of pretraining say of this many parameters and tokens from scratch.
        warnings: What the user should know.
    """

    prospect: Prospect
    source: str
    price_epochs: float | None
    price_loss: float | None
    price_range: tuple[float, float] | None
    bottom_epochs: float | None
    end: CurvePoint
    ended_by: str
    next_epoch_gain: float
    table: tuple[CurvePoint, ...]
    curve: tuple[CurvePoint, ...]
    floor: float | None
    exponent: float | None
    break_even_flops: float | None
    refresh_flops: float | None
    widen_epochs: float | None
    probes: ProbeSpacing | None
    comparison: dict[str, float]
    warnings: tuple[str, ...]

    @property
    def shape_only(self) -> bool:
        """Whether there was no pilot, so that the loss itself means nothing."""
        return self.prospect.pilot is None

    def __str__(self) -> str:
        """The forecast as lines of text."""
        return "\n".join(loss_forecast_lines(self))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able copy; what is infinite or unknown is None."""
        run = dataclasses.asdict(self.prospect)
        pilot, payback = run.pop("pilot"), run.pop("payback")
        del run["notes"]
        facts = {each.name: getattr(self, each.name) for each in dataclasses.fields(self) if each.name != "prospect"}
        plain = {name: _plain(value) for name, value in facts.items()}
        points = None if pilot is None else [list(map(float, pilot[name])) for name in ("tokens", "losses")]
        return {
            "run": {
                **run,
                "epochs": self.prospect.epochs,
                "effective_tokens": self.prospect.worth(self.prospect.epochs),
            },
            "pilot": None if points is None else {"tokens": points[0], "losses": points[1]},
            "payback": payback,
            "shape_only": self.shape_only,
            **plain,
        }


def forecast(prospect: Prospect) -> LossForecast:
    """Predict a run's loss and where it stops paying.

    Raises:
        DataError: The pilot cannot be fitted.
    """
    curve, bottom = _curve(prospect)
    price, price_range = _price_stop(prospect, curve)
    ends = {"budget": prospect.epochs, "price": price, "bottom": bottom}
    ended_by = min((name for name, at in ends.items() if at is not None), key=lambda name: ends[name] or 0.0)
    at = _point(prospect, curve, max(ends[ended_by] or 0.0, _LEAST_EPOCHS))
    now, later = (curve.loss(prospect.worth(epochs))[0] for epochs in (prospect.epochs, prospect.epochs + 1.0))
    fitted = curve if isinstance(curve, PilotFit) else None
    speedup = 1.0 if prospect.payback is None else prospect.payback.speedup
    found = LossForecast(
        prospect=prospect,
        source="shape only" if prospect.pilot is None else prospect.pilot.source,
        price_epochs=price,
        price_loss=curve.loss(prospect.worth(price))[0] if price else None,
        price_range=price_range,
        bottom_epochs=bottom,
        end=at,
        ended_by=ended_by,
        next_epoch_gain=now - later,
        table=tuple(_point(prospect, curve, epochs) for epochs in _table_epochs(prospect.epochs)),
        curve=tuple(_point(prospect, curve, epochs) for epochs in _curve_epochs(prospect, price)),
        floor=None if fitted is None else fitted.floor,
        exponent=None if fitted is None else fitted.exponent,
        break_even_flops=None
        if prospect.payback is None
        else break_even_compute(prospect.payback.selection_flops, speedup),
        refresh_flops=refresh_flops(prospect),
        widen_epochs=None if speedup <= 1.0 else 1.0 + prospect.repeat_constant * math.log(speedup),
        probes=probe_spacing(prospect) if prospect.probe_flops > 0 else None,
        comparison=_comparison(prospect),
        warnings=(),
    )
    return dataclasses.replace(found, warnings=(*prospect.notes, *_warnings(found)))


def probe_spacing(prospect: Prospect) -> ProbeSpacing:
    """Geometric in compute, at least an optimizer step apart, within the probes' share of the compute."""
    budget, step = prospect.tokens * prospect.token_flops, prospect.step_tokens * prospect.token_flops

    def gap(since_start: float) -> float:
        return max(step, probe_gap(PROBE_GROWTH, PROBE_SHARE, since_start, budget, prospect.probe_flops))

    probes, at = 0, step
    while at <= budget:
        probes += 1
        at += gap(at - step)
    return ProbeSpacing(PROBE_GROWTH, gap(0.0), gap(budget), probes, probes * prospect.probe_flops / budget)


def refresh_flops(prospect: Prospect) -> float | None:
    """T*: training between two choices of the rows; infinite where a second one never pays, None where none is made.

    Chosen rows are taken to teach as much faster than stale ones as they are expected to teach than random ones, and
    that advantage to fade over ``LIFETIME_SHARE`` of the budget: a run that measures drift knows better.
    """
    if prospect.payback is None or not prospect.payback.selection_flops:
        return None
    budget, cost = prospect.tokens * prospect.token_flops, prospect.payback.selection_flops
    uplift, lifetime = prospect.payback.speedup - 1.0, LIFETIME_SHARE * budget
    if refresh_surplus(uplift, lifetime, cost, budget) <= 0.0:
        return math.inf
    return optimal_age(uplift, lifetime, cost)


# the curve


def _curve(prospect: Prospect) -> tuple[LossCurve, float | None]:
    """The loss curve, and the epochs at which the pilot's loss began to rise."""
    pilot = prospect.pilot
    if pilot is None:
        return ShapeOnly(effective_params(prospect.params, prospect.unique_tokens)), None
    if len(pilot.tokens) < FEWEST_POINTS or len(pilot.tokens) != len(pilot.losses):
        raise DataError(f"{pilot.source} has {len(pilot.tokens)} points; a pilot needs {FEWEST_POINTS} or more.")
    worth = [prospect.worth(tokens / prospect.unique_tokens) for tokens in pilot.tokens]
    lowest = turning_point(pilot.tokens, pilot.losses)
    if lowest is None:
        return fit_pilot(worth, pilot.losses), None
    if lowest + 1 < FEWEST_POINTS:
        raise DataError(
            f"the loss in {pilot.source} rises from its point {lowest + 1} on; a pilot must fall over {FEWEST_POINTS} "
            "points or more: measure more often, or lower the learning rate."
        )
    return fit_pilot(worth[: lowest + 1], pilot.losses[: lowest + 1]), pilot.tokens[lowest] / prospect.unique_tokens


def _point(prospect: Prospect, curve: LossCurve, epochs: float) -> CurvePoint:
    worth, value = prospect.worth(epochs), prospect.token_value(epochs)
    loss, sd = curve.loss(worth)
    gain = curve.slope(worth) * value / prospect.token_flops
    return CurvePoint(epochs, worth / (epochs * prospect.unique_tokens), value, gain, loss, sd)


def _price_stop(prospect: Prospect, curve: LossCurve) -> tuple[float | None, tuple[float, float] | None]:
    """e* and the epochs at which a token is worth its price with probabilities .9 and .1."""
    price = prospect.price
    if price is None:
        return None, None

    def pays(epochs: float) -> bool:
        return curve.slope(prospect.worth(epochs)) * prospect.token_value(epochs) > price

    if not isinstance(curve, PilotFit):
        return _last(pays), None

    def surely(epochs: float, chance: float) -> bool:
        value = prospect.token_value(epochs)
        return value > 0.0 and curve.steeper(prospect.worth(epochs), price / value) > chance

    return _last(pays), (_last(lambda epochs: surely(epochs, 0.9)), _last(lambda epochs: surely(epochs, 0.1)))


def _last(holds: Callable[[float], bool]) -> float:
    """The epochs up to which something holds that ends to hold once, by bisection; 0 where it never does."""
    low, high = _LEAST_EPOCHS, 1.0
    if not holds(low):
        return 0.0
    while holds(high):
        low, high = high, 2.0 * high
    while high - low > 1e-9 * high:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _table_epochs(epochs: float) -> list[float]:
    """The budget's epochs and, before them, the five powers of two below."""
    highest = math.ceil(math.log2(epochs)) - 1
    return [*(2.0**power for power in range(highest - 4, highest + 1)), epochs]


def _curve_epochs(prospect: Prospect, price: float | None) -> list[float]:
    """Closer at first, where the loss bends: from the pilot's first point to a little beyond budget and pilot."""
    points = [] if prospect.pilot is None else [each / prospect.unique_tokens for each in prospect.pilot.tokens]
    nearby = [] if price is None or price > 4.0 * prospect.epochs else [price]
    last = 1.15 * max([prospect.epochs, *points[-1:], *nearby])
    first = max(min(points, default=0.02 * last), 1e-3 * last)
    return [first + (last - first) * (step / (_CURVE_POINTS - 1)) ** 2 for step in range(_CURVE_POINTS)]


def _comparison(prospect: Prospect) -> dict[str, float]:
    params, tokens = CHINCHILLA.optimum(prospect.tokens * prospect.token_flops)
    return {
        "kaplan_loss": kaplan_loss(prospect.params, prospect.tokens),
        "chinchilla_loss": CHINCHILLA.loss(prospect.params, prospect.tokens),
        "repeated_data_loss": repeated_data_loss(prospect.params, prospect.tokens, prospect.unique_tokens),
        "optimal_params": params,
        "optimal_tokens": tokens,
    }


# what to tell


def _warnings(found: LossForecast) -> list[str]:
    return [*_curve_warnings(found), *_end_warnings(found), *_model_warnings(found)]


def _curve_warnings(found: LossForecast) -> list[str]:
    """How far the curve can be trusted."""
    run, pilot = found.prospect, found.prospect.pilot
    if pilot is None:
        said = ["no pilot: only the shape of the loss is known, so compare plans and ignore its value."]
        if run.epochs > 1.0:
            said.append(
                "repeating few rows can make the held-out loss rise, which this shape cannot show; give --pilot with "
                "a short run of your own before you pay for more than one epoch."
            )
        return said
    reach = pilot.tokens[-1] / run.unique_tokens
    said = []
    if found.end.epochs > _FAR * reach:
        said.append(f"the pilot ends at epoch {reach:.3g} and the forecast goes on to {found.end.epochs:.3g}.")
    if reach < 2.0 and found.end.epochs > 1.0:
        said.append(
            "the pilot saw hardly any row twice: the worth of repeated rows is that of pretraining, and a loss that "
            "rises with repetition would not be foreseen."
        )
    if found.bottom_epochs is not None:
        said.append(
            f"the pilot's loss rises after epoch {found.bottom_epochs:.3g}; only what comes before was fitted, and "
            "training should end there."
        )
    return said


def _end_warnings(found: LossForecast) -> list[str]:
    """Where something ends the run before the budget does."""
    run, said = found.prospect, []
    if found.price_epochs == 0.0:
        said.append("no token is worth its price; nothing should be trained.")
    if run.planned_tokens is not None and run.planned_tokens < 0.99 * run.tokens:
        said.append(
            f"the planned epochs end the run at epoch {run.planned_tokens / run.unique_tokens:.3g}, before the "
            f"{run.limit} limit does at {run.epochs:.3g}; raise num_train_epochs or max_steps to use all of it."
        )
    if found.widen_epochs is not None and found.end.epochs > found.widen_epochs:
        said.append(
            f"from epoch {found.widen_epochs:.3g} on, rows that were left out teach more than another pass over the "
            "chosen ones; choose more rows."
        )
    return said


def _model_warnings(found: LossForecast) -> list[str]:
    run = found.prospect
    ratio = (run.pretrained_tokens + run.tokens) / run.params
    if ratio <= OVER_TRAINED:
        return []
    return [
        f"the model is over-trained ({ratio:,.0f} tokens a parameter, about 20 are compute-optimal): expect a larger "
        "loss from quantising its weights or its key-value cache (arXiv:2411.04330), and check the quality after it."
    ]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
