"""How a batch is shared between short and long rows, and up to which length a row is short."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from hf_eff.contracts.cost import Facts
from hf_eff.errors import PlanError
from hf_eff.numerics.activation_bytes import activation_bytes
from hf_eff.numerics.flops import everything_trains
from hf_eff.numerics.largest_fit import largest
from hf_eff.units import format_bytes

SHORT_SHARE = 0.4
"""Short rows of a batch where nothing else is said: 4 of 10."""


@dataclass(frozen=True)
class LengthShare:
    """Rows of a batch that are short, at most so many tokens each, and rows that are longer.

    Attributes:
        short_rows, long_rows: Rows of a batch; 0 where there are none.
        short_length: Tokens of the longest short row.
        long_length: Tokens of the longest row.
    """

    short_rows: int
    long_rows: int
    short_length: int
    long_length: int


def share_rows(rows: int, short: int | None, long: int | None) -> tuple[int, int]:
    """Short and long rows of a batch, at least one of each.

    Args:
        rows: Rows of a batch.
        short: As many short ones; None for what ``long`` leaves, or 4 of 10.
        long: As many long ones; None for the rest.

    Raises:
        PlanError: They do not make up the batch.

    >>> share_rows(10, None, None), share_rows(8, 2, None), share_rows(2, None, None)
    ((4, 6), (2, 6), (1, 1))
    """
    if rows < 2:
        raise PlanError(
            f"per_device_train_batch_size={rows} has no room for a short and a long row; set it to 2 or more, "
            "or use a method of one order."
        )
    if short is None:
        short = min(max(1, round(SHORT_SHARE * rows)), rows - 1) if long is None else rows - long
    long = rows - short if long is None else long
    if short < 1 or long < 1 or short + long != rows:
        raise PlanError(
            f"short_rows={short} and long_rows={long} do not make up per_device_train_batch_size={rows}; set one of "
            "them, below it, and leave the other out."
        )
    return short, long


def share_lengths(
    facts: Facts, take: tuple[int, int], *, limit: int | None = None, budget: float | None = None, assign: bool = True
) -> LengthShare:
    """Rows of a batch with their lengths.

    Args:
        facts: Model, pool and run.
        take: Short and long rows of a batch.
        limit: Tokens up to which a row is short; None to work it out.
        budget: See ``first_order_length``.
        assign: Whether rows go by length; otherwise both kinds may be as long as any.

    Returns:
        The share. Where no row is longer than the limit, all rows of a batch are short.

    Raises:
        PlanError: See ``first_order_length``.
    """
    short, long = take
    longest = longest_row(facts)
    if not assign:
        return LengthShare(short, long, longest, longest)
    limit = first_order_length(facts, short, budget) if limit is None else limit
    return LengthShare(short, long, limit, longest) if limit < longest else LengthShare(sum(take), 0, limit, longest)


def first_order_length(facts: Facts, short_rows: int, budget: float | None = None) -> int:
    """Tokens up to which a row is short.

    Args:
        facts: Model, pool and run.
        short_rows: Short rows of a batch.
        budget: Bytes that may be kept for their backward; None for the pool's mean length instead.

    Raises:
        PlanError: The budget holds no row of one token, or the longest rows of the pool.
    """
    longest = longest_row(facts)
    if budget is None:
        return max(1, int(min(facts.pool.mean_tokens or longest, longest)))
    part = facts.model.trainable or everything_trains(facts.model)
    found = largest(lambda length: activation_bytes(of_size(facts, short_rows, length), part), budget, longest)
    if found == 0:
        raise PlanError(
            f"activation_budget={format_bytes(budget)} does not hold short_rows={short_rows} rows of one token; raise "
            "it or lower short_rows."
        )
    if found >= longest:
        raise PlanError(
            f"activation_budget={format_bytes(budget)} holds short_rows={short_rows} rows of {longest} tokens, the "
            "longest there are, so that no row needs zeroth order; set assign=False to draw both parts from all "
            "rows, or use memory='fused'."
        )
    return found


def longest_row(facts: Facts) -> int:
    """Tokens of the longest row that is known of, at least one."""
    return max(1, facts.run.length or facts.pool.max_tokens)


def of_size(facts: Facts, rows: int, length: int) -> Facts:
    """The same run with batches of so many rows of so many tokens."""
    return facts.replace(run=dataclasses.replace(facts.run, batch_size=rows, length=length))
