"""Random projection with a few entries per row: the error of a dense one for a small part of its work.

Like ``RademacherProjector``, a gradient g of p entries becomes d numbers h = g R, but each of the p
rows of R holds only s entries that are not zero, +-1 / sqrt(s), one in each of s equal ranges of the
d columns (sparse Johnson-Lindenstrauss transform; Kane and Nelson, 2014, arXiv:1012.1577). The mean and the
variance of inner products are those of the dense matrix, for s = 1 too: a cosine c comes out with a standard
error of (1 - c^2) / sqrt(d). A larger s helps gradients that live in a few entries only, which
a single entry a row may by bad luck throw together.

R is never stored: place and sign of an entry are a hash of (seed, tensor, entry), the same on every
device and for every batch. The work is s additions an entry and example, whatever d is.
"""

from __future__ import annotations

import hashlib
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

_ROWS = 2**16
"""Rows of R made at a time; each block of rows has a key of its own."""
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
    nonzeros: int = 2

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
        parts = ["sparse-splitmix64-1", list(self.sizes), self.dims, self.seed, self.nonzeros, _ROWS]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def project(self, pieces: Iterable[tuple[int, Tensor]], rows: int) -> Tensor:
        """See ``Projector``."""
        if self.is_identity:
            return RademacherProjector(self.sizes, self.dims).project(pieces, rows)
        total: Tensor | None = None
        for index, values in pieces:
            if values.shape != (rows, self.sizes[index]):
                raise OptionError(
                    f"tensor {index} must be [{rows}, {self.sizes[index]}] to be projected, got {list(values.shape)}."
                )
            # Entries first: a row of the matrix then adds B neighbouring numbers to B others.
            columns = values.to(torch.promote_types(values.dtype, torch.float32)).T.contiguous()
            if total is None:
                total = columns.new_zeros(2 * self.dims, rows)
            for start in range(0, len(columns), _ROWS):
                block = columns[start : start + _ROWS]
                for places in self.places(index, start // _ROWS, len(block), values.device).T:
                    total.index_add_(0, places, block)
        if total is None:
            return torch.zeros(rows, self.width)
        positive, negative = total.split(self.dims)
        return (positive - negative).T.div(math.sqrt(self._used)).contiguous()

    def places(self, index: int, block: int, rows: int, device: torch.device | str = "cpu") -> Tensor:
        """Where the entries of some rows of R are that are not zero.

        Args:
            index: Number of the tensor.
            block: Number of the block of 65,536 of its rows.
            rows: How many of them, from the first on.
            device: Where to make it.

        Returns:
            [rows, s] int64: the column of a positive entry, or the column plus ``dims`` of a negative one.
        """
        used = self._used
        key = torch.tensor([make_key(self.seed, index, block)], dtype=torch.int64, device=device)
        words = random_words(key, rows * (-(-used // 2))).view(torch.int32).view(rows, -1)[:, :used]
        bounds = torch.arange(used + 1, device=device) * self.dims // used
        low, high = bounds[:-1], bounds[1:]
        columns = low + (((words & _LOW_BITS).long() * (high - low)) >> 31)
        return columns + (words < 0) * self.dims

    @property
    def _used(self) -> int:
        return min(self.nonzeros, self.dims)
