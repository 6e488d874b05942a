"""A loss forecast as people read it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hf_eff.units import format_amount

if TYPE_CHECKING:
    from hf_eff.loss_forecast import CurvePoint, LossForecast


def loss_forecast_lines(found: LossForecast) -> list[str]:
    """A forecast as lines of text; notes last."""
    run = found.prospect
    limit = "the planned epochs" if run.limit is None else f"the {run.limit} limit"
    times = f": {run.token_flops / run.forward_flops:.2f} forward passes" if run.forward_flops else ""
    lines = [
        f"{'loss from':<12}{_source(found)}",
        f"{'tokens':<12}{_tokens(run.tokens)} by {limit}, {run.epochs:.3g} epochs of {_tokens(run.unique_tokens)}",
        f"{'worth':<12}{_tokens(run.worth(run.epochs))} fresh ones",
        f"{'a token':<12}{format_amount('flops', run.token_flops)}{times}",
        "",
        *_table(found),
        "",
        f"{'next epoch':<12}would take {found.next_epoch_gain:.3g} nats off",
        *_price(found),
        f"{'ends by':<12}{found.ended_by} at epoch {found.end.epochs:.3g}{_end_loss(found)}",
        *_selection(found),
        *_probes(found),
    ]
    return lines + [f"note: {warning}" for warning in found.warnings]


def _source(found: LossForecast) -> str:
    if found.prospect.pilot is None:
        return "shape only: pretraining on repeated data (arXiv:2305.16264)"
    reach = found.prospect.pilot.tokens[-1] / found.prospect.unique_tokens
    exponent = "" if found.exponent is None or math.isnan(found.exponent) else f", exponent {found.exponent:.2f}"
    return f"{found.source}: {len(found.prospect.pilot.tokens)} points to epoch {reach:.3g}{exponent}"


def _table(found: LossForecast) -> list[str]:
    """One line for each of a few epochs; gains are per power of ten next below the run's FLOPs."""
    power = math.floor(math.log10(found.prospect.tokens * found.prospect.token_flops))
    rows = [("epochs", "D'/D", "next token", f"nats/1e{power}FLOP", f"loss{' (shape)' * found.shape_only}")]
    for point in found.table:
        gain = f"{point.gain * 10.0**power:.3g}"
        rows.append((f"{point.epochs:.3g}", f"{point.share:.3f}", f"{point.token_value:.3f}", gain, _loss(point)))
    return [f"{row[0]:>8}{row[1]:>9}{row[2]:>12}{row[3]:>16}{row[4]:>18}" for row in rows]


def _end_loss(found: LossForecast) -> str:
    return "" if found.shape_only else f", loss {_loss(found.end)}"


def _loss(point: CurvePoint) -> str:
    return f"{point.loss:.3f}" if point.sd is None else f"{point.loss:.3f} +- {point.sd:.3f}"


def _price(found: LossForecast) -> list[str]:
    if found.price_epochs is None:
        return []
    sure = "" if found.price_range is None else f" (80 %: {found.price_range[0]:.3g} to {found.price_range[1]:.3g})"
    return [f"{'price':<12}is what a token brings at epoch {found.price_epochs:.3g}{sure}"]


def _selection(found: LossForecast) -> list[str]:
    lines = []
    if found.break_even_flops is not None:
        never = math.isinf(found.break_even_flops)
        amount = "never" if never else f"from a budget of {format_amount('flops', found.break_even_flops)} on"
        lines.append(f"{'selecting':<12}pays {amount}")
    if found.refresh_flops is not None:
        never = math.isinf(found.refresh_flops)
        amount = "never pays" if never else f"pays every {format_amount('flops', found.refresh_flops)} of training"
        lines.append(f"{'again':<12}{amount}, if its advantage fades over a fifth of the budget")
    return lines


def _probes(found: LossForecast) -> list[str]:
    if found.probes is None:
        return []
    spacing = found.probes
    least, most = (format_amount("flops", amount) for amount in (spacing.least_flops, spacing.most_flops))
    gap = f"{spacing.growth:.0%} of what is spent, at least {least}, at most {most}"
    return [f"{'probe':<12}every {gap}: {spacing.probes} probes, {spacing.share:.1%} of the compute"]


def _tokens(amount: float) -> str:
    return format_amount("tokens", amount)
