"""What a projected gradient costs, from the shape of its matrix alone: sides, numbers kept, FLOPs. No torch."""

from __future__ import annotations

from typing import Literal

Side = Literal["left", "right"]
Projection = Literal["std", "left", "right"]

EXTRA = 8
"""Directions beyond the wanted ones, among which a randomised search finds those."""
ROUNDS = 2
"""Power iterations of a randomised search."""


def projected_side(shape: tuple[int, int], projection: Projection = "std") -> Side:
    """Which side of a matrix is replaced.

    >>> projected_side((2, 3)), projected_side((3, 2)), projected_side((3, 3)), projected_side((3, 2), "left")
    ('left', 'right', 'right', 'left')
    """
    if projection != "std":
        return projection
    return "left" if shape[0] < shape[1] else "right"


def sides(shape: tuple[int, int], side: Side) -> tuple[int, int]:
    """Lengths of the replaced side and of the other one."""
    return (shape[0], shape[1]) if side == "left" else (shape[1], shape[0])


def state_entries(shape: tuple[int, int], rank: int, side: Side, *, stores_basis: bool) -> int:
    """Numbers kept for one matrix: two moments of R, and P where it is stored.

    >>> state_entries((4, 10), 2, "left", stores_basis=True)  # 2 n r + m r
    48
    """
    short, long = sides(shape, side)
    kept = min(rank, *shape)
    return 2 * long * kept + (short * kept if stores_basis else 0)


def refresh_flops(shape: tuple[int, int], rank: int, *, exact: bool) -> float:
    """FLOPs of one ``leading_basis``: its products, or 14 l s^2 + 8 s^3 of a decomposition (s the shorter side)."""
    short, long = sorted(shape)
    if exact:
        return 14.0 * long * short**2 + 8.0 * short**3
    width = min(min(rank, short) + EXTRA, short)
    return (2.0 + 2.0 * ROUNDS) * 2.0 * long * short * width
