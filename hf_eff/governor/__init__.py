"""Governors decide when a run ends. This driver keeps their log, replays it and applies the mode; it names none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_eff.contracts.governor import Decision, Governor
from hf_eff.engines.decision_log import GovernorLog, LoggedDecision, plain
from hf_eff.errors import DataError, OptionError
from hf_eff.registry import build, get_method

__all__ = [
    "MODES",
    "Difference",
    "GovernorLog",
    "LoggedDecision",
    "Outcome",
    "best_outcome",
    "compare",
    "effective",
    "new_governor",
    "outcome",
    "recorded_outcome",
    "recorded_policy",
    "replay",
]

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


# What a policy would have made of a recorded run


@dataclass(frozen=True)
class Outcome:
    """Where a policy ends a recorded run, and what the run had reached by then.

    Attributes:
        step: Optimizer steps done.
        compute: Spent amount of the governing currency.
        saved: Share of the recorded run's compute that is not spent.
        loss: Held-out loss of the last probe until then; None where none was finite.
        best: Lowest held-out loss until then.
        best_step: Where that was.
        action: ``stop``, ``cooldown``, or ``continue`` when the policy lets the run go to its end.
        reason: The policy's own words; empty when it lets the run go on.
        departs_at: First step at which it would reallocate otherwise than the recorded run, after which nothing here
            is exact; None for a policy that only stops.
    """

    step: int
    compute: float
    saved: float
    loss: float | None
    best: float | None
    best_step: int | None
    action: str
    reason: str
    departs_at: int | None = None

    def priced(self, price: float) -> float | None:
        """J = best loss + price * compute; None without a loss.

        Args:
            price: Nats per unit of the governing currency.
        """
        return None if self.best is None else self.best + price * self.compute


def new_governor(name: str, options: Mapping[str, Any] | None = None) -> Governor:
    """A fresh governor by its registered name.

    Raises:
        UnknownMethodError: No such governor.
        OptionError: An option is unknown or outside its bounds.
    """
    made: Governor = build(get_method("governor", name), dict(options or {}))
    return made


def recorded_policy(log: GovernorLog) -> tuple[str, dict[str, Any]]:
    """Name and options of the governor that wrote a log.

    Raises:
        DataError: The file is no log, or its header names no governor.
    """
    run = log.header()["run"]
    for address, options in run.get("methods", {}).items():
        kind, _, name = address.partition(":")
        if kind == "governor":
            return name, dict(options)
    if "governor" not in run:
        raise DataError(f"the header of {str(log.path)!r} names no governor; name one to replay.")
    return run["governor"], dict(run.get("governor_kwargs") or {})


def outcome(looks: Sequence[LoggedDecision], governor: Governor) -> Outcome:
    """Show a recorded run to a governor up to the look at which it ends the run.

    Args:
        looks: All looks of a log, at least one.
        governor: A fresh governor.

    Raises:
        DataError: There are no looks.
    """
    departs_at, count = None, 0
    for count, look in enumerate(looks, start=1):
        decision = governor.observe(look.telemetry)
        if decision.action in ("stop", "cooldown"):
            return _outcome(looks, count, decision, departs_at)
        logged = (look.decision.action, look.decision.target)
        reallocates = decision.action != "continue" and (decision.action, decision.target) != logged
        departs_at = look.telemetry.step if reallocates and departs_at is None else departs_at
    return _outcome(looks, count, Decision("continue", ""), departs_at)


def recorded_outcome(looks: Sequence[LoggedDecision]) -> Outcome:
    """The recorded run itself, up to its last look.

    Raises:
        DataError: There are no looks.
    """
    return _outcome(looks, len(looks), Decision("continue", ""), None)


def best_outcome(looks: Sequence[LoggedDecision], price: float) -> Outcome:
    """The probe at which ``loss + price * compute`` is least: what only hindsight finds.

    Raises:
        DataError: There are no looks, or none has a finite loss.
    """
    ends = [_outcome(looks, count, Decision("stop", "hindsight"), None) for count in range(1, len(looks) + 1)]
    known = [(value, index) for index, end in enumerate(ends) if (value := end.priced(price)) is not None]
    if not known:
        raise DataError("the log holds no probe with a finite loss, so nothing can be priced.")
    return ends[min(known)[1]]


def _outcome(looks: Sequence[LoggedDecision], count: int, decision: Decision, departs_at: int | None) -> Outcome:
    """State of the recorded run after its first ``count`` looks."""
    if not looks:
        raise DataError("the log holds no look at the run.")
    seen, last = [look.telemetry for look in looks[:count]], looks[-1].telemetry.compute
    probed = [
        (look.probe.mean, look.step) for look in seen if look.probe is not None and math.isfinite(look.probe.mean)
    ]
    best = min(probed, default=(None, None))
    return Outcome(
        step=seen[-1].step,
        compute=seen[-1].compute,
        saved=1.0 - seen[-1].compute / last if last > 0 else 0.0,
        loss=probed[-1][0] if probed else None,
        best=best[0],
        best_step=best[1],
        action=decision.action,
        reason=decision.reason,
        departs_at=departs_at,
    )
