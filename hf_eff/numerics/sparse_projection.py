"""Random projection with a few entries per row: the error of a dense one for a small part of its work.

Like ``RademacherProjector``, a gradient g of p entries becomes d numbers, h = g R, but each of the p rows of R holds
only s entries that are not zero, +-1 / sqrt(s), one in each of s equal ranges of the d columns (sparse
Johnson-Lindenstrauss transform; Kane and Nelson, 2014, arXiv:1012.1577). Signs are drawn entry by entry. Places are
drawn for runs of entries as long as a range is wide: a run goes to its range in order, turned by a random number of
places. Two entries of one run never meet and two of different runs meet as often as if each had drawn its own place,
so that mean and variance of inner products are those of the dense matrix (a little below, in fact), for s = 1 too: a
cosine c comes out with a standard error of (1 - c^2) / sqrt(d). A larger s helps gradients that live in a few entries
only, which a single entry a row may by bad luck throw together.

R is never stored: turns and signs are a hash of (seed, tensor, range, place), the same on every device and for every
batch. The work is s additions an entry and example, whatever d is, of numbers that lie side by side.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_eff.errors import OptionError
from hf_eff.numerics.keyed_random import make_key, random_words
from hf_eff.numerics.projection import Projector, RademacherProjector

# B examples, p entries of one tensor, D projected dims, s entries a row

_BLOCK = 2**15
"""Entries whose signs are made at a time; each block of them has a key of its own."""
_TURN, _SIGN = 0, 1  # what a key is for
_SIGN_BIT = -(2**31)
_ONE_BITS = 0x3F800000
_LOW_BITS = 0x7FFFFFFF


@dataclass(frozen=True)
class SparseProjector(Projector):
    """Projects gradients given as a stream of tensors; keeps ``dims`` numbers an example.

    Attributes:
        sizes: Entries p of each tensor, in the fixed order in which tensors are numbered.
        dims: Width D of the projection, at least 1.
        seed: Names the matrix; any integer.
        nonzeros: Entries s of a row that are not zero, at least 1; at most ``dims`` are used.

    Raises:
        OptionError: ``dims``, ``nonzeros`` or a size is below one.
    """

    sizes: tuple[int, ...]
    dims: int
    seed: int = 0
    nonzeros: int = 1

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.nonzeros < 1 or self.dims < 1 or not self.sizes or min(self.sizes) < 1:
            raise OptionError(
                "a projection needs dims >= 1, nonzeros >= 1 and tensors of >= 1 entries, "
                f"got dims={self.dims!r}, nonzeros={self.nonzeros!r}."
            )

    @property
    def num_entries(self) -> int:
        """Entries of all tensors together."""
        return sum(self.sizes)

    @property
    def flops(self) -> float:
        """FLOPs of projecting one example."""
        return 0.0 if self.is_identity else 2.0 * sum(self.sizes) * self._used

    def fingerprint(self) -> str:
        """Digest of everything the matrix depends on."""
        parts = ["sparse-splitmix64-2", list(self.sizes), self.dims, self.seed, self.nonzeros, _BLOCK]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def project(self, pieces: Iterable[tuple[int, Tensor]], rows: int) -> Tensor:
        """See ``Projector``."""
        if self.is_identity:
            return RademacherProjector(self.sizes, self.dims).project(pieces, rows)
        totals: list[Tensor] = []
        for index, values in pieces:
            if values.shape != (rows, self.sizes[index]):
                raise OptionError(
                    f"tensor {index} must be [{rows}, {self.sizes[index]}] to be projected, got {list(values.shape)}."
                )
            values = values.to(torch.promote_types(values.dtype, torch.float32))
            # Twice as wide as its range, so that a turned run need not be cut in two.
            totals = totals or [values.new_zeros(rows, 2 * (high - low)) for low, high in self.ranges]
            for number, total in enumerate(totals):
                self._add(total, index, number, values)
        if not totals:
            return torch.zeros(rows, self.width)
        folded = [total[:, : total.shape[1] // 2] + total[:, total.shape[1] // 2 :] for total in totals]
        return torch.cat(folded, dim=1).div_(math.sqrt(self._used))

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """First column, and the one after the last, of each of the s ranges."""
        bounds = [self.dims * number // self._used for number in range(self._used + 1)]
        return list(itertools.pairwise(bounds))

    def turns(self, index: int, number: int) -> list[int]:
        """Places by which each run of a tensor's entries is turned within a range, from 0 to its width less one.

        Args:
            index: Number of the tensor.
            number: Number of the range.
        """
        low, high = self.ranges[number]
        runs = -(-self.sizes[index] // (high - low))
        words = self._words((index, number, _TURN), runs, "cpu")
        turned: list[int] = (((words >> 32).bitwise_and_(_LOW_BITS) * (high - low)) >> 31).tolist()
        return turned

    def signs(self, index: int, number: int, block: int, device: torch.device | str = "cpu") -> Tensor:
        """Signs of the entries ``block * 32,768`` and following of a tensor in a range.

        Args:
            index: Number of the tensor.
            number: Number of the range.
            block: Number of the block of entries.
            device: Where to make them.

        Returns:
            [n] float32 of +1 and -1, up to the end of the block or of the tensor.
        """
        count = min(_BLOCK, self.sizes[index] - block * _BLOCK)
        words = self._words((index, number, _SIGN, block), -(-count // 64), device).view(torch.int32)
        shifts = torch.arange(32, dtype=torch.int32, device=device)[:, None]
        # Row k moves bit 31 - k of every word to the place of the sign; the rest is overwritten with 1.0.
        bits = torch.bitwise_left_shift(words, shifts).bitwise_and_(_SIGN_BIT).bitwise_or_(_ONE_BITS)
        return bits.view(torch.float32).view(-1)[:count]

    def _words(self, parts: tuple[int, ...], count: int, device: torch.device | str) -> Tensor:
        key = torch.tensor([make_key(self.seed, *parts)], dtype=torch.int64, device=device)
        return random_words(key, count)[0]

    def _add(self, total: Tensor, index: int, number: int, values: Tensor) -> None:
        """Add what ``values`` [B, p] come to in a range to ``total`` [B, 2 width]."""
        width, turns = total.shape[1] // 2, self.turns(index, number)
        for start in range(0, values.shape[1], _BLOCK):
            signed = values[:, start : start + _BLOCK]
            signed = signed * self.signs(index, number, start // _BLOCK, values.device)
            stop = start + signed.shape[1]
            for run in range(start // width, -(-stop // width)):
                first, last = max(start, run * width), min(stop, (run + 1) * width)
                place = turns[run] + first - run * width
                total[:, place : place + last - first].add_(signed[:, first - start : last - start])

    @property
    def _used(self) -> int:
        return min(self.nonzeros, self.dims)
