"""Random projection of per-example gradients that are never held in one piece.

A gradient g of p entries becomes d numbers, h = g R / sqrt(d), where R is [p, d] with independent
entries +1 and -1. Inner products survive in expectation, and the cosine c of two gradients is found
with a standard error of (1 - c^2) / sqrt(d) (Johnson and Lindenstrauss, 1984; Achlioptas, 2003).

R is never stored: the signs of a block are a hash of (seed, tensor, row block, column block) and the
place inside the block. The matrix is therefore the same on every device and for every batch, and no
random state is read or advanced. On a CPU, making the signs takes as long as multiplying about 20
examples with them, so project many examples at once.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_eff.errors import OptionError
from hf_eff.numerics.keyed_random import make_key, random_words

# B examples, p entries of one tensor, D projected dims

ROW_BLOCK = 65_536
COLUMN_BLOCK = 512
_CPU_ENTRIES = 2**18
"""Entries of R made at a time on a CPU: 1 MiB in float32, so that they are multiplied from cache."""
_ACCELERATOR_ENTRIES = 2**25
_WORD = 64
_SIGN_BIT = -(2**31)
_ONE_BITS = 0x3F800000
"""Bit pattern of 1.0 in float32."""


class Projector(ABC):
    """Makes a short vector of an example's gradient, which comes as a stream of tensors.

    With ``dims`` at or above the number of entries nothing is projected: the gradient itself, in
    the order of the tensors, is shorter and exact.

    Attributes:
        dims: Width D of the projection, at least 1.
    """

    dims: int

    @property
    @abstractmethod
    def num_entries(self) -> int:
        """Entries of all tensors together."""

    @property
    @abstractmethod
    def flops(self) -> float:
        """FLOPs of projecting one example."""

    @property
    def is_identity(self) -> bool:
        """Whether the gradient is kept as it is."""
        return self.dims >= self.num_entries

    @property
    def width(self) -> int:
        """Numbers kept an example: ``dims``, or all entries if there are no more than that."""
        return min(self.dims, self.num_entries)

    @abstractmethod
    def fingerprint(self) -> str:
        """Digest of everything the projection depends on."""

    @abstractmethod
    def project(self, pieces: Iterable[tuple[int, Tensor]], rows: int) -> Tensor:
        """Project the gradients of a batch.

        Args:
            pieces: Pairs of a tensor's number and its gradients [B, p]; each number at most once,
                a number left out counts as zero. A piece may be freed once the next is asked for.
            rows: Number of examples B.

        Returns:
            [B, width], float32, or float64 when the pieces are.

        Raises:
            OptionError: A piece does not have the size it was announced with.
        """


@dataclass(frozen=True)
class RademacherProjector(Projector):
    """Multiplies by a dense matrix of signs that is never kept.

    Attributes:
        sizes: Entries p of each tensor, in the fixed order in which tensors are numbered.
        dims: Width D of the projection, at least 1.
        seed: Names the matrix; any integer.
    """

    sizes: tuple[int, ...]
    dims: int
    seed: int = 0
    _offsets: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Lay the tensors out one after the other.

        Raises:
            OptionError: ``dims`` or a size is below one.
        """
        if self.dims < 1 or not self.sizes or min(self.sizes) < 1:
            raise OptionError(f"a projection needs dims >= 1 and tensors of >= 1 entries, got dims={self.dims!r}.")
        offsets = [0]
        for size in self.sizes:
            offsets.append(offsets[-1] + size)
        object.__setattr__(self, "_offsets", tuple(offsets))

    @property
    def num_entries(self) -> int:
        """Entries of all tensors together."""
        return sum(self.sizes)

    @property
    def flops(self) -> float:
        """FLOPs of projecting one example."""
        return 0.0 if self.is_identity else 2.0 * sum(self.sizes) * self.dims

    def fingerprint(self) -> str:
        """Digest of everything the matrix depends on."""
        parts = ["rademacher-splitmix64-1", list(self.sizes), self.dims, self.seed, ROW_BLOCK, COLUMN_BLOCK]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def project(self, pieces: Iterable[tuple[int, Tensor]], rows: int) -> Tensor:
        """See ``Projector``."""
        total: Tensor | None = None
        for index, values in pieces:
            if values.shape != (rows, self.sizes[index]):
                raise OptionError(
                    f"tensor {index} must be [{rows}, {self.sizes[index]}] to be projected, got {list(values.shape)}."
                )
            values = values.to(torch.promote_types(values.dtype, torch.float32))
            if total is None:
                total = values.new_zeros(rows, self.width)
            if self.is_identity:
                total[:, self._offsets[index] : self._offsets[index + 1]] = values
            else:
                self._add(total, index, values)
        if total is None:
            return torch.zeros(rows, self.width)
        return total if self.is_identity else total.div_(math.sqrt(self.dims))

    def block(self, index: int, rows: slice, columns: slice, device: torch.device | str = "cpu") -> Tensor:
        """One block of R.

        Args:
            index: Number of the tensor.
            rows: Range of its entries that is one row block.
            columns: Range of dims that is one column block.
            device: Where to make it.

        Returns:
            [rows, columns] of +1 and -1 in float32.
        """
        words = self._words(index, rows, columns, device)
        buffer = torch.empty(words.numel() * 2, 32, dtype=torch.int32, device=device)
        return _signs(words, buffer)[:, : columns.stop - columns.start]

    def _words(self, index: int, rows: slice, columns: slice, device: torch.device | str) -> Tensor:
        """[rows, ceil(columns / 64)] words whose bits are the signs of one block."""
        key = make_key(self.seed, index, rows.start // ROW_BLOCK, columns.start // COLUMN_BLOCK)
        count = -(-(columns.stop - columns.start) // _WORD)
        stream = torch.tensor([key], dtype=torch.int64, device=device)
        return random_words(stream, (rows.stop - rows.start) * count).view(-1, count)

    def _add(self, total: Tensor, index: int, values: Tensor) -> None:
        """Add the product of ``values`` with its rows of R to ``total``."""
        entries = _CPU_ENTRIES if values.device.type == "cpu" else _ACCELERATOR_ENTRIES
        step = entries // COLUMN_BLOCK
        places = (min(step, self.sizes[index]) * COLUMN_BLOCK // 32, 32)
        buffer = torch.empty(places, dtype=torch.int32, device=values.device)
        for rows in _ranges(0, self.sizes[index], ROW_BLOCK):
            for columns in _ranges(0, self.dims, COLUMN_BLOCK):
                words = self._words(index, rows, columns, values.device)
                for tile in _ranges(rows.start, rows.stop, step):
                    signs = _signs(words[tile.start - rows.start : tile.stop - rows.start], buffer)
                    signs = signs[:, : columns.stop - columns.start].to(values.dtype)
                    total[:, columns].addmm_(values[:, tile], signs)


def _ranges(first: int, stop: int, step: int) -> Iterator[slice]:
    for start in range(first, stop, step):
        yield slice(start, min(start + step, stop))


def _signs(words: Tensor, buffer: Tensor) -> Tensor:
    """[n, w] int64 to [n, 64 w] of +1 and -1 in ``buffer``: each bit in turn becomes the sign of a float's 1.0."""
    halves = words.reshape(-1).view(torch.int32)
    shifts = torch.arange(32, dtype=torch.int32, device=words.device)
    bits = torch.bitwise_left_shift(halves[:, None], shifts, out=buffer[: len(halves)])
    return bits.bitwise_and_(_SIGN_BIT).bitwise_or_(_ONE_BITS).view(torch.float32).view(len(words), -1)
