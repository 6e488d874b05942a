"""Stochastic rounding of a part of a parameter with the random bits that the whole would take there."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_eff.engines.directions import Shard
from hf_eff.engines.stochastic_rounding import round_stochastically_

_SLICE = 2**20  # entries that the rounding draws bits for at a time


def round_part_(out: Tensor, wide: Tensor, generator: torch.Generator, place: Shard) -> Tensor:
    """Write ``wide`` into ``out``, as ``round_stochastically_`` would as part of a larger tensor.

    Args:
        out: bf16, any shape; contiguous where it is a part.
        wide: fp32 of ``out``'s shape.
        generator: Source of the whole tensor's random bits; those before ``out`` are drawn and left out.
        place: Where ``out`` lies in the whole.

    Returns:
        ``out``.
    """
    total, first = math.prod(place.shape), place.offset
    if out.numel() == total:
        return round_stochastically_(out, wide, generator)
    target, source, last = out.view(-1), wide.view(-1), first + out.numel()
    for begin in range(0, last, _SLICE):
        padded = torch.zeros(min(_SLICE, total - begin), device=wide.device)
        low, high = max(begin, first), min(begin + len(padded), last)
        held, inside = slice(low - first, high - first), slice(low - begin, high - begin)
        if low < high:
            padded[inside] = source[held]
        rounded = round_stochastically_(torch.empty_like(padded, dtype=out.dtype), padded, generator)
        if low < high:
            target[held] = rounded[inside]
    return out
