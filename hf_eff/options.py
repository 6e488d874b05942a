"""The fields a user sets, typed and resolved to methods. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hf_eff import registry
from hf_eff.contracts.budget import Budget
from hf_eff.contracts.spec import Kind, MethodConfig, MethodSpec
from hf_eff.errors import OptionError, PlanError

GOVERNOR_MODES = ("act", "advise", "observe")


@dataclass(frozen=True, kw_only=True)
class EffOptions:
    """What ``BudgetedTrainingArguments`` adds to ``TrainingArguments``.

    Attributes:
        selection: Name of a selection method, or names joined by ``+``.
        memory: Name of a memory method, or names joined by ``+``.
        governor: Name of a governor; None means ``"budget"`` with a budget and ``"none"`` without.
        budget: Limits such as ``"2h, 3e15flop"``.
        governor_mode: ``"act"``, ``"advise"`` (say what it would do) or ``"observe"`` (log only).
        price_per_hour: Price of the machine in USD, for budgets in ``usd``.
        selection_kwargs, memory_kwargs, governor_kwargs: Options of the methods.
    """

    selection: str = "all"
    memory: str = "full"
    governor: str | None = None
    budget: str | None = None
    governor_mode: str = "act"
    price_per_hour: float | None = None
    selection_kwargs: Mapping[str, Any] = field(default_factory=dict)
    memory_kwargs: Mapping[str, Any] = field(default_factory=dict)
    governor_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_neutral(self) -> bool:
        """Whether nothing is asked for, so that the parent trainer runs untouched."""
        return (self.selection, self.memory, self.governor or "none") == ("all", "full", "none") and not self.budget


@dataclass(frozen=True)
class Chosen:
    """One method with its checked options."""

    spec: MethodSpec
    config: MethodConfig

    def build(self) -> Any:
        """Make the method.

        Raises:
            MissingDependencyError: A package it needs is not installed.
        """
        registry.require(self.spec)
        return self.spec.build(self.config)


@dataclass(frozen=True)
class ResolvedOptions:
    """Options with every name looked up and every value checked."""

    options: EffOptions
    selection: tuple[Chosen, ...]
    memory: tuple[Chosen, ...]
    governor: Chosen
    budget: Budget

    @property
    def methods(self) -> tuple[Chosen, ...]:
        """All methods: selection, memory, governor."""
        return (*self.selection, *self.memory, self.governor)

    @property
    def selects(self) -> bool:
        """Whether the pool is narrowed before training."""
        return self.options.selection != "all"


def resolve_options(options: EffOptions) -> ResolvedOptions:
    """Look up methods and check options; two methods in one slot are refused.

    Raises:
        UnknownMethodError: A name is not registered.
        OptionError: An option or the budget is malformed.
        PlanError: Two methods fill the same slot.
    """
    if options.governor_mode not in GOVERNOR_MODES:
        raise OptionError(f"governor_mode must be one of {list(GOVERNOR_MODES)}, got {options.governor_mode!r}.")
    budget = Budget.parse(options.budget)
    if "usd" in budget.limits and options.price_per_hour is None:
        raise OptionError("budget in usd needs price_per_hour=..., the price of the machine in USD per hour.")
    governor = options.governor or ("budget" if budget else "none")
    if governor == "budget" and not budget:
        raise OptionError("governor='budget' needs budget='...', for example budget='2h' or budget='3e15flop'.")
    governors = choose("governor", governor, options.governor_kwargs)
    return ResolvedOptions(
        options=options,
        selection=choose("selection", options.selection, options.selection_kwargs),
        memory=choose("memory", options.memory, options.memory_kwargs),
        governor=governors[0],
        budget=budget,
    )


def choose(kind: Kind, names: str, kwargs: Mapping[str, Any] | str | None) -> tuple[Chosen, ...]:
    """Resolve ``"lora+badam"`` and split its options among the parts.

    Options are flat when each belongs to one part only, or nested under the part's name.

    Raises:
        UnknownMethodError: A name is not registered.
        OptionError: An option belongs to no part or to several.
        PlanError: Two parts fill the same slot.
    """
    specs = registry.resolve(kind, names)
    slots: dict[str, MethodSpec] = {}
    for spec in specs:
        if spec.slot in slots:
            raise PlanError(
                f"{kind}={names!r}: {slots[spec.slot].name!r} and {spec.name!r} both fill the slot {spec.slot!r}; "
                "keep one of them."
            )
        slots[spec.slot] = spec
    split = _split_options(kind, specs, _as_mapping(kind, kwargs))
    return tuple(Chosen(spec, spec.config.from_dict(split[spec.name])) for spec in specs)


def _as_mapping(kind: str, kwargs: Mapping[str, Any] | str | None) -> dict[str, Any]:
    if isinstance(kwargs, str):
        try:
            kwargs = json.loads(kwargs)
        except json.JSONDecodeError as error:
            raise OptionError(f"{kind}_kwargs={kwargs!r} is not JSON ({error.msg}).") from None
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise OptionError(f"{kind}_kwargs must be a mapping of option names to values, got {kwargs!r}.")
    return dict(kwargs or {})


def _split_options(kind: str, specs: list[MethodSpec], kwargs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    names = {spec.name for spec in specs}
    if len(specs) == 1 and not (set(kwargs) == names and isinstance(kwargs[specs[0].name], Mapping)):
        return {specs[0].name: kwargs}
    split: dict[str, dict[str, Any]] = {spec.name: {} for spec in specs}
    for key, value in kwargs.items():
        if key in names and isinstance(value, Mapping):
            split[key].update(value)
            continue
        owners = [spec.name for spec in specs if key in spec.config.__dataclass_fields__]
        if len(owners) != 1:
            problem = f"is an option of {' and '.join(owners)}" if owners else f"is no option of {sorted(names)}"
            raise OptionError(
                f"{kind}_kwargs: {key!r} {problem}; nest it under one name, as in {{{specs[0].name!r}: {{...}}}}."
            )
        split[owners[0]][key] = value
    return split


def with_default_memory(options: EffOptions, default: str) -> EffOptions:
    """Complete ``memory`` by a trainer's own default when nothing given fills that slot.

    ``"lora"`` on a trainer whose default is ``"mezo"`` becomes ``"lora+mezo"``.
    """
    if default == "full":
        return options
    wanted = registry.get_method("memory", default)
    given = registry.resolve("memory", options.memory)
    if any(spec.slot == wanted.slot for spec in given):
        return options
    names = [spec.name for spec in given if not spec.traits.baseline]
    return replace(options, memory="+".join([*names, default]))
