"""What the weights of a zeroth-order run depend on beside its records.

Different software versions and processors are judged by what they compute: the header has a digest of a small update,
and whoever continues or replays the run must reproduce it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_eff.engines.directions import DirectionFamily
from hf_eff.engines.zeroth_order import Term, update
from hf_eff.errors import CheckpointError

VERSION = 1
_PROBED_ENTRIES = 2**14
_SAMPLED_ENTRIES = 256
_FREE = ("torch", "device", "base", "origin")
"""Fields that a continued run may change: software and device are judged by their arithmetic."""


@dataclass(frozen=True)
class LogHeader:
    """What the weights depend on beside the records.

    Attributes:
        seed: Seed of the run.
        eps: Length of the perturbations.
        family: Name, chunk and generator of the directions.
        parameters: Rows (name, shape, type, parameter group) of every trained tensor.
        arithmetic: Digest of a small update as this software and processor compute it.
        base: Digest of samples of the weights that the first record starts from.
        torch: Version that wrote the log, for reading only.
        device: Kind of device that wrote the log, for reading only.
        version: Of this format.
        rule: How coefficients become an update; empty for their mean.
        origin: Where the weights at the start come from, as ``engines.replay_origin`` describes it.
    """

    seed: int
    eps: float
    family: Mapping[str, Any]
    parameters: tuple[tuple[str, tuple[int, ...], str, int], ...]
    arithmetic: str
    base: str
    torch: str = torch.__version__
    device: str = "cpu"
    version: int = VERSION
    rule: Mapping[str, Any] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        family: DirectionFamily,
        eps: float,
        groups: Sequence[Mapping[str, nn.Parameter]],
        rule: Mapping[str, Any] | None = None,
    ) -> LogHeader:
        """Header of a run that starts now.

        Args:
            family: Makes the directions.
            eps: Length of the perturbations.
            groups: Parameters by name, one mapping a parameter group.
            rule: How coefficients become an update; None for their mean.
        """
        rows = [
            (name, tuple(parameter.shape), str(parameter.dtype), index)
            for index, group in enumerate(groups)
            for name, parameter in group.items()
        ]
        every = {name: parameter for group in groups for name, parameter in group.items()}
        device = next(iter(every.values())).device
        return cls(
            seed=family.seed,
            eps=eps,
            family=family.describe(device),
            parameters=tuple(rows),
            arithmetic=arithmetic_digest(family, device),
            base=weights_digest(every.values()),
            device=device.type,
            rule=dict(rule or {}),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able copy."""
        rows = [[name, list(shape), kind, group] for name, shape, kind, group in self.parameters]
        values = {**dataclasses.asdict(self), "parameters": rows}
        if not self.rule:
            del values["rule"]  # as in logs from before there were rules, whose digests must hold
        if not self.origin:
            del values["origin"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LogHeader:
        """Inverse of ``to_dict``."""
        rows = [(name, tuple(shape), kind, group) for name, shape, kind, group in values["parameters"]]
        return cls(**{**values, "parameters": tuple(rows)})

    def require_same(self, other: LogHeader, doing: str) -> None:
        """Refuse another run's header.

        Raises:
            CheckpointError: A field differs that the weights depend on.
        """
        for each in dataclasses.fields(self):
            mine, theirs = getattr(self, each.name), getattr(other, each.name)
            if each.name not in _FREE and mine != theirs:
                raise CheckpointError(f"cannot {doing}: {_difference(each.name, mine, theirs)}")


def arithmetic_digest(family: DirectionFamily, device: torch.device) -> str:
    """SHA-256 of a fixed small update: other generators, kernels or roundings give another one."""
    ramp = torch.arange(_PROBED_ENTRIES, device=device, dtype=torch.float32).div_(_PROBED_ENTRIES)
    ramp = ramp.view(math.isqrt(_PROBED_ENTRIES), -1)
    tensors = {"fp32": ramp, "bf16": ramp.to(torch.bfloat16)}
    update(tensors.items(), family, [Term(0, 0, 0.3), Term(1, 1, 0.7)], step=1, lr=1e-2, weight_decay=0.1)
    return _sha256(tensors.values())


def weights_digest(parameters: Iterable[Tensor]) -> str:
    """SHA-256 of a few hundred entries of each tensor, spread evenly: enough to tell two models apart."""
    flat = [parameter.detach().reshape(-1) for parameter in parameters]
    return _sha256(tensor[:: -(-tensor.numel() // _SAMPLED_ENTRIES) or 1] for tensor in flat)


def _sha256(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _difference(field: str, mine: Any, theirs: Any) -> str:
    if field == "parameters":
        changed = sorted({*mine} ^ {*theirs})
        return f"the trained parameters differ, first at {changed[0] if changed else 'their order'}."
    if field == "arithmetic":
        return "this version of torch or this processor computes other directions than the one that wrote the log."
    return f"{field} is {theirs!r} here and {mine!r} in the log."
