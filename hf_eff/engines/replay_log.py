"""Replay log: the scalars of a zeroth-order run, from which its weights can be rebuilt bit for bit.

Directions are functions of (seed, step, name), so a step is known from its coefficients, learning rates and weight
decays.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_eff.engines.replay_header import LogHeader
from hf_eff.engines.zeroth_order import Term
from hf_eff.errors import CheckpointError
from hf_eff.files import write_text

_ENOUGH = 8  # steps that a median is taken of


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step.

    Attributes:
        step: Optimizer steps done before it.
        coefficients: Projected gradient c of each direction, in order of the draws.
        lr: Learning rate of each parameter group.
        weight_decay: Weight decay of each parameter group.
    """

    step: int
    coefficients: tuple[float, ...]
    lr: tuple[float, ...]
    weight_decay: tuple[float, ...]

    @property
    def skipped(self) -> bool:
        """Whether the step moved nothing, because a coefficient was not finite."""
        return not all(map(math.isfinite, self.coefficients))

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
        return [self.step, coefficients, list(self.lr), list(self.weight_decay), self.skipped]

    @classmethod
    def from_list(cls, row: Sequence[Any]) -> StepRecord:
        """Inverse of ``to_list``."""
        step, coefficients, lr, weight_decay, _ = row
        return cls(step, tuple(map(float.fromhex, coefficients)), tuple(lr), tuple(weight_decay))


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

    def median_coefficient(self, steps: int) -> float | None:
        """Median |c| of the last steps that moved the weights; None while there are fewer than eight."""
        recent = [record for record in self.records[-steps:] if not record.skipped]
        if len(recent) < _ENOUGH:
            return None
        return statistics.median(abs(c) for record in recent for c in record.coefficients)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able copy: the header, one line of text a step, and a digest of both."""
        header, *records = self._lines()
        return {"header": json.loads(header), "records": records, "sha256": self.digest()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ReplayLog:
        """Inverse of ``to_dict``.

        Raises:
            CheckpointError: Entries are missing or the content does not match its digest.
        """
        try:
            header = LogHeader.from_dict(values["header"])
            log = cls(header, [StepRecord.from_list(json.loads(line)) for line in values["records"]])
            intact = log.digest() == values["sha256"]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the replay log cannot be read ({error}); use an earlier checkpoint.") from error
        if not intact:
            raise CheckpointError("the replay log was damaged or changed: its digest does not match its content.")
        return log

    def digest(self) -> str:
        """SHA-256 of header and records."""
        return hashlib.sha256("\n".join(self._lines()).encode()).hexdigest()

    def save(self, path: str | os.PathLike[str], weights: str | None = None) -> None:
        """Write JSON lines, atomically: the header, one line a step, the digest.

        Args:
            path: The file.
            weights: Digest of the weights after the last step, where it is known.
        """
        end = {"sha256": self.digest(), **({} if weights is None else {"weights": weights})}
        write_text(path, "\n".join([*self._lines(), json.dumps(end)]) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ReplayLog:
        """Read what ``save`` wrote.

        Raises:
            CheckpointError: The file is damaged or cut short.
        """
        try:
            header, *records, end = Path(path).read_text(encoding="utf-8").splitlines()
            values = {"header": json.loads(header), "records": records, "sha256": json.loads(end)["sha256"]}
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is no whole replay log ({error}).") from error
        return cls.from_dict(values)

    def _lines(self) -> list[str]:
        header = json.dumps(self.header.to_dict(), sort_keys=True)
        return [header, *(json.dumps(record.to_list()) for record in self.records)]
