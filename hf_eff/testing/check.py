"""The form of one conformance check: a promise, the methods it binds, and a verdict."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from hf_eff.contracts.spec import KINDS, MethodSpec

Status = Literal["passed", "failed", "known failure", "unexpectedly passed"]


class CheckFailedError(AssertionError):
    """A method breaks a promise; the message says which one and how."""


def expect(condition: object, message: str) -> None:
    """Raise unless ``condition`` holds. Unlike ``assert``, ``python -O`` keeps it.

    Raises:
        CheckFailedError: The condition is false.
    """
    if not condition:
        raise CheckFailedError(message)


def _always(_spec: MethodSpec) -> bool:
    return True


@dataclass(frozen=True)
class Check:
    """One law.

    Attributes:
        run: ``run(spec)`` returns when the method keeps the law and raises when it does not.
        kinds: Kinds of method the law is about.
        when: Whether the law can apply, judged by what the SPEC declares and never by its name.
    """

    run: Callable[[MethodSpec], None]
    kinds: tuple[str, ...] = KINDS
    when: Callable[[MethodSpec], bool] = _always

    @property
    def name(self) -> str:
        """Name of the function, the word that ``SPEC.known_failures`` uses."""
        return self.run.__name__

    @property
    def law(self) -> str:
        """The law in one line."""
        return (self.run.__doc__ or "").strip().splitlines()[0]

    def applies_to(self, spec: MethodSpec) -> bool:
        """Whether this law binds the method."""
        return spec.kind in self.kinds and self.when(spec)


@dataclass(frozen=True)
class Verdict:
    """What came of one check of one method."""

    check: Check
    status: Status
    reason: str
    seconds: float

    @property
    def acceptable(self) -> bool:
        """Whether the method conforms, declared failures included."""
        return self.status in ("passed", "known failure")


def judge(check: Check, spec: MethodSpec) -> Verdict:
    """Run one check and turn any exception into a verdict."""
    known = dict(spec.known_failures).get(check.name)
    start = time.perf_counter()
    try:
        check.run(spec)
    except Exception as problem:  # noqa: BLE001 - a crash of the method is a verdict as well
        status: Status = "failed" if known is None else "known failure"
        reason = known or f"{type(problem).__name__}: {problem}"
    else:
        status = "passed" if known is None else "unexpectedly passed"
        reason = "" if known is None else f"declared as failing ({known}); remove it from SPEC.known_failures"
    return Verdict(check, status, reason, time.perf_counter() - start)
