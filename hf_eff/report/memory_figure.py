"""Predicted peak bytes of several memory methods as stacked bars."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_eff.contracts.cost import MEMORY_TERMS
from hf_eff.errors import MissingDependencyError, OptionError
from hf_eff.files import replacing
from hf_eff.units import format_bytes

FORMATS = (".png", ".svg", ".pdf")
_COLOURS = {
    "weights": "#2f6fde",
    "gradients": "#e08a2e",
    "optimizer": "#7a52c7",
    "activations": "#2e9e6b",
    "rest": "#9aa3ae",
}
_GIB = 2**30


def draw_memory(table: Mapping[str, Any], path: Path) -> Path:
    """Draw one bar a method, its terms from left to right, with the budget and measured peaks where there are any.

    Args:
        table: What ``MemoryTable.to_dict`` gives.
        path: A file ending in one of ``FORMATS``; equal tables give equal SVG files.

    Returns:
        The file.

    Raises:
        OptionError: The ending is another one, or no row can be drawn.
        MissingDependencyError: matplotlib is not installed.
    """
    rows = [row for row in table["rows"] if "refused" not in row]
    check_figure(path)
    if not rows:
        raise OptionError(f"figure={str(path)!r} would be empty: every method was refused.")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "hf_eff", "svg.fonttype": "none"}):
        figure = Figure(figsize=(9, 1.6 + 0.5 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        _bars(axes, rows)
        _marks(axes, rows, table["budget_bytes"])
        axes.set_yticks(range(len(rows)), [row["memory"] for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel("peak GiB")
        shape = f"{table['batch_size']} x {table['max_length']} tokens"
        axes.set_title(f"{table['architecture']}, {table['params'] / 1e6:,.1f}M parameters, {shape}")
        figure.legend(loc="outside lower center", ncols=len(MEMORY_TERMS) + 2, frameon=False)
        with replacing(path) as temporary:
            metadata = (
                {} if path.suffix == ".png" else {"Date": None} if path.suffix == ".svg" else {"CreationDate": None}
            )
            figure.savefig(temporary, format=path.suffix[1:], dpi=150, metadata=metadata)
    return path


def check_figure(path: Path) -> None:
    """Refuse a figure that cannot be drawn, before anything is computed for it.

    Raises:
        OptionError: The file's ending is no format.
        MissingDependencyError: matplotlib is not installed.
    """
    if path.suffix not in FORMATS:
        raise OptionError(f"figure={str(path)!r} must end in one of {list(FORMATS)}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError(
            "A figure needs the package 'matplotlib'; install it with: pip install 'hf_eff[plots]'"
        )


def _bars(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    left = [0.0] * len(rows)
    for term in MEMORY_TERMS:
        widths = [row[term] / _GIB for row in rows]
        axes.barh(range(len(rows)), widths, left=left, height=0.6, color=_COLOURS[term], label=term)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, row in enumerate(rows):
        axes.annotate(
            format_bytes(row["total"]),
            (left[place], place),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_xlim(0, 1.18 * max(left))


def _marks(axes: Any, rows: Sequence[Mapping[str, Any]], budget: float | None) -> None:
    """The budget as a line, unless it is far beyond every bar, and measured peaks as points."""
    widest = axes.get_xlim()[1]
    if budget is not None and budget / _GIB < 3 * widest:
        axes.axvline(budget / _GIB, color="black", linestyle="--", linewidth=1, label="budget")
        axes.set_xlim(0, max(widest, 1.05 * budget / _GIB))
    peaks = [(row["measured"]["total"] / _GIB, place) for place, row in enumerate(rows) if _was_measured(row)]
    if peaks:
        axes.plot(*zip(*peaks, strict=True), "D", color="black", markersize=5, label="measured")


def _was_measured(row: Mapping[str, Any]) -> bool:
    return "total" in row.get("measured", {})
