"""Weights plus a direction that a key names, in one pass over memory: the compiled form of ``directions``.

``keyed_sums.c`` gives the numbers that torch gives, bit for bit, in a third of the time. Where it cannot be compiled,
and for tensors that it does not know, there is torch.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hf_eff.hardware.compiled import load_c

SOURCE = Path(__file__).with_name("keyed_sums.c")
_TYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_POINTER, _COUNT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNS = (_POINTER, _POINTER, _COUNT, _COUNT, ctypes.c_uint64, _COUNT, _FLOAT)
_QUANTILES = (_POINTER, _POINTER, _POINTER, _COUNT, _COUNT, _POINTER, _POINTER, _FLOAT, _FLOAT)


class KeyedSums:
    """The compiled sums.

    Args:
        library: ``keyed_sums.c``, loaded.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._signs, self._quantiles = {}, {}
        for dtype, suffix in _TYPES.items():
            self._signs[dtype] = getattr(library, f"add_signs_{suffix}")
            self._quantiles[dtype] = getattr(library, f"add_quantiles_{suffix}")
            self._signs[dtype].argtypes, self._signs[dtype].restype = _SIGNS, None
            self._quantiles[dtype].argtypes, self._quantiles[dtype].restype = _QUANTILES, None

    def takes(self, *tensors: Tensor) -> bool:
        """Whether all are plain tensors of one 32-bit or bf16 type in the processor's memory."""
        return (
            all(
                type(each) is Tensor
                and each.device.type == "cpu"
                and each.is_contiguous()
                and each.dtype == tensors[0].dtype
                for each in tensors
            )
            and tensors[0].dtype in _TYPES
        )

    def add_signs_(self, out: Tensor, base: Tensor, key: int, low: int, num_words: int, scale: float) -> None:
        """``out = base + scale * z``; entry k * num_words + j of z has bit 31 - k of 32-bit word j as its sign.

        Args:
            out: [n]; may be ``base``.
            base: [n].
            key: Names the stream of words.
            low: Entries of z before the first one held.
            num_words: Even number of words that the signs come from.
            scale: Multiple of z.
        """
        self._signs[out.dtype](out.data_ptr(), base.data_ptr(), low, out.numel(), key % 2**64, num_words, scale)
        torch.autograd.graph.increment_version(out)

    def add_quantiles_(
        self, out: Tensor, base: Tensor, weights: Tensor, key: int, low: int, scale: float, table: Tensor, limit: float
    ) -> None:
        """``out = base + scale * z``; entry i of z is named in the table by the i-th 16 bits of an SFC64 stream.

        Args:
            out: [n]; may be ``base``.
            base: [n].
            weights: [n]; where their size is above the limit, z is 0.
            key: Names the stream.
            low: Entries of z before the first one held.
            scale: Multiple of z.
            table: [65536] fp32.
            limit: See ``weights``.
        """
        state = np.random.SFC64(key % 2**64).state["state"]["state"].astype(np.uint64)  # moves on from call to call
        limit = float(torch.tensor(limit, dtype=out.dtype))  # as torch compares
        pointers = (each.data_ptr() for each in (out, base, weights))
        self._quantiles[out.dtype](*pointers, low, out.numel(), state.ctypes.data, table.data_ptr(), scale, limit)
        torch.autograd.graph.increment_version(out)


@lru_cache(maxsize=1)
def keyed_sums() -> KeyedSums | None:
    """The compiled sums, or None where they cannot be had: compiled once a process."""
    library = load_c(SOURCE)
    sums = None if library is None else KeyedSums(library)
    return sums if sums is not None and _rounds_as_torch(sums) else None


def _rounds_as_torch(sums: KeyedSums) -> bool:
    """Whether ``a + b * c`` is rounded once here and in torch: on an old processor torch rounds twice."""
    table = torch.linspace(-4, 4, 2**16)
    base = torch.linspace(-1, 1, 4097)
    named = torch.from_numpy(np.random.SFC64(1).random_raw(1025).view(np.int16)).int().add_(2**15)[: len(base)]
    for dtype in _TYPES:
        start = base.to(dtype)
        expected, out = torch.empty_like(start), torch.empty_like(start)
        torch.add(start, table[named], alpha=0.3, out=expected)
        sums.add_quantiles_(out, start, start, 1, 0, 0.3, table, float("inf"))
        if not torch.equal(out, expected):
            return False
    return True
