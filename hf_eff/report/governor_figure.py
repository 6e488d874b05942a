"""What a governor saw and did, as SVG drawn from its log alone, without a plotting library.

From above: held-out loss against compute with the decisions marked; the gain that was expected against the gain that
was asked for; the compute by purpose.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from hf_eff.contracts.governor import Telemetry
from hf_eff.engines.decision_log import GovernorLog, LoggedDecision
from hf_eff.errors import DataError
from hf_eff.files import write_text
from hf_eff.report.secrets import mask_secrets
from hf_eff.units import format_amount

FIGURE = "governor.svg"
"""Name of the figure beside the report."""
_WIDTH, _LEFT, _RIGHT = 760, 76, 24
_DECISIONS = {
    "refresh": "#2e9e6b",
    "next_band": "#0f8b9d",
    "widen": "#7a52c7",
    "switch_memory": "#e08a2e",
    "cooldown": "#b8860b",
    "stop": "#c0392b",
}
_PURPOSES = {"train": "#2f6fde", "probe": "#e08a2e", "select": "#2e9e6b", "save": "#9aa3ae", "eval": "#7a52c7"}
_LOSS, _NEEDED, _UNSPENT, _OTHER = "#2f6fde", "#c0392b", "#eef0f3", "#444444"
_NUMBERS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_MOST_LABELS = 12
"""Decisions with a label of their own; a run with more of them has marks only."""

Point = tuple[float, float]


@dataclass(frozen=True)
class _Panel:
    """A rectangle with axes: positions of values in it."""

    top: float
    height: float
    x: Point
    y: Point
    log: bool = False

    def at(self, x: float, y: float) -> Point:
        """Pixels of a point."""
        low, high = self.y
        share = (self._scaled(y) - self._scaled(low)) / (self._scaled(high) - self._scaled(low))
        return self.across(x), self.top + self.height * (1.0 - share)

    def across(self, x: float) -> float:
        """Pixels from the left."""
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (x - self.x[0]) / (self.x[1] - self.x[0])

    def _scaled(self, y: float) -> float:
        return math.log(y) if self.log else y


def draw_governor(log: str | Path, path: str | Path) -> Path | None:
    """Draw the log of a run.

    Args:
        log: ``governor.jsonl``, of a run that has ended or is under way.
        path: The SVG file; equal logs give equal files.

    Returns:
        The file, or None where the log holds nothing to draw.

    Raises:
        DataError: The file is no governor log.
    """
    text = governor_svg(GovernorLog(log))
    if text is None:
        return None
    write_text(path, text)
    return Path(path)


def figure_of(folder: str | Path) -> list[str]:
    """Draw the figure of a run's folder; its name, or nothing where there is no log that can be drawn.

    A figure is never worth a run: a log that cannot be read has none.
    """
    log = Path(folder) / "governor.jsonl"
    try:
        drawn = draw_governor(log, Path(folder) / FIGURE) if log.is_file() else None
    except (AttributeError, DataError, OSError, LookupError, TypeError, ValueError):
        return []
    return [FIGURE] if drawn is not None else []


def governor_svg(log: GovernorLog) -> str | None:
    """The figure as an SVG document; None for a log without a look at a finite amount of compute.

    Raises:
        DataError: The file is no governor log.
    """
    looks = [look for look in log.decisions() if math.isfinite(look.telemetry.compute)]
    if not looks:
        return None
    last = looks[-1].telemetry
    limit = last.compute_limit if math.isfinite(last.compute_limit) else 0.0
    across = (0.0, max(last.compute, limit) or 1.0)
    currency = _currency(last)
    parts = [
        *_loss_panel(looks, across, currency),
        *_gain_panel(looks, across),
        *_budget_panel(_by_purpose(log.summary(), last, currency), across[1], currency),
    ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} 620" font-family="sans-serif" font-size="12">'
    )
    return mask_secrets("\n".join([head, f'<rect width="{_WIDTH}" height="620" fill="white"/>', *parts, "</svg>\n"]))


def _loss_panel(looks: Sequence[LoggedDecision], across: Point, currency: str) -> list[str]:
    """Held-out loss over compute, with a vertical mark at each decision that is none to go on."""
    readings = [(look.telemetry.compute, look.telemetry.probe.mean) for look in looks if look.telemetry.probe]
    panel = _Panel(56, 220, across, _range(value for _, value in readings))
    title = "held-out loss" if readings else "held-out loss: no probe was taken"
    return [
        _text(_LEFT, 20, title),
        *_cooldown(looks, panel),
        *_frame(panel, labelled=any(math.isfinite(value) for _, value in readings)),
        *_curve(readings, panel, _LOSS),
        *_marks(looks, panel),
        _text(_LEFT, panel.top + panel.height + 16, _amount(currency, across[0])),
        _text(_WIDTH - _RIGHT, panel.top + panel.height + 16, _amount(currency, across[1]), "end"),
    ]


def _cooldown(looks: Sequence[LoggedDecision], panel: _Panel) -> list[str]:
    """Shade behind the stretch in which the learning rate was lowered for the end."""
    inside = [look.telemetry.compute for look in looks if look.telemetry.phase == "cooldown"]
    if not inside:
        return []
    left, right = panel.across(min(inside)), panel.across(max(inside))
    return [_box(left, panel.top, max(right - left, 1.0), panel.height, "#fbf3dc", "cooldown")]


def _marks(looks: Sequence[LoggedDecision], panel: _Panel) -> list[str]:
    found: list[tuple[float, str, str]] = []
    for look in looks:
        name = look.decision.action + (f":{look.decision.target}" if look.decision.target else "")
        # A verdict that is only advised is repeated at every look; the first of a row is drawn.
        repeated = bool(found) and found[-1][1] == name and look.decision.action in ("stop", "cooldown")
        if look.decision.action != "continue" and not repeated:
            found.append((look.telemetry.compute, name, look.decision.reason))
    parts = []
    for number, (compute, name, reason) in enumerate(found):
        x, colour = panel.across(compute), _DECISIONS.get(name.partition(":")[0], _OTHER)
        parts.append(
            f'<line class="decision" x1="{x:.1f}" y1="{panel.top:.1f}" x2="{x:.1f}" '
            f'y2="{panel.top + panel.height:.1f}" stroke="{colour}" stroke-dasharray="4 3">'
            f"<title>{escape(f'{name}: {reason}')}</title></line>"
        )
        if len(found) <= _MOST_LABELS:
            anchor = "end" if x > _WIDTH / 2 else "start"
            parts.append(_text(x, panel.top - 4 - 12 * (number % 2), name, anchor, colour))
    return parts


def _gain_panel(looks: Sequence[LoggedDecision], across: Point) -> list[str]:
    """Expected gain against the gain asked for, on a logarithmic scale where every amount is above zero."""
    gains = _details(looks, "gain")
    needed = _details(looks, "needed")
    values = [value for _, value in (*gains, *needed) if math.isfinite(value)]
    log = bool(values) and min(values) > 0.0
    panel = _Panel(336, 150, across, _range(values, log=log), log)
    title = "expected gain (blue) against the threshold (red)" if values else "no gain was estimated"
    lines = [*_curve(gains, panel, _LOSS), *_curve(needed, panel, _NEEDED)]
    return [_text(_LEFT, 326, title), *_frame(panel, labelled=bool(values)), *lines]


def _details(looks: Sequence[LoggedDecision], key: str) -> list[Point]:
    """Compute and one number of each decision that rests on it."""
    return [
        (look.telemetry.compute, _number(look.decision.details[key])) for look in looks if key in look.decision.details
    ]


def _budget_panel(purposes: Mapping[str, float], total: float, currency: str) -> list[str]:
    """One bar as wide as the budget: what each purpose took of it, and what is left."""
    top, height, width = 540, 26, _WIDTH - _LEFT - _RIGHT
    named = {**purposes, "unspent": max(0.0, total - sum(purposes.values()))}
    scale = width / max(total, sum(purposes.values()), 1e-300)
    parts = [_text(_LEFT, top - 10, "compute by purpose")]
    left = float(_LEFT)
    for name, amount in named.items():
        label = f"{name} {_amount(currency, amount)} ({amount / total:.1%})"
        parts.append(_box(left, top, amount * scale, height, _PURPOSES.get(name, _UNSPENT), label))
        left += amount * scale
    shown = [(name, amount) for name, amount in named.items() if amount > 0.0]
    step = width / max(len(shown), 1)
    for place, (name, amount) in enumerate(shown):
        colour = _PURPOSES.get(name, _OTHER)
        parts.append(_text(_LEFT + place * step, top + height + 18, f"{name} {amount / total:.1%}", colour=colour))
        parts.append(_text(_LEFT + place * step, top + height + 34, _amount(currency, amount)))
    return parts


def _by_purpose(summary: Mapping[str, Any] | None, last: Telemetry, currency: str) -> dict[str, float]:
    """Governing currency by purpose: what the log's end says, or else what its last look implies."""
    told = (summary or {}).get("by_purpose") or {}
    amounts = {name: _number(of.get(currency, 0.0)) for name, of in told.items() if isinstance(of, Mapping)}
    if sum(amounts.values()) > 0.0:
        return {name: amounts.get(name, 0.0) for name in (*_PURPOSES, *(set(amounts) - set(_PURPOSES)))}
    probes = min(last.probe_spent, last.compute)
    chosen = min(max(0.0, last.overhead_spent - probes), last.compute - probes)
    return {"train": last.compute - probes - chosen, "probe": probes, "select": chosen}


