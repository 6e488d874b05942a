"""The schedule of blockwise training: which block of layers trains at which optimizer step."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Any, Literal

Mode = Literal["ascending", "descending", "random", "fixed"]


@dataclass(frozen=True)
class BlockSchedule:
    """The block of every optimizer step, as a pure function: nothing but these values to save.

    Attributes:
        num_blocks: D, at least 1.
        switch_every: K, optimizer steps a block trains before the next one, at least 1.
        mode: ``"ascending"`` and ``"descending"`` go round from ``start``; ``"random"`` visits every
            block once a cycle of K x D steps, in an order reshuffled each cycle; ``"fixed"`` stays.
        seed: Seed of the random orders.
        start: First block of the other three modes; None for the lowest when ascending, else the
            highest.
    """

    num_blocks: int
    switch_every: int
    mode: Mode = "random"
    seed: int = 0
    start: int | None = None

    def block_at(self, step: int) -> int:
        """Block that trains in optimizer step ``step`` (0-based), in [0, num_blocks).

        >>> [BlockSchedule(3, 2, "descending").block_at(step) for step in range(8)]
        [2, 2, 1, 1, 0, 0, 2, 2]
        """
        cycle, slot = divmod(step // self.switch_every, self.num_blocks)
        if self.mode == "random":
            return self._shuffled(cycle)[slot]
        if self.mode == "ascending":
            return ((self.start or 0) + slot) % self.num_blocks
        start = self.num_blocks - 1 if self.start is None else self.start
        return start if self.mode == "fixed" else (start - slot) % self.num_blocks

    def _shuffled(self, cycle: int) -> list[int]:
        order = list(range(self.num_blocks))
        random.Random(f"block order {self.seed} {cycle}").shuffle(order)
        return order

    def to_dict(self) -> dict[str, Any]:
        """JSON-able copy of the attributes."""
        return asdict(self)


def recommended_interval(cycle_steps: int, num_blocks: int) -> int:
    """K by the recommendation of BAdam's authors: clip(round(n / (B D)), 50, 100).

    Args:
        cycle_steps: n / B, optimizer steps of one pass over the data; 0 when unknown.
        num_blocks: D, at least 1.

    >>> recommended_interval(2400, 30), recommended_interval(100, 30), recommended_interval(10**6, 30)
    (80, 50, 100)
    """
    return min(100, max(50, round(cycle_steps / num_blocks)))
