"""The table of ``hf-eff profile`` as lines of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_eff.contracts.cost import MEMORY_TERMS
from hf_eff.units import format_bytes

_AMOUNTS = (*MEMORY_TERMS, "total")
_WIDTH = 13  # of a column of bytes


def profile_lines(table: Mapping[str, Any]) -> list[str]:
    """Head, one line a method, and below them what to change and what was measured, where there is any.

    Args:
        table: What ``MemoryTable.to_dict`` gives.
    """
    rows: Sequence[Mapping[str, Any]] = table["rows"]
    width = max([len("measured"), *(len(row["memory"]) for row in rows)])
    host, budget = any(row.get("host_bytes") for row in rows), table["budget_bytes"] is not None
    lines = [_title(table), f"{'memory':<{width}}{_names(host=host, budget=budget)}"]
    lines += [_row(row, width, host=host, budget=budget) for row in rows]
    changes = [row for row in rows if row.get("change")]
    if changes:
        lines += ["", "change first", *(f"{row['memory']:<{width}}  {row['change']['text']}" for row in changes)]
    measured = [row for row in rows if "measured" in row]
    if measured:
        lines += ["", f"{'measured':<{width}}{'':11}" + "".join(f"{name:>{_WIDTH}}" for name in _AMOUNTS)]
        lines += [line for row in measured for line in _measured(row["memory"], row["measured"], width)]
    return lines


def _title(table: Mapping[str, Any]) -> str:
    setting = table["setting"]
    shown = [name for name in ("bf16", "activation_checkpointing") if setting.get(name)]
    shown += [setting["dtype"]] if setting.get("dtype") else []
    shown += [setting["optim"]] if setting.get("optim", "adamw_torch") != "adamw_torch" else []
    if setting.get("world_size", 1) > 1:
        shown.append(f"{setting['world_size']} processes ({setting.get('backend') or 'ddp'})")
    if table["budget_bytes"] is not None:
        shown.append(f"budget {format_bytes(table['budget_bytes'])}")
    shape = f"{table['batch_size']} x {table['max_length']} tokens"
    return ", ".join([table["architecture"], f"{table['params'] / 1e6:,.1f}M parameters", shape, *shown])


def _names(*, host: bool, budget: bool) -> str:
    amounts = "".join(f"{name:>{_WIDTH}}" for name in (*_AMOUNTS, *(["host"] if host else [])))
    sizes = f"  {'fits':<4}{'batch':>9}{'length':>9}" if budget else ""
    return f"{amounts}  {'binding':<11}{'flops':>6}{sizes}"


def _row(row: Mapping[str, Any], width: int, *, host: bool, budget: bool) -> str:
    if "refused" in row:
        return f"{row['memory']:<{width}}  {row['refused']}"
    names = [*_AMOUNTS, *(["host_bytes"] if host else [])]
    amounts = "".join(f"{format_bytes(row[name]):>{_WIDTH}}" for name in names)
    sizes = ""
    if budget:
        longest = f"{row['longest']:,}{'=' if row['longest_is_model'] else ''}"
        sizes = f"  {'yes' if row['fits'] else 'no':<4}{row['largest_batch']:>9,}{longest:>9}"
    return f"{row['memory']:<{width}}{amounts}  {row['binding']:<11}{row['time_factor']:>5.2f}x{sizes}"


def _measured(name: str, found: Mapping[str, Any], width: int) -> list[str]:
    if "failed" in found:
        return [f"{name:<{width}}  {found['failed']}"]
    measured = {**found["bytes"], "total": found["total"]}
    lines = []
    for first, kind, amounts in ((name, "predicted", found["predicted"]), ("", "measured", measured)):
        lines.append(
            f"{first:<{width}}  {kind:<9}" + "".join(f"{format_bytes(amounts[n]):>{_WIDTH}}" for n in _AMOUNTS)
        )
    errors = "".join(f"{_percent(found['error'][term]):>{_WIDTH}}" for term in _AMOUNTS)
    return [*lines, f"{'':<{width}}  {'error':<9}{errors}"]


def _percent(error: float | None) -> str:
    return "-" if error is None else f"{error:+.1%}"
