"""Predicted loss against epochs: band, pilot, the price as a tangent, and where the run ends."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_eff.files import replacing
from hf_eff.report.memory_figure import check_figure

_LOSS, _PILOT, _PRICE, _BUDGET = "#2f6fde", "#444b55", "#e08a2e", "#2e9e6b"
_METADATA: dict[str, dict[str, None]] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
_MARGIN = 0.06


def draw_forecast(facts: Mapping[str, Any], path: Path) -> Path:
    """Draw a forecast.

    The price is a line that falls, over an epoch, by the nats that the epoch's cost must buy: it touches the loss
    where the next token stops paying.

    Args:
        facts: What ``LossForecast.to_dict`` gives.
        path: A file ending in one of ``memory_figure.FORMATS``; equal forecasts give equal SVG files.

    Returns:
        The file.

    Raises:
        OptionError: The ending is another one.
        MissingDependencyError: matplotlib is not installed.
    """
    check_figure(path)
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "hf_eff", "svg.fonttype": "none"}):
        figure = Figure(figsize=(8, 4.8), layout="constrained")
        axes = figure.add_subplot()
        _loss(axes, facts)
        _ends(axes, facts)
        axes.set_xlabel("epochs")
        axes.set_ylabel("loss (nats per token)" + (", up to a constant" if facts["shape_only"] else ""))
        axes.set_title(
            f"Loss forecast from {facts['source']}" if not facts["shape_only"] else "Loss forecast, shape only"
        )
        axes.legend(frameon=False)
        with replacing(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:], dpi=150, metadata=_METADATA.get(path.suffix, {}))
    return path


def _loss(axes: Any, facts: Mapping[str, Any]) -> None:
    """The curve with its band, and the pilot's points; they set the limits of the axes."""
    curve = facts["curve"]
    epochs, losses = [point["epochs"] for point in curve], [point["loss"] for point in curve]
    spreads = [point["sd"] or 0.0 for point in curve]
    low = [loss - spread for loss, spread in zip(losses, spreads, strict=True)]
    high = [loss + spread for loss, spread in zip(losses, spreads, strict=True)]
    if any(spreads):
        axes.fill_between(epochs, low, high, color=_LOSS, alpha=0.2, linewidth=0, label="one standard deviation")
    axes.plot(epochs, losses, color=_LOSS, label="predicted loss")
    seen = [] if facts["pilot"] is None else facts["pilot"]["losses"]
    if seen:
        places = [tokens / facts["run"]["unique_tokens"] for tokens in facts["pilot"]["tokens"]]
        axes.plot(places, seen, "o", color=_PILOT, markersize=4, label="pilot")
    least, most = min([*low, *seen]), max([*high, *seen])
    axes.set_ylim(least - _MARGIN * (most - least), most + _MARGIN * (most - least))
    axes.set_xlim(0.0, epochs[-1])


def _ends(axes: Any, facts: Mapping[str, Any]) -> None:
    """The budget, the price's tangent at the epochs where it ends the run, and the bottom of a rising pilot."""
    run, width = facts["run"], axes.get_xlim()[1]
    axes.axvline(run["epochs"], color=_BUDGET, linestyle="--", linewidth=1, label=f"budget, {run['epochs']:.3g}")
    if facts["bottom_epochs"] is not None:
        label = f"lowest of the pilot, {facts['bottom_epochs']:.3g}"
        axes.axvline(facts["bottom_epochs"], color=_PILOT, linestyle=":", linewidth=1, label=label)
    at = facts["price_epochs"]
    if not at or at > width:
        return
    slope = -run["price"] * run["unique_tokens"]
    level = facts["price_loss"]
    axes.plot(
        [0.0, width], [level - slope * at, level + slope * (width - at)], color=_PRICE, linewidth=1, label="price"
    )
    axes.plot([at], [level], "D", color=_PRICE, markersize=5, label=f"not worth it beyond {at:.3g}")
