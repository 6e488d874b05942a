"""``report.md``: a report as tables that people read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hf_eff.report.markdown import table
from hf_eff.report.secrets import mask_secrets
from hf_eff.units import format_amount, format_bytes, format_seconds

UNAVAILABLE = "unavailable"
_LABELS = {
    "flops": "FLOPs",
    "tokens": "tokens",
    "steps": "optimizer steps",
    "seconds": "time",
    "bytes": "peak memory",
    "kwh": "energy",
    "usd": "money",
}


def render_report(report: Mapping[str, Any], figures: Sequence[str] = ()) -> str:
    """The whole report as Markdown, ending in a newline.

    Args:
        report: What ``build_report`` returned.
        figures: Pictures beside the report.
    """
    parts = [
        "# Report",
        binding_sentence(report),
        "## Cost",
        costs_table(report),
        "## Memory at the peak",
        memory_table(report),
        *_rescues(report),
        "## Where it went",
        purposes_table(report),
        *_facts("## Selection", report.get("selection")),
        *_facts("## Governor", report.get("governor")),
        *pictures(figures),
        *_warnings(report),
        *_facts("## Environment", report.get("environment")),
    ]
    return mask_secrets("\n\n".join(parts) + "\n")


def binding_sentence(report: Mapping[str, Any]) -> str:
    """One line: which resource was binding and how the run ended."""
    binding, steps = report["binding"], report["steps"]
    done, planned = _number(steps["done"]), _number(steps["planned"])
    end = f"The run did {done} of {planned} planned optimizer steps"
    if binding["stopped_by"] == "governor":
        end += "; the governor ended it because more compute no longer paid"
    name = binding["currency"]
    if name is None:
        return f"{end}. No limit was set."
    label, share = _LABELS[name], binding["share"]
    used = UNAVAILABLE if share is None else f"{share:.1%} of its limit used"
    if binding["stopped_by"] == name:
        return f"{end}. Binding resource: {label}, {used}; the next step would have passed it."
    return f"{end}. No limit was reached; the closest is {label}, {used}."


def costs_table(report: Mapping[str, Any]) -> str:
    """Predicted and measured per currency, then per optimizer step."""
    rows = []
    for name, row in report["currencies"].items():
        limit = "none" if row["limit"] is None else format_amount(name, row["limit"])
        rows.append((_label(name, report), *_pair(name, row), limit, _percent(row["share"])))
    for name, row in report["per_step"].items():
        rows.append((f"{_label(name, report)} a step", *_pair(name, row), "", ""))
    return table(["Resource", "Predicted", "Measured", "Measured / predicted", "Limit", "Of the limit"], rows)


def memory_table(report: Mapping[str, Any]) -> str:
    """Predicted and measured bytes per memory term."""
    rows = [(term, *_pair("bytes", row)) for term, row in report["memory"].items()]
    return table(["Term", "Predicted", "Measured", "Measured / predicted"], rows)


def pictures(figures: Sequence[str]) -> list[str]:
    """Files beside a page as Markdown pictures."""
    return [f"![{_stem(name)}]({quote(name)})" for name in figures]


def _stem(name: str) -> str:
    return Path(name).stem.replace("_", " ").replace("[", "").replace("]", "")


def _label(name: str, report: Mapping[str, Any]) -> str:
    """A currency's name; energy that no counter gave says so."""
    estimated = name == "kwh" and report.get("environment", {}).get("energy") == "estimated"
    return f"{_LABELS[name]} (estimated)" if estimated else _LABELS[name]


def _rescues(report: Mapping[str, Any]) -> list[str]:
    """Where memory ran out and what was done about it; nothing when it did not."""
    events = report.get("out_of_memory") or []
    rows = [(event["step"], event["batch"], event["rung"], "yes" if event["exact"] else "no") for event in events]
    return ["## Where memory ran out", table(["Step", "Batch", "Then", "Same result"], rows)] if rows else []


def purposes_table(report: Mapping[str, Any]) -> str:
    """FLOPs, tokens and time per purpose and the methods they are charged to."""
    rows = [
        (
            row["purpose"],
            " + ".join(row["methods"]) or "trainer",
            *_pair("flops", row["flops"]),
            _amount("tokens", row["tokens"]),
            _amount("seconds", row["seconds"]),
            _percent(row["time_share"]),
        )
        for row in report["purposes"]
    ]
    header = ["Purpose", "Method", "FLOPs predicted", "FLOPs measured", "Measured / predicted", "Tokens", "Time"]
    return table([*header, "Share of time"], rows)


def _pair(currency: str, row: Mapping[str, Any]) -> tuple[str, str, str]:
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
    return _amount(currency, row["predicted"]), _amount(currency, row["measured"]), ratio


def _amount(currency: str, value: float | None) -> str:
    if value is None:
        return UNAVAILABLE
    if currency == "bytes":
        return format_bytes(value)
    return format_seconds(value) if currency == "seconds" else format_amount(currency, value)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _number(value: int | None) -> str:
    return "an unknown number" if value is None else f"{value:,}"


def _facts(title: str, facts: Mapping[str, Any] | None) -> list[str]:
    """A title and a key-value table, or nothing when there are no facts."""
    if not facts:
        return []
    return [title, table(["Fact", "Value"], [(key, _text(value)) for key, value in facts.items()])]


def _text(value: Any) -> str:
    if value is None:
        return UNAVAILABLE
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value)
    return str(value)


def _warnings(report: Mapping[str, Any]) -> list[str]:
    notes = report.get("warnings") or []
    return ["## Notes", "\n".join(f"- {note}" for note in notes)] if notes else []
