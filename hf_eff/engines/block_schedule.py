"""The schedule of blockwise training: which blocks of layers train at which optimizer step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Mode = Literal["ascending", "descending", "random", "shuffled", "fixed", "sample"]


@dataclass(frozen=True)
class BlockSchedule:
    """The blocks of every optimizer step, as a pure function: nothing but these values to save.

    Attributes:
        num_blocks: D, at least 1.
        switch_every: K, optimizer steps a block trains before the next one, at least 1.
        mode: ``"ascending"`` and ``"descending"`` go round from ``start``; ``"random"`` visits every
            block once a cycle of K x D steps, in an order reshuffled each cycle; ``"shuffled"`` keeps
            the first of these orders; ``"fixed"`` stays; ``"sample"`` draws ``num_active`` blocks
            uniformly and without replacement every K steps, each time from all of them.
        seed: Seed of the random orders and draws.
        start: First block of the modes without randomness; None for the lowest when ascending, else
            the highest.
        num_active: Blocks that train at a time, in [1, num_blocks]; 1 in all modes but ``"sample"``.
    """

    num_blocks: int
    switch_every: int
    mode: Mode = "random"
    seed: int = 0
    start: int | None = None
    num_active: int = 1

    def active_at(self, step: int) -> tuple[int, ...]:
        """Blocks that train in optimizer step ``step`` (0-based), ascending, each in [0, num_blocks).

        >>> [BlockSchedule(3, 2, "descending").active_at(step)[0] for step in range(8)]
        [2, 2, 1, 1, 0, 0, 2, 2]
        >>> BlockSchedule(3, 2, "sample", num_active=3).active_at(7)
        (0, 1, 2)
        """
        visit = step // self.switch_every
        if self.mode == "sample":
            draw = random.Random(f"block sample {self.seed} {visit}")
            return tuple(sorted(draw.sample(range(self.num_blocks), self.num_active)))
        cycle, slot = divmod(visit, self.num_blocks)
        return (self._in_turn(cycle, slot),)

    def _in_turn(self, cycle: int, slot: int) -> int:
        if self.mode in ("random", "shuffled"):
            return self._shuffled(cycle if self.mode == "random" else 0)[slot]
        if self.mode == "ascending":
            return ((self.start or 0) + slot) % self.num_blocks
        start = self.num_blocks - 1 if self.start is None else self.start
        return start if self.mode == "fixed" else (start - slot) % self.num_blocks

    def _shuffled(self, cycle: int) -> list[int]:
        order = list(range(self.num_blocks))
        random.Random(f"block order {self.seed} {cycle}").shuffle(order)
        return order

    @property
    def cycle_steps(self) -> int:
        """Optimizer steps after which every block has trained once, or in ``"sample"`` may have."""
        return self.switch_every * -(-self.num_blocks // self.num_active)

    def visited(self, total_steps: int) -> set[int]:
        """Blocks that train at all in the first ``total_steps`` steps."""
        seen: set[int] = set()
        for step in range(0, total_steps, self.switch_every):
            seen.update(self.active_at(step))
            if self.mode == "fixed" or len(seen) == self.num_blocks:
                break
        return seen

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


def block_list(blocks: Sequence[int], limit: int = 6) -> str:
    """Block numbers for a message, shortened.

    >>> block_list([3, 1]), block_list(range(9), limit=2)
    ('1, 3', '0, 1 and 7 more')
    """
    shown = ", ".join(map(str, sorted(blocks)[:limit]))
    return shown if len(blocks) <= limit else f"{shown} and {len(blocks) - limit} more"
