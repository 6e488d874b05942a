"""Rows of two sets dealt out side by side, so that every batch holds some of each."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.utils.data import Sampler

from hf_eff.errors import EffWarning, PlanError
from hf_eff.numerics.keyed_random import make_key

_ROWS_AT_ONCE = 1000
_FIRST, _SECOND = 0, 1


class TwoStreams(Sampler[int]):
    """An order of rows whose every batch holds rows of two sets: those of the first set, then those of the second.

    An epoch passes once over the first set; the second goes round and round, through all epochs. Both are shuffled
    anew at each pass. The order is a pure function of the seed and the epoch, so that skipping batches resumes it.

    Args:
        lengths: Tokens of each row.
        first: Indices of rows. Where this or the other set is empty, batches hold rows of the other alone, as many
            as of both otherwise, and an epoch passes over that set.
        second: Indices of rows.
        take: Rows of each set in a batch.
        seed: Names the order.
        processes: Processes that batches are dealt out to in turn. For several the epoch is filled up from its start,
            so that all get equally many whole batches; with one the last batch has the rows that are left.
        drop_last: Leave out a last batch with fewer rows of the first set.

    Attributes:
        steps: Batches of an epoch.
        epoch: The epoch that iterating goes through.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        first: Sequence[int],
        second: Sequence[int],
        take: tuple[int, int],
        *,
        seed: int,
        processes: int = 1,
        drop_last: bool = False,
    ) -> None:
        self._lengths = lengths
        self._rows = (list(first), list(second))
        if not (first or second):
            raise PlanError("there are no rows to deal out; give at least one example.")
        alone = not (first and second)
        self._leader = _FIRST if first else _SECOND
        self._take = sum(take) if alone else take[_FIRST]
        self._beside = 0 if alone else take[_SECOND]
        self._seed = seed
        self.epoch = 0
        rounded = self._take * processes
        self._led = len(self._rows[self._leader])
        if processes > 1:
            self._led = -(-self._led // rounded) * rounded
        self.steps = self._led // self._take if drop_last else math.ceil(self._led / self._take)
        self._order = lru_cache(maxsize=4)(self._shuffled)

    def set_epoch(self, epoch: int) -> None:
        """Go through another epoch; called by the data loader before each."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Rows of an epoch, those of both sets together."""
        return min(self._led, self.steps * self._take) + self.steps * self._beside

    def __iter__(self) -> Iterator[int]:
        """Go through the epoch.

        Yields:
            Rows, batch by batch.
        """
        for step in range(self.steps):
            first, second = self.batch(self.epoch, step)
            yield from first
            yield from second

    def batch(self, epoch: int, step: int) -> tuple[list[int], list[int]]:
        """Rows of one batch.

        Args:
            epoch: From 0.
            step: Batch of the epoch, from 0.

        Returns:
            Indices from the first set and from the second.
        """
        end = min((step + 1) * self._take, self._led)
        order = self._order(self._leader, epoch)
        led = [order[place % len(order)] for place in range(step * self._take, end)]
        if not self._beside:
            return (led, []) if self._leader == _FIRST else ([], led)
        start, size = (epoch * self.steps + step) * self._beside, len(self._rows[_SECOND])
        beside = [self._order(_SECOND, at // size)[at % size] for at in range(start, start + self._beside)]
        return led, beside

    def first_rows(self, rows: int) -> int:
        """How many of a batch's rows are of the first set; they come first."""
        if self._leader == _SECOND:
            return 0
        return rows - self._beside

    def longest(self, global_step: int) -> tuple[int, int]:
        """Tokens of the longest row of each set in the batch of an optimizer step; 0 where it has none."""
        if not self.steps:
            return 0, 0
        first, second = self.batch(*divmod(global_step, self.steps))
        return max((self._lengths[row] for row in first), default=0), max(
            (self._lengths[row] for row in second), default=0
        )

    def _shuffled(self, stream: int, number: int) -> list[int]:
        """One stream's rows in the order of its pass ``number``."""
        rows = self._rows[stream]
        generator = torch.Generator().manual_seed(make_key(self._seed, stream, number))
        return [rows[place] for place in torch.randperm(len(rows), generator=generator).tolist()]


def deal_by_length(
    lengths: Sequence[int],
    limit: int | None,
    take: tuple[int, int],
    *,
    seed: int,
    processes: int = 1,
    drop_last: bool = False,
) -> TwoStreams:
    """Rows of at most ``limit`` tokens beside longer ones.

    Args:
        lengths: Tokens of each row.
        limit: Tokens up to which a row is of the first set; None for all rows in both sets.
        take: See ``TwoStreams``, as for the rest.
        seed: Names the order.
        processes: Processes that batches are dealt out to.
        drop_last: Leave out a last batch with fewer rows.
    """
    rows = range(len(lengths))
    short = [row for row in rows if limit is None or lengths[row] <= limit]
    long = [row for row in rows if limit is None or lengths[row] > limit]
    if not (short and long):
        what, order = ("no row is", "first-order") if short else ("every row is", "zeroth-order")
        message = (
            f"{what} longer than {limit} tokens, so that all {sum(take)} rows of a batch are {order}; set "
            "max_first_order_length between the lengths there are, or assign=False to draw both parts from all rows."
        )
        warnings.warn(EffWarning(message), stacklevel=2)
    return TwoStreams(lengths, short, long, take, seed=seed, processes=processes, drop_last=drop_last)


def row_lengths(dataset: Any) -> list[int]:
    """Tokens of every row.

    Args:
        dataset: A ``datasets`` dataset or an indexable collection of mappings, with ``input_ids`` or ``length``.

    Raises:
        PlanError: Rows have neither, or only a stream of rows was given.
    """
    if not hasattr(dataset, "__len__"):
        raise PlanError("a dataset without a length cannot be split by the length of its rows; give a map-style one.")
    columns = getattr(dataset, "column_names", None) or ()
    transformed = getattr(dataset, "format", {}).get("type") == "custom" if columns else True
    if not transformed and "input_ids" in columns:
        pieces = dataset.select_columns(["input_ids"]).iter(batch_size=_ROWS_AT_ONCE)
        return [len(ids) for piece in pieces for ids in piece["input_ids"]]
    return [_length(dataset[index]) for index in range(len(dataset))]


def _length(row: Any) -> int:
    if isinstance(row, Mapping):
        if "input_ids" in row:
            return len(row["input_ids"])
        if isinstance(row.get("length"), int):
            return int(row["length"])
    found = sorted(row) if isinstance(row, Mapping) else type(row).__name__
    raise PlanError(
        f"rows are to be split by their length, and a row with {found} does not tell it; tokenise the dataset "
        "(column 'input_ids') or add a column 'length'."
    )
