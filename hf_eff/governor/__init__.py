"""Governors decide when a run ends. This driver keeps their log, replays it and applies the mode; it names none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hf_eff.contracts.governor import Decision, Governor
from hf_eff.engines.decision_log import GovernorLog, LoggedDecision, plain
from hf_eff.errors import OptionError

__all__ = ["MODES", "Difference", "GovernorLog", "LoggedDecision", "compare", "effective", "replay"]

MODES = ("observe", "advise", "act")
"""What becomes of a decision: it is logged only, also told to the user, or carried out."""


@dataclass(frozen=True)
class Difference:
    """A step at which a replay decided otherwise than the log says."""

    step: int
    logged: Decision
    replayed: Decision


def effective(decision: Decision, mode: str) -> Decision:
    """What the run does about a decision: the decision itself in mode ``act``, otherwise ``continue``.

    Args:
        decision: What the governor decided.
        mode: One of ``MODES``.

    Raises:
        OptionError: The mode does not exist.

    >>> effective(Decision("stop", "too little gain"), "observe").action
    'continue'
    """
    if mode not in MODES:
        raise OptionError(f"governor_mode must be one of {list(MODES)}, got {mode!r}.")
    if mode == "act" or decision.action == "continue":
        return decision
    return Decision("continue", f"{mode} only, or else {decision.action}: {decision.reason}", decision.details)


def replay(path: str | Path, governor: Governor) -> list[Decision]:
    """Show a recorded run to a governor, look by look, at no compute.

    Stopping does not alter what came before, so the answer of any stopping policy on the recorded run is exact, at the
    looks that were recorded: a policy that wants other probes is judged on those that were taken.

    Args:
        path: A log.
        governor: A fresh governor.

    Returns:
        Its decisions, one for each recorded look; those after its first stop are about a run that went on regardless.

    Raises:
        DataError: The file is no governor log.
    """
    return [governor.observe(look.telemetry) for look in GovernorLog(path).decisions()]


def compare(path: str | Path, governor: Governor) -> list[Difference]:
    """Where a governor decides otherwise than the log says; empty when the log replays exactly.

    Raises:
        DataError: The file is no governor log.
    """
    looks = GovernorLog(path).decisions()
    pairs = zip(looks, replay(path, governor), strict=True)
    return [Difference(look.telemetry.step, look.decision, now) for look, now in pairs if not _same(look.decision, now)]


def _same(logged: Decision, replayed: Decision) -> bool:
    return (logged.action, logged.target, logged.reason, logged.details) == (
        replayed.action,
        replayed.target,
        replayed.reason,
        plain(replayed.details),
    )
