"""Methods whose declarations are false: identity, options and cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.spec import KINDS, MethodConfig, MethodSpec, Paper, Traits
from hf_eff.registry import get_method, list_methods
from hf_eff.testing.mutants import careless
from hf_eff.testing.toys import half, match

MATCH, HALF = match.SPEC, half.SPEC


class _LooseConfig(match.MatchConfig):
    __setattr__ = object.__setattr__


class _ForgetfulConfig(match.MatchConfig):
    def to_dict(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True, kw_only=True)
class _SilentConfig(MethodConfig):
    fraction: float = 0.5


@dataclass(frozen=True, kw_only=True)
class _BoundlessConfig(MethodConfig):
    count: int = field(default=1, metadata={"help": "Rows to keep.", "low": None, "high": None, "choices": None})


class _UncheckedConfig(match.MatchConfig):
    def _check(self, field: dataclasses.Field[Any], value: Any) -> None:
        return None


class _ForgivingConfig(match.MatchConfig):
    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> Any:
        known = {each.name for each in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in (values or {}).items() if name in known})


def _make_match(config: match.MatchConfig) -> match.Match:
    return match.Match(config)


def _costing(spec: MethodSpec, cost: Callable[[Any, Facts], Any]) -> MethodSpec:
    return replace(spec, cost=cost)


def _scaled(spec: MethodSpec, factor: float) -> MethodSpec:
    def cost(config: Any, facts: Facts) -> Cost:
        honest: Cost = spec.cost(config, facts)
        return replace(honest, flops=factor * honest.flops, step_flops=factor * honest.step_flops)

    return replace(spec, cost=cost)


def _crashing_on_streams(_config: Any, facts: Facts) -> Cost:
    return Cost(flops=2.0 * float(facts.pool.num_rows))  # type: ignore[arg-type]


def _without_optimizer(config: Any, facts: Facts) -> Cost:
    honest = half.cost(config, facts)
    return replace(honest, bytes={**honest.bytes, "optimizer": 0.0})


class _OverstatedSteps(half.Half):
    def step_flops(self, *arguments: Any) -> float:
        return 10.0 * super().step_flops(*arguments)


def _built_in_with_other_summary() -> MethodSpec:
    kind = next(kind for kind in KINDS if list_methods(kind))
    spec = get_method(kind, list_methods(kind)[0])
    return replace(spec, summary="a summary that the card does not have.")


MUTANTS: Mapping[str, tuple[MethodSpec, ...]] = {
    "check_address": (replace(MATCH, name="other"), replace(MATCH, build=_make_match)),
    "check_head": (careless.SPEC,),
    "check_summary": (replace(MATCH, summary=""), replace(MATCH, summary="two\nlines")),
    "check_paper": (replace(MATCH, traits=Traits()),),
    "check_citation": (
        replace(MATCH, paper=Paper(title="A title", year=2024, arxiv="24.1")),
        replace(MATCH, paper=Paper(title="A title", year=2020, arxiv="2402.04333")),
        replace(MATCH, paper=Paper(title="A title", year=2020)),
    ),
    "check_imports": (careless.SPEC,),
    "check_card": (_built_in_with_other_summary(),),
    "check_default_constructible": (replace(MATCH, build=lambda _config: None),),
    "check_frozen": (replace(MATCH, config=_LooseConfig),),
    "check_json_round_trip": (replace(MATCH, config=_ForgetfulConfig),),
    "check_documented": (replace(MATCH, config=_SilentConfig), replace(MATCH, config=_BoundlessConfig, tiny={})),
    "check_bounds": (replace(MATCH, config=_UncheckedConfig),),
    "check_unknown_option": (replace(MATCH, config=_ForgivingConfig),),
    "check_cost_is_plain": (
        _costing(MATCH, lambda _config, _facts: Cost(flops=torch.tensor(1.0))),  # type: ignore[arg-type]
        _costing(MATCH, lambda _config, _facts: Cost(flops=-1.0)),
        _costing(MATCH, lambda _config, _facts: Cost(bytes={"nowhere": 1.0})),
    ),
    "check_cost_grows": (_costing(MATCH, lambda _config, facts: Cost(flops=1e9 / (facts.pool.num_rows or 1))),),
    "check_cost_of_unknown_size": (_costing(MATCH, _crashing_on_streams),),
    "check_selection_flops": (_scaled(MATCH, 10.0), _scaled(MATCH, 0.1)),
    "check_step_flops": (_scaled(HALF, 10.0), _scaled(HALF, 0.1), replace(HALF, build=_OverstatedSteps)),
    "check_held_bytes": (_costing(HALF, _without_optimizer),),
}
