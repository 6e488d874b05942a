"""A plan as people read it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from hf_eff.numerics.payback import PayBack
from hf_eff.units import format_amount, format_bytes, format_seconds

if TYPE_CHECKING:
    from hf_eff.plan import Plan


def plan_lines(plan: Plan) -> list[str]:
    """A plan as lines of text."""
    resolved = plan.resolved
    lines = [
        f"{'selection':<12}{' then '.join(chosen.spec.name for chosen in resolved.pool_stages)}",
        f"{'memory':<12}{resolved.options.memory}",
        f"{'governor':<12}{resolved.governor.spec.name} ({resolved.options.governor_mode})",
        f"{'budget':<12}{resolved.budget or 'none'}",
        f"{'rows':<12}{_count(plan.selected_rows)} of {_count(plan.facts.pool.num_rows)}",
        f"{'steps':<12}{_count(plan.steps)} planned, ends at {_count(plan.stop_step)}",
        "",
        f"{'memory term':<16}{'predicted':>14}",
        *(f"{term:<16}{format_bytes(amount):>14}" for term, amount in plan.bytes.items()),
        f"{'peak':<16}{format_bytes(plan.peak_bytes):>14}",
        *_ladder_lines(plan),
        "",
        f"{'purpose':<16}{'predicted':>14}",
        *(f"{purpose:<16}{format_amount('flops', amount):>14}" for purpose, amount in plan.flops.items()),
        f"{'one step':<16}{format_amount('flops', plan.step_flops):>14}",
        f"{'time':<16}{'not measured' if plan.seconds is None else format_seconds(plan.seconds):>14}",
        *([] if plan.payback is None else ["", f"pay-back: {plan.payback}"]),
    ]
    return lines + [f"note: {warning}" for warning in plan.warnings]


def _ladder_lines(plan: Plan) -> list[str]:
    """What is tried when memory runs out; a star marks what changes the result."""
    rungs = [f"{rung.name}{'' if rung.exact else '*'} ({format_bytes(rung.bytes)})" for rung in plan.ladder]
    if not rungs:
        return []
    star = "" if all(rung.exact for rung in plan.ladder) else "   (* changes the result)"
    return [f"{'if it runs out':<16}{', then '.join(rungs)}{star}"]


def payback_facts(payback: PayBack) -> dict[str, Any]:
    """JSON-able: infinite uses are None."""
    uses = payback.break_even_uses
    return {
        "speedup": payback.speedup,
        "needed_speedup": payback.needed_speedup,
        "break_even_uses": None if math.isinf(uses) else uses,
        "pays": payback.pays(),
        "verdict": str(payback),
    }


def _count(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"
