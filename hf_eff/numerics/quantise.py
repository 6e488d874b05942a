"""Vectors in a few bits a number: integer codes under one rule, packed into bytes.

    absmax    q = round(a g), a = L / max|g|, L = 2^(b-1) - 1, as in arXiv:2502.01703
    ternary   q = sign(g) where |g| > 0.7 mean|g|, else 0: two bits (Li and Liu, 2016, arXiv:1605.04711)
    sign      q = +1 or -1: one bit

At two bits absmax knows -1, 0 and 1 with a threshold at half of the largest entry: of a projected gradient,
whose entries are nearly Gaussian, almost nothing is left. The default rule is therefore ternary at two
bits, sign at one and absmax from four on. Two sign vectors of gradients at cosine c have a cosine of
(2 / pi) arcsin(c) in the mean, a monotone function of c.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_eff.errors import OptionError

# B rows, D numbers a row, P bytes a row

BITS = (8, 4, 2, 1)
RULES = ("auto", "absmax")
_THRESHOLD = 0.7
"""Share of the mean magnitude below which a ternary code is zero: nearly optimal for a Gaussian."""


@dataclass(frozen=True)
class Quantiser:
    """A rule for codes of some bits.

    Attributes:
        bits: 8, 4, 2 or 1.
        rule: ``"auto"`` for the rule that suits the bits, or ``"absmax"``, which with one bit is the sign.

    Raises:
        OptionError: Bits or rule are not known.
    """

    bits: int
    rule: str = "auto"

    def __post_init__(self) -> None:
        """Check bits and rule."""
        if self.bits not in BITS or self.rule not in RULES:
            raise OptionError(
                f"a quantiser has bits in {list(BITS)} and a rule in {list(RULES)}, "
                f"got {self.bits!r} and {self.rule!r}."
            )

    @property
    def largest(self) -> int:
        """L, the largest code."""
        return max(1, 2 ** (self.bits - 1) - 1)

    def bytes_per_row(self, width: int) -> int:
        """P of a row of ``width`` numbers.

        >>> [Quantiser(bits).bytes_per_row(17) for bits in (8, 4, 2, 1)]
        [17, 9, 5, 3]
        """
        return -(-width * self.bits // 8)

    def scales(self, values: Tensor) -> Tensor:
        """[B, 1] factor a of each row of [B, D] by which its numbers become codes; 0 for a row of zeros."""
        if self.bits <= 2 and self.rule == "auto":
            size = values.abs().mean(dim=1, keepdim=True)
        else:
            size = values.abs().amax(dim=1, keepdim=True)
        return torch.where(size > 0, self.largest / size, 0.0)

    def codes(self, values: Tensor) -> Tensor:
        """[B, D] int8 codes in [-L, L] of finite numbers; with one bit a zero becomes +1."""
        if self.bits == 1:
            return torch.where(values < 0, -1, 1).to(torch.int8)
        scaled = values * self.scales(values)
        if self.bits == 2 and self.rule == "auto":
            return (scaled.sign() * (scaled.abs() > _THRESHOLD)).to(torch.int8)
        return scaled.round().clamp(-self.largest, self.largest).to(torch.int8)

    def pack(self, codes: Tensor) -> np.ndarray:
        """[B, P] bytes of [B, D] codes; the last byte of a row is filled up with zero bits."""
        lanes = 8 // self.bits
        unsigned = (codes.cpu().numpy().astype(np.int16) + self._offset) >> (self.bits == 1)
        padded = np.zeros((len(codes), self.bytes_per_row(codes.shape[1]) * lanes), dtype=np.uint8)
        padded[:, : codes.shape[1]] = unsigned
        shifts = np.arange(lanes, dtype=np.uint8) * np.uint8(self.bits)
        shifted = np.left_shift(padded.reshape(len(codes), -1, lanes), shifts)
        return np.bitwise_or.reduce(shifted, axis=2)

    def unpack(self, packed: np.ndarray, width: int) -> Tensor:
        """[B, width] codes, float32, of [B, P] bytes: one look into a table a byte."""
        codes = self._table().take(packed, axis=0).reshape(len(packed), -1)[:, :width]
        return torch.from_numpy(codes)

    @property
    def _offset(self) -> int:
        return {1: 1, 2: 1, 4: 7, 8: 128}[self.bits]

    def _table(self) -> np.ndarray:
        """[256, codes a byte] codes of every byte, float32."""
        lanes = 8 // self.bits
        values = np.arange(256)[:, None] >> (np.arange(lanes) * self.bits) & (2**self.bits - 1)
        codes = 2 * values - 1 if self.bits == 1 else values - self._offset
        return codes.astype(np.float32)
