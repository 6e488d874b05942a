"""The audit log of a governor: one JSON record a line, enough to replay every decision.

Format ``hf_eff.governor_log``, version 1. Each line is an object with a ``kind``:

- ``header``    first line; ``format``, ``format_version`` and ``run``, what the writer knew beforehand
- ``decision``  one look at which a probe was taken or something was decided: ``step``, ``telemetry`` (the governor's
  input), ``action`` and its ``target``, ``reason`` and ``details`` (the numbers the decision rests on)
- ``footer``    last line of a run that ended; ``summary``

What no two runs share stands apart under the optional key ``measured``: the time of writing, and spending in
``seconds``, ``kwh``, ``usd`` and peak ``bytes``. Without that key the decisions of a resumed run equal those of an
uninterrupted one byte for byte, provided that the governing currency is not itself one of those four.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hf_eff.contracts.governor import Decision, Telemetry
from hf_eff.errors import DataError
from hf_eff.files import write_text

FORMAT = "hf_eff.governor_log"
FORMAT_VERSION = 1
MEASURED = ("seconds", "kwh", "usd", "bytes")
"""Currencies that differ between two runs of the same program."""
_NOT_IN_JSON = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True)
class LoggedDecision:
    """What the governor saw and what it decided."""

    telemetry: Telemetry
    decision: Decision


class GovernorLog:
    """Writes and reads one log file.

    Args:
        path: The file, usually ``governor.jsonl`` in the run's folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def start(self, run: Mapping[str, Any]) -> None:
        """Begin a new log, replacing what is there.

        Args:
            run: JSON-able facts about the run, such as its plan.
        """
        header = {"kind": "header", "format": FORMAT, "format_version": FORMAT_VERSION, "run": dict(run)}
        write_text(self.path, _line({**header, "measured": {"time": _now()}}))

    def append(self, telemetry: Telemetry, decision: Decision) -> None:
        """Add one look. It is in the file, for other processes too, when the call returns."""
        seen = telemetry.to_dict()
        spent = seen.pop("spent")
        measured = {name: spent[name] for name in MEASURED if name in spent}
        seen["spent"] = {name: amount for name, amount in spent.items() if name not in MEASURED}
        self._append(
            {
                "kind": "decision",
                "step": telemetry.step,
                "telemetry": seen,
                "action": decision.action,
                "target": decision.target,
                "reason": decision.reason,
                "details": dict(decision.details),
                "measured": {"time": _now(), "spent": measured},
            }
        )

    def finish(self, summary: Mapping[str, Any]) -> None:
        """End the log of a run that ended."""
        self._append({"kind": "footer", "summary": dict(summary), "measured": {"time": _now()}})

    def truncate_after(self, step: int) -> None:
        """Cut back to the decisions up to ``step``, as a run does that resumes there; the file is replaced as a whole.

        A log that is missing begins anew, and says so in its header.
        """
        if not self.path.is_file():
            self.start({"resumed_after_step": step})
            return
        kept = [line for line, record in self._lines() if _is_before(record, step)]
        write_text(self.path, "".join(kept))

    def header(self) -> dict[str, Any]:
        """The first record.

        Raises:
            DataError: The file is no log of this format.
        """
        first = next(self._lines(), ("", {}))[1]
        if first.get("format") != FORMAT or first.get("format_version") != FORMAT_VERSION:
            raise DataError(f"{str(self.path)!r} is no {FORMAT} of version {FORMAT_VERSION}.")
        return first

    def decisions(self) -> list[LoggedDecision]:
        """Every look that was recorded, in order."""
        self.header()
        return [_read(record) for _, record in self._lines() if record["kind"] == "decision"]

    def summary(self) -> dict[str, Any] | None:
        """What ``finish`` wrote, or None while the run has not ended."""
        footers = [record["summary"] for _, record in self._lines() if record["kind"] == "footer"]
        return footers[-1] if footers else None

    def comparable(self) -> list[str]:
        """Decisions as text without the key ``measured``: equal for two runs that decided alike."""
        records = [record for _, record in self._lines() if record["kind"] == "decision"]
        return [_line({key: value for key, value in record.items() if key != "measured"}) for record in records]

    def _append(self, record: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(_line(record))

    def _lines(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Read the file; an unfinished last line, left by a process that was killed, is passed over.

        Yields:
            line: Text with its line end.
            record: What it says.
        """
        if not self.path.is_file():
            raise DataError(f"{str(self.path)!r} does not exist; give the path of a governor log.")
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
            if not line.endswith("\n"):
                return
            yield line, self._parse(line, number)

    def _parse(self, line: str, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or record.get("kind") not in ("header", "decision", "footer"):
            raise DataError(f"line {number} of {str(self.path)!r} is no record of a governor log.")
        return record


def plain(value: Any) -> Any:
    """JSON-able copy in which numbers that JSON lacks stand as ``"NaN"`` and ``"Infinity"``."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def _restored(value: Any) -> Any:
    """Inverse of ``plain`` for telemetry, whose only strings are keys."""
    if isinstance(value, dict):
        return {key: _restored(item) for key, item in value.items()}
    return _NOT_IN_JSON.get(value, value) if isinstance(value, str) else value


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(plain(record), allow_nan=False, separators=(",", ":")) + "\n"


def _read(record: Mapping[str, Any]) -> LoggedDecision:
    seen = _restored(record["telemetry"])
    seen["spent"] = {**seen["spent"], **_restored(record.get("measured", {}).get("spent", {}))}
    decision = Decision(record["action"], record["reason"], record["details"], record.get("target", ""))
    return LoggedDecision(Telemetry.from_dict(seen), decision)


def _is_before(record: Mapping[str, Any], step: int) -> bool:
    return record["kind"] == "header" or (record["kind"] == "decision" and record["step"] <= step)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
