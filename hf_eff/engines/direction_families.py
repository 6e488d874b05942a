"""Direction families rebuilt from what a replay log says of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_eff.engines.directions import Chunk, DirectionFamily, Gaussian, Rademacher
from hf_eff.engines.low_rank_directions import LowRank
from hf_eff.engines.sparse_directions import SparseGaussian
from hf_eff.engines.subspace_directions import Subspace
from hf_eff.errors import CheckpointError

_BOX_MULLER = "sfc64 + box-muller"


class BoxMuller(Gaussian):
    """Normal entries as logs of earlier versions have them, made of SFC64 words by Box and Muller's transform.

    A pair takes a radius of 31 bits (entries up to 6.5) and an angle of 16 bits.
    """

    def _entries(self, key: int, count: int, device: torch.device) -> Iterator[Tensor]:
        pairs = (count + 1) // 2
        words = np.random.SFC64(key % 2**64).random_raw(-(-3 * pairs // 4))
        raw = torch.from_numpy(words.view(np.int32))
        radius = raw[:pairs].bitwise_or_(1).float()  # odd, hence never zero
        radius.abs_().mul_(2.0**-31).log_().mul_(-2.0).sqrt_()
        angle = raw[pairs:].view(torch.int16)[:pairs].float().mul_(math.pi * 2.0**-15)
        yield torch.stack([torch.cos(angle), torch.sin(angle)]).mul_(radius).view(-1)[:count]

    def _add_compiled(
        self, chunk: Chunk, out: Tensor, base: Tensor, weights: Tensor, scale: float, limit: float
    ) -> bool:
        return False

    def _rng(self, device: torch.device) -> str:
        return _BOX_MULLER if device.type == "cpu" else super()._rng(device)


_BUILDERS: dict[str, Callable[[int, Mapping[str, Any]], DirectionFamily]] = {
    Gaussian.name: Gaussian.from_description,
    Rademacher.name: Rademacher.from_description,
    SparseGaussian.name: SparseGaussian.from_description,
    LowRank.name: LowRank.from_description,
    Subspace.name: Subspace.from_description,
}


def rebuilt(seed: int, described: Mapping[str, Any]) -> DirectionFamily:
    """The family that a log describes.

    Args:
        seed: Seed of the run.
        described: What the family's ``describe`` returned.

    Raises:
        CheckpointError: There is no such family.
    """
    name = described.get("name", "")
    if described.get("rng") == _BOX_MULLER:
        return BoxMuller.from_description(seed, described)
    if name not in _BUILDERS:
        raise CheckpointError(f"cannot replay the run: its directions {name!r} are none of {sorted(_BUILDERS)}.")
    return _BUILDERS[name](seed, described)
