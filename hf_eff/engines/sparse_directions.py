"""Directions on small weights only (Sparse MeZO): normal entries where |w| is at most the threshold of its tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_eff.engines.directions import Gaussian

_SAMPLE = 2**24  # entries that torch sorts for a quantile


class SparseGaussian(Gaussian):
    """Normal entries times the mask |w| <= h of the weights as they are at that step.

    The thresholds h are fixed when the run starts; the mask follows the weights and is never stored.

    Args:
        seed: Seed of the run.
        thresholds: h of each parameter; one without a threshold takes every entry.
        chunk: Entries that have a stream of their own.
    """

    name = "sparse"
    reads_weights = True

    def __init__(self, seed: int, thresholds: Mapping[str, float], chunk: int | None = None) -> None:
        super().__init__(seed) if chunk is None else super().__init__(seed, chunk)
        self.thresholds = dict(thresholds)

    @classmethod
    def from_description(cls, seed: int, described: Mapping[str, Any]) -> SparseGaussian:
        """Inverse of ``describe``."""
        thresholds = {name: float.fromhex(each) for name, each in described["thresholds"].items()}
        return cls(seed, thresholds, described["chunk"])

    def describe(self, device: torch.device) -> dict[str, Any]:
        """As for independent entries, with every threshold as a hexadecimal float."""
        thresholds = {name: each.hex() for name, each in sorted(self.thresholds.items())}
        return {**super().describe(device), "thresholds": thresholds}

    def _limit(self, name: str) -> float:
        return self.thresholds.get(name, math.inf)


def thresholds_of(parameters: Mapping[str, Tensor], density: float) -> dict[str, float]:
    """The |w| below which the share ``density`` of each matrix's entries lies.

    Vectors have no threshold: their entries are few, and norm weights are all large. Neither have matrices that start
    at zero, such as the second factor of an adapter: no entry that has moved once would move again.

    Args:
        parameters: Weights that the run starts from.
        density: Share of the entries that move, above 0 and at most 1.
    """
    found = {name: _quantile(each.detach(), density) for name, each in parameters.items() if each.ndim > 1}
    return {name: limit for name, limit in found.items() if limit > 0} if density < 1 else {}


def _quantile(weights: Tensor, density: float) -> float:
    flat = weights.reshape(-1)
    flat = flat[:: -(-flat.numel() // _SAMPLE)].abs().float()
    return float(flat.kthvalue(max(1, round(density * flat.numel()))).values)
