"""Predicted beside measured: per memory term, per currency, per method, and where the time went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_eff.contracts.cost import MEMORY_TERMS
from hf_eff.report.secrets import publishable
from hf_eff.units import CURRENCIES

_KIND_OF_PURPOSE = {"select": "selection", "train": "memory", "probe": "governor"}
_PURPOSES = ("select", "train", "probe", "eval", "save")


def build_report(
    plan: Mapping[str, Any],
    ledger_state: Mapping[str, Any],
    measured: Mapping[str, Any],
    selection: Mapping[str, Any] | None = None,
    governor: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Compare a finished or interrupted run with its plan.

    Args:
        plan: ``Plan.to_dict()``.
        ledger_state: ``spent`` (amount by currency, whole run) and ``by_purpose`` (purpose to amounts
            by currency). What was not metered is left out or None.
        measured: ``bytes`` (peak by memory term), ``peak_bytes``, ``steps`` (optimizer steps done),
            ``stopped_by`` (a currency, ``"governor"`` or None) and ``out_of_memory`` (one mapping for each time
            that memory ran out). Each may be left out.
        selection: Facts about the choice of rows, for people; None without one.
        governor: Facts about the decisions taken; None without a governor.
        environment: Versions, device, ``command``, ``base_model``, ``datasets``.

    Returns:
        A JSON-able mapping without secrets. None stands for "unavailable" throughout.
    """
    predicted = plan.get("predicted", {})
    spent = ledger_state.get("spent", {})
    purposes = ledger_state.get("by_purpose", {})
    currencies = _currencies(plan, spent, measured)
    report = {
        "format": "hf_eff.report",
        "format_version": 1,
        "methods": plan.get("methods", {}),
        "options": plan.get("options", {}),
        "memory": _memory(predicted, measured),
        "currencies": currencies,
        "per_step": _per_step(predicted, purposes.get("train", {}), measured.get("steps")),
        "purposes": _purposes(plan, purposes),
        "binding": _binding(currencies, predicted, measured),
        "steps": {"planned": predicted.get("steps"), "done": measured.get("steps")},
        "out_of_memory": list(measured.get("out_of_memory", [])),
        "selection": selection,
        "governor": governor,
        "environment": environment or {},
        "warnings": plan.get("warnings", []),
    }
    cleaned: dict[str, Any] = publishable(report)
    return cleaned


def _ratio(measured: float | None, predicted: float | None) -> float | None:
    return measured / predicted if measured is not None and predicted else None


def _row(predicted: float | None, measured: float | None) -> dict[str, float | None]:
    return {"predicted": predicted, "measured": measured, "ratio": _ratio(measured, predicted)}


def _memory(predicted: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
    before, after = predicted.get("bytes", {}), measured.get("bytes", {})
    rows = {term: _row(before.get(term), after.get(term)) for term in MEMORY_TERMS}
    return {**rows, "peak": _row(predicted.get("peak_bytes"), measured.get("peak_bytes"))}


def _currencies(
    plan: Mapping[str, Any], spent: Mapping[str, Any], measured: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    limits = plan.get("budget", {})
    predicted = _predicted_amounts(plan.get("predicted", {}))
    amounts = {**spent, "steps": spent.get("steps", measured.get("steps"))}
    amounts["bytes"] = measured.get("peak_bytes", spent.get("bytes"))
    return {
        name: {
            **_row(predicted.get(name), amounts.get(name)),
            "limit": limits.get(name),
            "share": _ratio(amounts.get(name), limits.get(name)),
        }
        for name in CURRENCIES
    }


def _predicted_amounts(predicted: Mapping[str, Any]) -> dict[str, float | None]:
    """Totals up to the step at which the plan expected the run to end."""
    end, flops = predicted.get("stop_step"), predicted.get("flops", {})
    amounts: dict[str, float | None] = {"steps": end, "bytes": predicted.get("peak_bytes"), "flops": None}
    if end is not None and "step_flops" in predicted:
        once = flops.get("select", 0.0) + flops.get("probe", 0.0)
        amounts["flops"] = once + predicted["step_flops"] * end
    if end is not None and "step_tokens" in predicted:
        amounts["tokens"] = predicted.get("selection_tokens", 0.0) + predicted["step_tokens"] * end
    if end == predicted.get("steps"):  # the plan's duration is for the run without a budget
        amounts["seconds"] = predicted.get("seconds")
    return amounts


def _per_step(
    predicted: Mapping[str, Any], trained: Mapping[str, Any], steps: int | None
) -> dict[str, dict[str, float | None]]:
    """Means over the optimizer steps done: comparable however early the run ended."""
    rows = {}
    for currency, guess in (
        ("flops", predicted.get("step_flops")),
        ("tokens", predicted.get("step_tokens")),
        ("seconds", None),
    ):
        total = trained.get(currency)
        rows[currency] = _row(guess, total / steps if total is not None and steps else None)
    return rows


def _purposes(plan: Mapping[str, Any], purposes: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a purpose, with the methods that it is charged to."""
    predicted = dict(plan.get("predicted", {}).get("flops", {}))
    end, per_step = plan.get("predicted", {}).get("stop_step"), plan.get("predicted", {}).get("step_flops")
    if end is not None and per_step is not None:
        predicted["train"] = end * per_step
    total = sum(spent.get("seconds") or 0.0 for spent in purposes.values())
    rows = []
    for purpose in sorted({*_PURPOSES, *purposes}, key=lambda name: (_order(name), name)):
        spent = purposes.get(purpose, {})
        guess = predicted.get(purpose)
        if guess or any(spent.values()):
            rows.append(
                {
                    "purpose": purpose,
                    "methods": _methods(plan, purpose),
                    "flops": _row(guess, spent.get("flops")),
                    "tokens": spent.get("tokens"),
                    "seconds": spent.get("seconds"),
                    "time_share": _ratio(spent.get("seconds"), total),
                }
            )
    return rows


def _order(purpose: str) -> int:
    return _PURPOSES.index(purpose) if purpose in _PURPOSES else len(_PURPOSES)


def _methods(plan: Mapping[str, Any], purpose: str) -> list[str]:
    kind = _KIND_OF_PURPOSE.get(purpose)
    return [name.partition(":")[2] for name in plan.get("methods", {}) if name.partition(":")[0] == kind]


def _binding(
    currencies: Mapping[str, Mapping[str, Any]], predicted: Mapping[str, Any], measured: Mapping[str, Any]
) -> dict[str, Any]:
    """The resource that ended the run, or that came closest to its limit."""
    shares = {name: row["share"] for name, row in currencies.items() if row["share"] is not None}
    stopped_by = measured.get("stopped_by")
    closest = max(shares, key=lambda name: shares[name], default=None)
    currency = stopped_by if stopped_by in CURRENCIES else closest
    return {
        "currency": currency,
        "share": shares.get(currency) if currency is not None else None,
        "stopped_by": stopped_by,
        "ended_early": _ended_early(predicted.get("steps"), measured.get("steps")),
    }


def _ended_early(planned: int | None, done: int | None) -> bool | None:
    return None if planned is None or done is None else done < planned
