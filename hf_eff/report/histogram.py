"""A histogram as SVG, drawn without a plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_WIDTH, _HEIGHT, _MARGIN = 640, 280, 40
_ALL, _CHOSEN = "#c9ced6", "#2f6fde"


def histogram_svg(edges: Sequence[float], every: Sequence[int], chosen: Sequence[int], title: str) -> str:
    """Bars of all rows with the chosen ones in front.

    Args:
        edges: [B + 1] borders of the bins, ascending.
        every: [B] rows of each bin.
        chosen: [B] chosen rows among them.
        title: Text above.

    Returns:
        An SVG document.
    """
    top = max(1, *every)
    step = (_WIDTH - 2 * _MARGIN) / len(every)
    floor, height = _HEIGHT - _MARGIN, _HEIGHT - 2 * _MARGIN
    bars = [
        f'<rect x="{_MARGIN + place * step:.1f}" y="{floor - height * count / top:.1f}" width="{0.9 * step:.1f}" '
        f'height="{height * count / top:.1f}" fill="{colour}"/>'
        for counts, colour in ((every, _ALL), (chosen, _CHOSEN))
        for place, count in enumerate(counts)
    ]
    label = '<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{text}</text>'
    texts = [
        label.format(x=_MARGIN, y=_MARGIN / 2, anchor="start", text=escape(title)),
        label.format(x=_MARGIN, y=floor + 16, anchor="start", text=f"{edges[0]:.4g}"),
        label.format(x=_WIDTH - _MARGIN, y=floor + 16, anchor="end", text=f"{edges[-1]:.4g}"),
        label.format(x=_MARGIN - 4, y=_MARGIN + 10, anchor="end", text=f"{top:,}"),
        label.format(x=_WIDTH - _MARGIN, y=_MARGIN / 2, anchor="end", text="grey: all rows, blue: chosen"),
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
            'font-size="12">',
            f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
            *bars,
            f'<line x1="{_MARGIN}" y1="{floor}" x2="{_WIDTH - _MARGIN}" y2="{floor}" stroke="black"/>',
            *texts,
            "</svg>\n",
        ]
    )
