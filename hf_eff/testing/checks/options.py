"""Options are declared once, documented, bounded, frozen, and survive JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Iterator
from typing import Any

from hf_eff.contracts.spec import MethodConfig, MethodSpec
from hf_eff.errors import OptionError
from hf_eff.testing.check import Check, CheckFailedError, expect


def _fields(spec: MethodSpec) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(spec.config)


def _has_options(spec: MethodSpec) -> bool:
    return bool(_fields(spec))


def _configs(spec: MethodSpec) -> Iterator[MethodConfig]:
    yield spec.config()
    yield spec.config.from_dict(dict(spec.tiny))


def check_default_constructible(spec: MethodSpec) -> None:
    """Defaults and the toy settings are valid, and the method builds from both without work."""
    for config in _configs(spec):
        expect(isinstance(config, MethodConfig), f"{spec.config.__name__} is no MethodConfig.")
        expect(spec.build(config) is not None, f"build of {spec.address} returned None.")


def check_frozen(spec: MethodSpec) -> None:
    """Options cannot be changed after construction nor passed by position."""
    config = spec.config()
    for field in _fields(spec):
        expect(field.kw_only, f"{spec.config.__name__}.{field.name} is not keyword-only.")
    try:
        setattr(config, _fields(spec)[0].name, None)
    except dataclasses.FrozenInstanceError:
        return
    raise CheckFailedError(f"{spec.config.__name__} is not frozen.")


def check_json_round_trip(spec: MethodSpec) -> None:
    """Options written as JSON and read back are equal, also when numbers come back as text."""
    for config in _configs(spec):
        again = spec.config.from_dict(json.loads(json.dumps(config.to_dict())))
        expect(again == config, f"{config} came back from JSON as {again}.")
        texts = {
            name: str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
            for name, value in config.to_dict().items()
        }
        expect(spec.config.from_dict(texts) == config, f"{spec.config.__name__} does not read numbers given as text.")


def check_documented(spec: MethodSpec) -> None:
    """Every option has help, and every number has a bound."""
    for field in _fields(spec):
        where = f"{spec.config.__name__}.{field.name}"
        expect("help" in field.metadata, f"{where} is not declared with knob().")
        expect(len(str(field.metadata["help"]).strip()) >= 8, f"{where} has no help.")
        bounds = (field.metadata["low"], field.metadata["high"], field.metadata["choices"])
        if _number_types(spec, field.name):
            expect(any(bound is not None for bound in bounds), f"{where} is a number without any bound.")


def _number_types(spec: MethodSpec, name: str) -> list[type]:
    hint = typing.get_type_hints(spec.config)[name]
    return [kind for kind in (typing.get_args(hint) or (hint,)) if kind in (int, float)]


def check_bounds(spec: MethodSpec) -> None:
    """A value just outside a bound is refused by an error that names the option."""
    for field in _fields(spec):
        for value in _outside(spec, field):
            where = f"{spec.config.__name__}.{field.name}"
            try:
                spec.config.from_dict({**spec.tiny, field.name: value})
            except OptionError as error:
                expect(field.name in str(error), f"refusing {where}={value!r}, the error does not name it: {error}")
            else:
                raise CheckFailedError(f"{where}={value!r} lies outside its bounds and was accepted.")


def _outside(spec: MethodSpec, field: dataclasses.Field[Any]) -> Iterator[Any]:
    low, high, choices = (field.metadata.get(word) for word in ("low", "high", "choices"))
    whole = int in _number_types(spec, field.name)
    if low is not None:
        yield low - 1 if whole else math.nextafter(low, -math.inf)
    if high is not None:
        yield high + 1 if whole else math.nextafter(high, math.inf)
    if choices is not None:
        yield "none of these"


def check_unknown_option(spec: MethodSpec) -> None:
    """An unknown option is refused, and a near miss is told the right name."""
    wrong = _fields(spec)[0].name + "z"
    try:
        spec.config.from_dict({wrong: 1})
    except OptionError as error:
        expect("Did you mean" in str(error), f"{wrong!r} drew no suggestion: {error}")
    else:
        raise CheckFailedError(f"{spec.config.__name__} accepted the unknown option {wrong!r}.")


CHECKS = (
    Check(check_default_constructible),
    Check(check_frozen, when=_has_options),
    Check(check_json_round_trip),
    Check(check_documented, when=_has_options),
    Check(check_bounds, when=_has_options),
    Check(check_unknown_option, when=_has_options),
)
