"""A pilot run as the planner reads it: a CSV file of losses, or the governor log of a run."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hf_eff.errors import DataError
from hf_eff.loss_forecast import Pilot
from hf_eff.numerics.pilot_fit import FEWEST_POINTS

CLOCKS = ("tokens", "compute")
"""Columns that say how far the pilot was: training tokens, or training FLOPs."""


@dataclass(frozen=True)
class PilotFile:
    """What was read.

    Attributes:
        clock: One of ``CLOCKS``.
        positions: [n] tokens or FLOPs, increasing.
        losses: [n] held-out losses.
        source: Name of the file.
        flops_per_second: Speed of the run, where its log tells.
    """

    clock: str
    positions: tuple[float, ...]
    losses: tuple[float, ...]
    source: str
    flops_per_second: float | None = None

    def in_tokens(self, token_flops: float) -> Pilot:
        """The pilot by tokens; compute is turned into tokens of ``token_flops`` FLOPs."""
        unit = token_flops if self.clock == "compute" else 1.0
        return Pilot([position / unit for position in self.positions], self.losses, self.source)


def read_pilot(path: Path) -> PilotFile:
    """Read ``.jsonl`` as a governor log, anything else as CSV with a header.

    Raises:
        DataError: The file is missing or malformed, or is no curve that could be fitted.
    """
    found = _read_log(path) if path.suffix == ".jsonl" else _read_csv(path)
    _check(found)
    return found


def _read_csv(path: Path) -> PilotFile:
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream, skipinitialspace=True)
            rows = list(reader)
            names = [name.strip() for name in reader.fieldnames or ()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"pilot={str(path)!r} cannot be read ({reason}).") from error
    clock = next((name for name in CLOCKS if name in names), None)
    if clock is None or "loss" not in names:
        missing = "'loss'" if clock is not None else "'tokens' or 'compute'"
        raise DataError(f"pilot={str(path)!r} has no column {missing}; its header names {names}.")
    rows = [{name.strip(): text for name, text in row.items() if isinstance(name, str)} for row in rows]
    numbers = [(_number(row, clock, line, path), _number(row, "loss", line, path)) for line, row in enumerate(rows, 2)]
    return PilotFile(clock, tuple(at for at, _ in numbers), tuple(loss for _, loss in numbers), path.name)


def _number(row: Mapping[str, str | None], column: str, line: int, path: Path) -> float:
    text = row.get(column)
    try:
        number = float(text or "")
    except ValueError:
        raise DataError(f"line {line} of pilot={str(path)!r} has no number under {column!r}, but {text!r}.") from None
    if not math.isfinite(number):
        raise DataError(f"line {line} of pilot={str(path)!r} has {number} under {column!r}; it must be finite.")
    return number


def _read_log(path: Path) -> PilotFile:
    """Probes of a governed run. Tokens are steps times the plan's tokens a step; without a plan, those spent."""
    from hf_eff.engines.decision_log import GovernorLog

    log = GovernorLog(path)
    seen = [logged.telemetry for logged in log.decisions() if logged.telemetry.probe is not None]
    if not seen:
        raise DataError(f"pilot={str(path)!r} records no probe; a pilot needs a governor that probes.")
    per_step = log.header()["run"].get("predicted", {}).get("step_tokens")
    if per_step:
        positions = [look.step * float(per_step) for look in seen]
    else:
        positions = [look.spent.get("tokens", math.nan) for look in seen]
    flops, seconds = (seen[-1].spent.get(name, 0.0) - seen[0].spent.get(name, 0.0) for name in ("flops", "seconds"))
    losses = tuple(look.probe.mean for look in seen if look.probe is not None)
    speed = flops / seconds if flops > 0 and seconds > 0 else None
    return PilotFile("tokens", tuple(positions), losses, path.name, speed)


def _check(found: PilotFile) -> None:
    name, clock = f"pilot={found.source!r}", found.clock
    if len(found.positions) < FEWEST_POINTS:
        raise DataError(f"{name} has {len(found.positions)} points; it needs {FEWEST_POINTS} or more.")
    if not all(map(math.isfinite, (*found.positions, *found.losses))):
        raise DataError(f"{name} has a loss or a number of tokens that is not finite.")
    if found.positions[0] < 0:
        raise DataError(f"{name} begins at {found.positions[0]:g} {clock}; there is nothing before 0.")
    for number, (before, after) in enumerate(zip(found.positions, found.positions[1:], strict=False), start=1):
        if after <= before:
            raise DataError(
                f"{name} goes from {before:g} to {after:g} {clock} between its points {number} and {number + 1}; "
                f"{clock} must increase."
            )
