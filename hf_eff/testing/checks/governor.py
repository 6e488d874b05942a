"""A governor's decisions are functions of the tape, have reasons, and respect compute."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator

from hf_eff.contracts.governor import Telemetry
from hf_eff.contracts.spec import MethodSpec
from hf_eff.testing.check import Check, CheckFailedError, expect
from hf_eff.testing.tapes import CURVES, Recording, Tape, answers_of, play, replay, steep
from hf_eff.testing.tasks import json_part, new_governor

ACTIONS = ("continue", "stop")
PROBE_SHARE, PROBE_FLOOR = 0.15, 0.03
"""Probes may take 15 % of the compute spent and 3 % of the limit."""


def _tapes() -> Iterator[Tape]:
    for curve in CURVES:
        for noise in (0.001, 0.02):
            for limit in (60.0, math.inf):
                yield Tape(curve, limit=limit, noise=noise, seed=len(curve.__name__))


def _recordings(spec: MethodSpec) -> Iterator[tuple[Tape, Recording]]:
    for tape in _tapes():
        yield tape, play(new_governor(spec), tape)


def check_replay(spec: MethodSpec) -> None:
    """The same tape gives the same answers, also when it went through JSON."""
    for tape, recording in _recordings(spec):
        expect(
            replay(new_governor(spec), tape, recording) == answers_of(recording),
            f"{spec.address} answers one tape in two ways.",
        )
        texts = [json.dumps(look.to_dict()) for look in recording.telemetry]
        read = dataclasses.replace(recording, telemetry=[Telemetry.from_dict(json.loads(text)) for text in texts])
        again = replay(new_governor(spec), tape, read) == answers_of(recording)
        expect(again, f"{spec.address} decides otherwise on a tape read back from its log.")


def check_reasons(spec: MethodSpec) -> None:
    """Every decision is one that exists, with a reason in words and details in JSON."""
    for _, recording in _recordings(spec):
        for decision in recording.decisions:
            expect(decision.action in ACTIONS, f"{spec.address} decided {decision.action!r}; use one of {ACTIONS}.")
            expect(len(decision.reason.split()) >= 2, f"{spec.address} gives no reason for {decision.action!r}.")
            try:
                json.dumps(json_part(decision.details), allow_nan=False)
            except (TypeError, ValueError) as error:
                raise CheckFailedError(f"{spec.address} gives details that are not JSON: {error}.") from error


def check_unlimited(spec: MethodSpec) -> None:
    """Without a budget, while the loss keeps falling steeply, it never stops the run."""
    recording = play(new_governor(spec), Tape(steep, noise=0.001, limit=math.inf))
    last = recording.decisions[-1]
    expect(not recording.stopped, f"{spec.address} stopped a run that gained steadily and had no limit: {last.reason}")


def check_more_budget(spec: MethodSpec) -> None:
    """More budget never ends a run earlier."""
    for curve in CURVES:
        ends = [play(new_governor(spec), Tape(curve, limit=limit)).last_step for limit in (40.0, 80.0, 160.0)]
        expect(ends == sorted(ends), f"{spec.address} stops after {ends} steps with budgets of 40, 80 and 160 steps.")


def check_probe_share(spec: MethodSpec) -> None:
    """Probes take a bounded share of the compute."""
    for tape in (dataclasses.replace(tape, probe_cost=1.0) for tape in _tapes()):
        for look in play(new_governor(spec), tape).telemetry:
            allowed = PROBE_SHARE * look.compute + PROBE_FLOOR * look.compute_limit + tape.probe_cost
            expect(
                look.probe_spent <= allowed,
                f"{spec.address} spent {look.probe_spent:.1f} of {look.compute:.1f} units on probes by {look.step}.",
            )


def check_cheap(spec: MethodSpec) -> None:
    """The state stays small: it does not grow with every step."""
    sizes = []
    for steps in (50, 400):
        governor = new_governor(spec)
        play(governor, Tape(steep, steps=steps))
        sizes.append(len(json.dumps(governor.state_dict())))
    expect(sizes[1] <= 64 * 1024, f"{spec.address} has a state of {sizes[1]} bytes after 400 steps.")


_GOVERNOR = ("governor",)
CHECKS = (
    Check(check_replay, kinds=_GOVERNOR),
    Check(check_reasons, kinds=_GOVERNOR),
    Check(check_unlimited, kinds=_GOVERNOR),
    Check(check_more_budget, kinds=_GOVERNOR),
    Check(check_probe_share, kinds=_GOVERNOR),
    Check(check_cheap, kinds=_GOVERNOR),
)