def _currency(telemetry: Telemetry) -> str:
    """What compute is counted in: the one additive limit, a share of several, or FLOPs."""
    additive = [name for name in telemetry.limits if name not in ("bytes", "steps")]
    return additive[0] if len(additive) == 1 else "share" if additive else "flops"


def _amount(currency: str, amount: float) -> str:
    return f"{amount:.1%} of the budget" if currency == "share" else format_amount(currency, amount)


def _number(value: Any) -> float:
    """A number of a log, in which JSON has no NaN and no infinity."""
    if isinstance(value, str):
        return _NUMBERS.get(value, math.nan)
    return float(value) if isinstance(value, (int, float)) else math.nan


def _range(values: Iterable[float], *, log: bool = False) -> Point:
    """Lowest and highest finite value with some air, never equal."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    if log:
        return low / 1.3, high * 1.3
    air = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return low - air, high + air


def _curve(points: Sequence[Point], panel: _Panel, colour: str) -> list[str]:
    """A line through the finite points, interrupted where one is not, and a dot on each."""
    parts, stretch = [], []
    for x, y in [*points, (math.nan, math.nan)]:
        if math.isfinite(x) and math.isfinite(y):
            stretch.append(panel.at(x, y))
            continue
        if len(stretch) > 1:
            joined = " ".join(f"{left:.1f},{top:.1f}" for left, top in stretch)
            parts.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{left:.1f}" cy="{top:.1f}" r="2" fill="{colour}"/>' for left, top in stretch]
        stretch = []
    return parts


def _frame(panel: _Panel, *, labelled: bool) -> list[str]:
    """Both axes, and the ends of the vertical one where it has a scale."""
    left, right, floor = _LEFT, _WIDTH - _RIGHT, panel.top + panel.height
    lines = [
        f'<polyline points="{left},{panel.top} {left},{floor} {right},{floor}" fill="none" stroke="black"/>',
    ]
    if labelled:
        lines += [
            _text(left - 6, floor, f"{panel.y[0]:.3g}", "end"),
            _text(left - 6, panel.top + 10, f"{panel.y[1]:.3g}", "end"),
        ]
    return lines


def _box(x: float, y: float, width: float, height: float, colour: str, title: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}">'
        f"<title>{escape(title)}</title></rect>"
    )


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = "black") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'
