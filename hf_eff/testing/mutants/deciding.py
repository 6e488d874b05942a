"""Governors that are broken in one way each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from hf_eff.contracts.governor import Decision, Telemetry
from hf_eff.contracts.spec import MethodSpec
from hf_eff.testing.toys.patience import SPEC, Patience

_looks = itertools.count()
Observe = Callable[[Patience, Telemetry], Decision]


def _that(observe: Observe) -> MethodSpec:
    """The toy governor with another ``observe``."""

    class Mutant(Patience):
        def observe(self, telemetry: Telemetry) -> Decision:
            return observe(self, telemetry)

    return replace(SPEC, build=Mutant)


def _instead(**changes: Any) -> MethodSpec:
    """The toy governor with changed decisions."""
    return _that(lambda governor, telemetry: replace(Patience.observe(governor, telemetry), **changes))


class _Forgets(Patience):
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.without_gain = 0


class _AlwaysProbes(Patience):
    def next_probe(self, telemetry: Telemetry, probe_cost: float) -> bool:
        return True


class _KeepsEverything(Patience):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.tape: list[dict[str, Any]] = []

    def observe(self, telemetry: Telemetry) -> Decision:
        self.tape.append(telemetry.to_dict())
        return super().observe(telemetry)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "tape": self.tape}


def _by_clock(governor: Patience, telemetry: Telemetry) -> Decision:
    return replace(Patience.observe(governor, telemetry), details={"look": next(_looks)})


def _early(_governor: Patience, telemetry: Telemetry) -> Decision:
    return Decision("stop" if telemetry.step >= 10 else "continue", "enough is enough")


def _upside_down(_governor: Patience, telemetry: Telemetry) -> Decision:
    spent = telemetry.step * telemetry.compute_limit > 2000
    return Decision("stop" if spent else "continue", "the larger the limit the sooner")


def _strict(governor: Patience, telemetry: Telemetry) -> Decision:
    if telemetry.loss is not None and telemetry.loss != telemetry.loss:
        raise ValueError("cannot convert float NaN to integer")
    return Patience.observe(governor, telemetry)


class _CountsLooks(Patience):
    """Decides by how often it looked, and forgets that in a checkpoint."""

    looks = 0

    def observe(self, telemetry: Telemetry) -> Decision:
        self.looks += 1
        return replace(super().observe(telemetry), details={"looks": self.looks})


RESUME = (replace(SPEC, build=_CountsLooks),)
MUTANTS: Mapping[str, tuple[MethodSpec, ...]] = {
    "check_resume_tape": (replace(SPEC, build=_Forgets),),
    "check_bad_reading": (_that(_strict),),
    "check_replay": (_that(_by_clock),),
    "check_reasons": (_instead(reason=""), _instead(action="pause"), _instead(details={"steps": {1, 2}})),
    "check_unlimited": (_that(_early),),
    "check_more_budget": (_that(_upside_down),),
    "check_probe_share": (replace(SPEC, build=_AlwaysProbes),),
    "check_cheap": (replace(SPEC, build=_KeepsEverything),),
}
