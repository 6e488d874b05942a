"""A matrix gradient in few dimensions: its leading singular directions (GaLore) or random ones (APOLLO).

Of G [a, b] one side is replaced by r dimensions. ``"left"``: R = P^T G [r, b] with P [a, r]; ``"right"``: R = G P
[a, r] with P [b, r]. By default the shorter side is replaced, and the right one of a square.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_eff.numerics.subspace_shapes import EXTRA, ROUNDS, Side, sides


def leading_basis(matrix: Tensor, rank: int, side: Side, generator: torch.Generator | None) -> Tensor:
    """Orthonormal basis of the leading singular directions.

    Args:
        matrix: [a, b], fp32.
        rank: Directions r; at most the matrix has.
        side: The side that is replaced.
        generator: For a randomised search, a range finder with two power iterations (Halko, Martinsson and Tropp,
            2011, algorithm 4.4); None for a full singular value decomposition.

    Returns:
        [a or b, r].
    """
    kept = min(rank, *matrix.shape)
    if generator is None:
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        return (left[:, :kept] if side == "left" else right[:kept].mT).contiguous()
    tall = matrix if side == "left" else matrix.mT
    width = min(kept + EXTRA, *matrix.shape)
    start = torch.randn(tall.shape[1], width, generator=generator, device=matrix.device, dtype=matrix.dtype)
    span, _ = torch.linalg.qr(tall @ start)
    for _ in range(ROUNDS):
        back, _ = torch.linalg.qr(tall.mT @ span)
        span, _ = torch.linalg.qr(tall @ back)
    small = span.mT @ tall
    _, vectors = torch.linalg.eigh(small @ small.mT)  # ascending
    return span @ vectors[:, -kept:].flip(1)


def random_basis(matrix: Tensor, rank: int, side: Side, generator: torch.Generator) -> Tensor:
    """Independent normal entries of variance 1/r: lengths are kept on average. [a or b, r], fp32."""
    kept = min(rank, *matrix.shape)
    entries = torch.randn(
        sides((matrix.shape[0], matrix.shape[1]), side)[0], kept, generator=generator, device=matrix.device
    )
    return entries.div_(math.sqrt(kept))


def project(matrix: Tensor, basis: Tensor, side: Side) -> Tensor:
    """R: [r, b] or [a, r]."""
    return basis.mT @ matrix if side == "left" else matrix @ basis


def add_back_(out: Tensor, small: Tensor, basis: Tensor, side: Side, *, beta: float, alpha: float) -> Tensor:
    """``out = beta out + alpha (small, projected back)`` in place, without a full matrix in between."""
    first, second = (basis, small) if side == "left" else (small, basis.mT)
    return torch.addmm(out, first, second, beta=beta, alpha=alpha, out=out)
