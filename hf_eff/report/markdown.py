"""Markdown tables: the one shape that cards, reports and plans print."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A pipe table, without a newline at its end.

    Args:
        header: Column titles.
        rows: One sequence of cells a row, as long as the header.

    >>> print(table(["method", "bytes"], [["full", 12], ["lora", 3]]))
    | method | bytes |
    |---|---|
    | full | 12 |
    | lora | 3 |
    """
    lines = [_line(header), "|" + "---|" * len(header)]
    return "\n".join([*lines, *(_line(row) for row in rows)])


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
