"""Replay log: the scalars of a zeroth-order run, from which its weights can be rebuilt bit for bit.

Directions are functions of (seed, step, name), so a step is known from its coefficients, learning rates and weight
decays: a hundred bytes. The header pins what else the weights depend on. Different software versions and processors
are judged by what they compute: the header has a digest of a small update, and replay must reproduce it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_eff.engines.directions import FAMILIES, DirectionFamily
from hf_eff.engines.zeroth_order import Term, update
from hf_eff.errors import CheckpointError
from hf_eff.files import write_text

VERSION = 1
_PROBED_ENTRIES = 2**14
_SAMPLED_ENTRIES = 256
_FREE = ("torch", "device", "base")
"""Header fields that a continued run may change: the first two are judged by the arithmetic they do."""


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step.

    Attributes:
        step: Optimizer steps done before it.
        coefficients: Projected gradient c of each direction, in order of the draws.
        lr: Learning rate of each parameter group.
        weight_decay: Weight decay of each parameter group.
        skipped: Whether no weight was moved, because a coefficient was not finite.
    """

    step: int
    coefficients: tuple[float, ...]
    lr: tuple[float, ...]
    weight_decay: tuple[float, ...]
    skipped: bool = False

    @property
    def terms(self) -> list[Term]:
        """The update: the mean over directions of c z; nothing for a skipped step."""
        if self.skipped:
            return []
        count = len(self.coefficients)
        return [Term(self.step, draw, c / count) for draw, c in enumerate(self.coefficients)]

    def to_list(self) -> list[Any]:
        """JSON-able row; coefficients as hexadecimal floats, which also spell infinity and NaN."""
        coefficients = [float(c).hex() for c in self.coefficients]
        return [self.step, coefficients, list(self.lr), list(self.weight_decay), int(self.skipped)]

    @classmethod
    def from_list(cls, row: Sequence[Any]) -> StepRecord:
        """Inverse of ``to_list``."""
        step, coefficients, lr, weight_decay, skipped = row
        return cls(step, tuple(map(float.fromhex, coefficients)), tuple(lr), tuple(weight_decay), bool(skipped))


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

    @classmethod
    def of(cls, family: DirectionFamily, eps: float, groups: Sequence[Mapping[str, nn.Parameter]]) -> LogHeader:
        """Header of a run that starts now.

        Args:
            family: Makes the directions.
            eps: Length of the perturbations.
            groups: Parameters by name, one mapping a parameter group.
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
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LogHeader:
        """Inverse of ``dataclasses.asdict``, also after JSON."""
        rows = [(name, tuple(shape), kind, group) for name, shape, kind, group in values["parameters"]]
        return cls(**{**values, "parameters": tuple(rows)})

    def require_same(self, other: LogHeader, doing: str) -> None:
        """Refuse another run's header.

        Raises:
            CheckpointError: A field differs that the weights depend on.
        """
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if field.name not in _FREE and mine != theirs:
                raise CheckpointError(f"cannot {doing}: {_difference(field.name, mine, theirs)}")


class ReplayLog:
    """Header and records of a run, kept in memory: about a hundred bytes a step.

    Args:
        header: What the run depends on.
        records: Steps so far.
    """

    def __init__(self, header: LogHeader, records: Iterable[StepRecord] = ()) -> None:
        self.header = header
        self.records = list(records)

    def __len__(self) -> int:
        """Number of recorded steps."""
        return len(self.records)

    def append(self, record: StepRecord) -> None:
        """Add the next step.

        Raises:
            CheckpointError: It does not follow the last one.
        """
        if self.records and record.step != self.records[-1].step + 1:
            raise CheckpointError(
                f"step {record.step} cannot follow step {self.records[-1].step} in the replay log; resume the run "
                "from a checkpoint, or start it anew."
            )
        self.records.append(record)

    def truncate(self, step: int) -> None:
        """Drop the steps from ``step`` on, which a run resumed at ``step`` will do again.

        Raises:
            CheckpointError: Earlier steps are missing.
        """
        kept = [record for record in self.records if record.step < step]
        if self.records and (not kept or kept[-1].step != step - 1):
            first, last = self.records[0].step, self.records[-1].step
            raise CheckpointError(f"the replay log has steps {first} to {last}; a run cannot resume from it at {step}.")
        self.records = kept

    def trailing_skips(self) -> int:
        """How many of the last steps were skipped, without a break."""
        count = 0
        for record in reversed(self.records):
            if not record.skipped:
                break
            count += 1
        return count

    def to_dict(self) -> dict[str, Any]:
        """JSON-able copy with a digest of its content."""
        return {
            "header": dataclasses.asdict(self.header),
            "records": [record.to_list() for record in self.records],
            "sha256": self.digest(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ReplayLog:
        """Inverse of ``to_dict``.

        Raises:
            CheckpointError: Entries are missing or the content does not match its digest.
        """
        try:
            header = LogHeader.from_dict(values["header"])
            log = cls(header, [StepRecord.from_list(row) for row in values["records"]])
            intact = log.digest() == values["sha256"]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the replay log cannot be read ({error}); use an earlier checkpoint.") from error
        if not intact:
            raise CheckpointError("the replay log was damaged or changed: its digest does not match its content.")
        return log

    def digest(self) -> str:
        """SHA-256 of header and records."""
        return hashlib.sha256("\n".join(self._lines()).encode()).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON lines, atomically: the header, one line a step, the digest."""
        write_text(path, "\n".join([*self._lines(), json.dumps({"sha256": self.digest()})]) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ReplayLog:
        """Read what ``save`` wrote.

        Raises:
            CheckpointError: The file is damaged or cut short.
        """
        try:
            header, *rows, end = map(json.loads, Path(path).read_text(encoding="utf-8").splitlines())
            values = {"header": header, "records": rows, "sha256": end["sha256"]}
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is no whole replay log ({error}).") from error
        return cls.from_dict(values)

    def _lines(self) -> list[str]:
        header = json.dumps(dataclasses.asdict(self.header), sort_keys=True)
        return [header, *(json.dumps(record.to_list()) for record in self.records)]


def replay(model: nn.Module, log: ReplayLog, until_step: int | None = None) -> None:
    """Repeat the updates of a run on the weights it started from; the result is bit for bit the run's.

    Args:
        model: Holds the weights that the first record starts from; changed in place.
        log: The run.
        until_step: Optimizer steps after which to end, counted from the start of training; None for all.

    Raises:
        CheckpointError: The model has other parameters or weights, or this software and processor compute
            other numbers than those of the run.
    """
    header = log.header
    every = dict(model.named_parameters(remove_duplicate=False))
    missing = [name for name, *_ in header.parameters if name not in every]
    if missing:
        raise CheckpointError(f"cannot replay the run: the model has no parameter {missing[0]!r}.")
    groups: list[dict[str, nn.Parameter]] = [{} for _ in range(1 + max(row[3] for row in header.parameters))]
    for name, _, _, index in header.parameters:
        groups[index][name] = every[name]
    family = _family(header)
    here = LogHeader.of(family, header.eps, groups)
    header.require_same(here, "replay the run")
    if header.base != here.base:
        raise CheckpointError("cannot replay the run: it started from other weights than the model has.")
    for record in log.records:
        if until_step is None or record.step < until_step:
            apply(record, groups, family)


def apply(record: StepRecord, groups: Sequence[Mapping[str, Tensor]], family: DirectionFamily) -> None:
    """Do one recorded step; a run and its replay both come through here.

    Args:
        record: The step.
        groups: Parameters by name, one mapping a parameter group.
        family: Makes the directions.
    """
    if record.skipped:
        return
    for group, lr, weight_decay in zip(groups, record.lr, record.weight_decay, strict=True):
        update(group.items(), family, record.terms, step=record.step, lr=lr, weight_decay=weight_decay)


def arithmetic_digest(family: DirectionFamily, device: torch.device) -> str:
    """SHA-256 of a fixed small update: other generators, kernels or roundings give another one."""
    ramp = torch.arange(_PROBED_ENTRIES, device=device, dtype=torch.float32).div_(_PROBED_ENTRIES)
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


def _family(header: LogHeader) -> DirectionFamily:
    name = header.family.get("name")
    if name not in FAMILIES:
        raise CheckpointError(f"cannot replay the run: its directions {name!r} are none of {list(FAMILIES)}.")
    return FAMILIES[name](header.seed, header.family["chunk"])


def _difference(field: str, mine: Any, theirs: Any) -> str:
    if field == "parameters":
        changed = sorted({*mine} ^ {*theirs})
        return f"the trained parameters differ, first at {changed[0] if changed else 'their order'}."
    if field == "arithmetic":
        return "this version of torch or this processor computes other directions than the one that wrote the log."
    return f"{field} is {theirs!r} here and {mine!r} in the log."
