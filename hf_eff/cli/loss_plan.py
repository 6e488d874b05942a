"""Flags of ``hf-eff plan`` for the loss forecast, and what a plan says of the run that is forecast."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_eff.cli.flags import SentenceErrors
from hf_eff.errors import OptionError
from hf_eff.units import format_amount, parse_quantity

if TYPE_CHECKING:
    from hf_eff.cli.pilot import PilotFile
    from hf_eff.loss_forecast import Prospect
    from hf_eff.plan import Plan

_PROBE_EXAMPLES = 128


def parse_forecast(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the forecast's flags off.

    Returns:
        Them and the other words, which are those of ``train``.

    Raises:
        OptionError: A value is malformed, or the figure could not be drawn.
    """
    parser = SentenceErrors(prog="hf-eff plan", add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    add = parser.add_argument_group("the loss forecast, beside the options of train below").add_argument
    add(
        "--pilot",
        type=Path,
        help="short run at a constant rate: CSV with 'tokens' or 'compute' and 'loss', or governor.jsonl",
    )
    add("--price", help="nats that cost must buy: '0.05/1Pflop', '0.01/2usd'; a bare number is per unit of the budget")
    add("--unique_tokens", help="different tokens of one epoch, '20Mtok'; in place of a dataset, or to correct it")
    add("--flops_per_second", help="measured speed of one process, '2.5Tflop', for limits in time and money")
    add("--pretrained_tokens", help="tokens that the model was pretrained on, '2000Gtok'")
    add("--figure", type=Path, help="file for the forecast's curve: .png, .svg or .pdf")
    if {"-h", "--help"} & set(argv):
        print(parser.format_help())
    wishes, words = parser.parse_known_args(list(argv))
    for name, currency in (("unique_tokens", "tokens"), ("flops_per_second", "flops"), ("pretrained_tokens", "tokens")):
        setattr(wishes, name, _amount(name, getattr(wishes, name), currency))
    wishes.price = None if wishes.price is None else parse_price(wishes.price)
    if wishes.figure is not None:
        from hf_eff.report.memory_figure import check_figure

        check_figure(wishes.figure)
    return wishes, words


def _amount(name: str, text: str | None, currency: str) -> float | None:
    """A bare number or one with a unit.

    Raises:
        OptionError: It is neither, or not above zero.
    """
    if text is None:
        return None
    try:
        found, amount = (currency, float(text)) if _is_number(text) else parse_quantity(text)
    except OptionError:
        found, amount = "", 0.0
    if found != currency or not 0.0 < amount < math.inf:
        raise OptionError(f"{name}={text!r} must be a number above zero, with or without a unit of {currency}.")
    return amount


def parse_price(text: str) -> tuple[str | None, float]:
    """Read ``"0.05/1Pflop"``.

    Returns:
        The currency, None for that of the budget, and nats per unit of it.

    Raises:
        OptionError: It is no price above zero.

    >>> parse_price("0.02/4usd")
    ('usd', 0.005)
    >>> parse_price("3e-17")
    (None, 3e-17)
    """
    nats, slash, unit = text.partition("/")
    try:
        currency, amount = parse_quantity(unit) if slash else (None, 1.0)
    except OptionError:
        currency, amount = None, 0.0
    price = float(nats) / amount if amount and _is_number(nats) else 0.0
    if not 0.0 < price < math.inf:
        raise OptionError(f"price={text!r} must be nats above zero per amount, such as '0.05/1Pflop' or '0.01/2usd'.")
    return currency, price


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def prospect_of(plan: Plan, wishes: argparse.Namespace, pilot: PilotFile | None) -> Prospect | str:
    """The run that is to be forecast.

    Args:
        plan: The run as planned.
        wishes: The forecast's flags.
        pilot: What ``--pilot`` names, read.

    Returns:
        The run, or a sentence that says why it cannot be forecast.

    Raises:
        OptionError: The price is in a currency whose cost is not known.
    """
    from hf_eff.loss_forecast import Prospect

    unique = wishes.unique_tokens or _unique_tokens(plan)
    planned = _planned_tokens(plan, unique)
    tokens, limit, notes = affordable_tokens(plan)
    tokens = planned if tokens is None else tokens
    if unique is None or tokens is None:
        return "no loss forecast: the number of rows is unknown; give --unique_tokens."
    if not plan.step_flops or tokens <= 0:
        return "no loss forecast: the budget buys no training."
    token_flops = plan.step_flops / plan.step_tokens
    price = _price(plan, wishes)
    return Prospect(
        params=float(plan.facts.model.params),
        tokens=tokens,
        unique_tokens=unique,
        token_flops=token_flops,
        forward_flops=_forward_flops(plan),
        step_tokens=plan.step_tokens,
        limit=limit,
        planned_tokens=None if limit is None else planned,
        price=None if price is None else price[1] * token_cost(plan, price[0], tokens),
        pilot=None if pilot is None else pilot.in_tokens(token_flops),
        payback=plan.payback,
        probe_flops=_probe_flops(plan, tokens * token_flops),
        pretrained_tokens=wishes.pretrained_tokens or 0.0,
        notes=tuple(notes),
    )


def affordable_tokens(plan: Plan) -> tuple[float | None, str | None, list[str]]:
    """Training tokens that the scarcest limit buys, after selection and probes.

    Returns:
        Tokens and the limit's currency, both None without such a limit; and notes on limits that could not be used.
    """
    bought, notes = {}, []
    aside = plan.flops["select"] + plan.flops["probe"]
    for currency, limit in plan.resolved.budget.limits.items():
        if currency == "tokens":
            bought[currency] = limit - plan.selection_tokens
        elif currency != "bytes":
            cost = _flop_cost(plan, currency)
            if cost is None:
                notes.append(
                    f"{format_amount(currency, limit)} are not turned into tokens: what a FLOP takes of them is not "
                    "known; give --flops_per_second, for money also price_per_hour."
                )
                continue
            left = limit / cost - (0.0 if currency == "steps" else aside)
            bought[currency] = left * plan.step_tokens / plan.step_flops if plan.step_flops else 0.0
    scarcest = min(bought, key=lambda currency: bought[currency], default=None)
    return (None if scarcest is None else bought[scarcest]), scarcest, notes


def token_cost(plan: Plan, currency: str, tokens: float) -> float:
    """What one training token costs in a currency, or as a share of the budget.

    Raises:
        OptionError: It is not known.
    """
    if currency in ("tokens", "share"):
        return 1.0 if currency == "tokens" else 1.0 / tokens
    cost = _flop_cost(plan, currency)
    if cost is None:
        raise OptionError(
            f"a price in {currency} needs what a FLOP takes of them; give --flops_per_second, for money also "
            "--price_per_hour, or a price per FLOP."
        )
    return cost * plan.step_flops / plan.step_tokens


def _flop_cost(plan: Plan, currency: str) -> float | None:
    """What one FLOP of training costs in a currency; None where that is not known."""
    hardware, hourly = plan.facts.hardware, plan.resolved.options.price_per_hour
    seconds = 1.0 / (hardware.flops_per_second * hardware.world_size) if hardware.flops_per_second else None
    costs = {
        "flops": 1.0,
        "steps": 1.0 / plan.step_flops if plan.step_flops else None,
        "seconds": seconds,
        "usd": None if seconds is None or hourly is None else seconds * hourly / 3600.0,
    }
    return costs.get(currency)


def _price(plan: Plan, wishes: argparse.Namespace) -> tuple[str, float] | None:
    """Currency and nats per unit: the flag's, else that which the governor stops by."""
    from hf_eff.supervisor import governing_currency

    currency, amount = wishes.price or (None, getattr(plan.resolved.governor.config, "price", None))
    return None if amount is None else (currency or governing_currency(plan.resolved.budget), amount)


def _unique_tokens(plan: Plan) -> float | None:
    """Tokens of the chosen rows, padded as budgets count them."""
    from hf_eff.numerics.planned_step import planned_length

    facts = plan.facts
    if not plan.selected_rows:
        return None
    return plan.selected_rows * planned_length(facts)


def _planned_tokens(plan: Plan, unique: float | None) -> float | None:
    run = plan.facts.run
    if run.max_steps > 0:
        return run.max_steps * plan.step_tokens
    return None if unique is None else run.epochs * unique


def _forward_flops(plan: Plan) -> float:
    """FLOPs of one token's forward through the model as it was given."""
    from hf_eff.numerics.flops import forward_flops
    from hf_eff.numerics.planned_step import planned_shape

    shape = planned_shape(dataclasses.replace(plan.facts, pool=plan.training_facts.pool))
    return forward_flops(plan.facts.model, shape) / (shape.rows * shape.length)


def _probe_flops(plan: Plan, budget: float) -> float:
    """FLOPs of a probe; without held-out rows, of one that reads as many as a governor would, as long as the pool's."""
    from hf_eff.engines.probe_spacing import WIDEST_GAP, probe_flops
    from hf_eff.loss_forecast import PROBE_SHARE

    facts, examples = plan.facts, getattr(plan.resolved.governor.config, "num_examples", _PROBE_EXAMPLES)
    if not facts.pool.num_reference:
        pool = dataclasses.replace(facts.pool, num_reference=examples, mean_reference_tokens=facts.pool.mean_tokens)
        facts = facts.replace(pool=pool)
    return probe_flops(facts, examples, WIDEST_GAP * PROBE_SHARE * budget)
