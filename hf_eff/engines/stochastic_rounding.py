"""Stochastic rounding from fp32 to bf16: up or down with the odds that keep the mean."""

from __future__ import annotations

import torch
from torch import Tensor

_SHARED = -(2**16)  # mask of the 16 leading bits, which a bf16 number has in common with an fp32 number
_DROPPED = 2**16  # number of values of the other 16 bits
_SLICE = 2**20  # entries at a time: bounds the scratch memory


def round_stochastically_(out: Tensor, wide: Tensor, generator: torch.Generator) -> Tensor:
    """Write ``wide`` into ``out``, each entry rounded to one of its two neighbours so that its mean is kept.

    Round-to-nearest would lose every update below half a unit in the last place; this one keeps it on average.

    Args:
        out: bf16, any shape.
        wide: fp32 of ``out``'s shape.
        generator: Source of the random bits, on the device of both.

    Returns:
        ``out``.
    """
    if not (out.is_contiguous() and wide.is_contiguous()):
        rounded = torch.empty_like(out, memory_format=torch.contiguous_format)
        return out.copy_(round_stochastically_(rounded, wide.contiguous(), generator))
    for target, source in zip(out.view(-1).split(_SLICE), wide.view(-1).split(_SLICE), strict=True):
        bits = torch.empty(source.shape, dtype=torch.int32, device=source.device)
        bits.random_(0, _DROPPED, generator=generator)
        # The sum carries into the shared bits with probability (dropped bits) / 2^16, whatever the sign.
        rounded = bits.add_(source.view(torch.int32)).bitwise_and_(_SHARED).view(torch.float32)
        target.copy_(torch.where(source.isfinite(), rounded, source))
    return out
