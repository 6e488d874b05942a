"""How many held-out examples a probe reads.

Many rough probes tell more of a learning curve than a few precise ones, so a probe that would be dear reads fewer
examples, as long as they still stand for the rest.
"""

from __future__ import annotations

FEWEST_EXAMPLES = 16
"""A subset is not cut below this many."""


def affordable_examples(examples: int, example_cost: float, max_cost: float) -> int:
    """Examples to read of ``examples``, when all together should cost ``max_cost`` at most.

    >>> [affordable_examples(128, 2.0, limit) for limit in (1000.0, 100.0, 1.0)]
    [128, 50, 16]
    """
    if examples * example_cost <= max_cost:
        return examples
    return min(examples, max(FEWEST_EXAMPLES, int(max_cost / example_cost)))
