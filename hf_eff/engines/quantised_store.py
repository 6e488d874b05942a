"""How unit vectors lie in a store: as floats, or packed in a few bits a number; and scores straight from packed rows.

A packed row has no scale of its own: decoded, its codes are scaled to length one, which is what cosines
compare, and the row's float32 length beside it restores the vector. A store of N rows of D numbers in b
bits takes N (ceil(D b / 8) + 4) bytes, and N more that say which rows are done.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hf_eff.errors import OptionError
from hf_eff.numerics.quantise import BITS, Quantiser

# N, B rows, D numbers a row, P bytes a row, Q queries

_FLOATS = ("float16", "float32")
_SUFFIX = "-absmax"
STORE_DTYPES = (*_FLOATS, *(f"int{bits}" for bits in BITS), *(f"int{bits}{_SUFFIX}" for bits in BITS))
"""Types of stored features: floats; 8, 4, 2 and 1 bits; the same with the absmax rule at any number of bits."""
_TILE_NUMBERS = 2**23
"""Numbers decoded at a time: 32 MiB in float32."""


class RowCodec(Protocol):
    """Turns unit vectors into what is stored, and back."""

    @property
    def items(self) -> int:
        """Stored items a row."""

    @property
    def item(self) -> str:
        """NumPy type of an item."""

    def encode(self, unit: Tensor) -> np.ndarray:
        """[B, items] of [B, D] float64 unit vectors; a row of zeros stands for no vector."""

    def decode(self, stored: np.ndarray) -> Tensor:
        """[B, D] float32 of [B, items]."""

    def products(self, stored: np.ndarray, queries: Tensor) -> Tensor:
        """[B, Q] float32 inner products of stored unit vectors with [Q, D]."""


@dataclass(frozen=True)
class FloatRows:
    """Vectors of ``width`` numbers, as they are, in the float type ``item``."""

    width: int
    item: str

    @property
    def items(self) -> int:
        """As many as numbers."""
        return self.width

    def encode(self, unit: Tensor) -> np.ndarray:
        """Round to the type."""
        return unit.numpy().astype(self.item)

    def decode(self, stored: np.ndarray) -> Tensor:
        """Widen."""
        return torch.from_numpy(np.asarray(stored, dtype=np.float32))

    def products(self, stored: np.ndarray, queries: Tensor) -> Tensor:
        """Of all rows at once."""
        return self.decode(stored) @ queries.T


@dataclass(frozen=True)
class PackedRows:
    """Vectors of ``width`` numbers in a few bits each, under the rule of ``quantiser``."""

    width: int
    quantiser: Quantiser
    item: str = "uint8"

    @property
    def items(self) -> int:
        """Bytes a row."""
        return self.quantiser.bytes_per_row(self.width)

    def encode(self, unit: Tensor) -> np.ndarray:
        """Quantise and pack."""
        return self.quantiser.pack(self.quantiser.codes(unit))

    def decode(self, stored: np.ndarray) -> Tensor:
        """Codes scaled to length one; a row of zero codes stays zero."""
        return torch.nn.functional.normalize(self.quantiser.unpack(np.asarray(stored), self.width), dim=1)

    def products(self, stored: np.ndarray, queries: Tensor) -> Tensor:
        """From the codes, a tile at a time."""
        return torch.from_numpy(packed_cosines(stored, self.quantiser, queries))


def row_codec(dtype: str, width: int) -> RowCodec:
    """The codec of a name in ``STORE_DTYPES`` for vectors of ``width`` numbers.

    Raises:
        OptionError: The name is not known.

    >>> row_codec("int1", 1024).items, row_codec("float16", 1024).items
    (128, 1024)
    """
    if dtype not in STORE_DTYPES:
        raise OptionError(f"features are stored as one of {list(STORE_DTYPES)}, got {dtype!r}.")
    if dtype in _FLOATS:
        return FloatRows(width, dtype)
    name = dtype.removesuffix(_SUFFIX)
    return PackedRows(width, Quantiser(int(name.removeprefix("int")), "auto" if name == dtype else "absmax"))


def packed_cosines(packed: np.ndarray, quantiser: Quantiser, queries: Tensor) -> np.ndarray:
    """Inner products of queries with packed rows at length one, a tile of rows at a time.

    For one million rows of 1,024 signs and ten queries this holds 128 MB of packed rows, which may be
    memory-mapped, 40 MB of results and about 100 MB of a tile.

    Args:
        packed: [N, P] from ``Quantiser.pack``.
        quantiser: What packed them.
        queries: [Q, D] float32.

    Returns:
        [N, Q] float32: cosines when the queries have length one.
    """
    result = np.empty((len(packed), len(queries)), dtype=np.float32)
    step = max(1, _TILE_NUMBERS // queries.shape[1])
    for start in range(0, len(packed), step):
        codes = quantiser.unpack(packed[start : start + step], queries.shape[1])
        # Scaling the few products is cheaper than scaling every code.
        lengths = torch.linalg.vector_norm(codes, dim=1, keepdim=True).clamp_(min=1.0)
        result[start : start + step] = (codes @ queries.T / lengths).numpy()
    return result
