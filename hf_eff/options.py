"""The fields a user sets, typed and resolved to methods. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from hf_eff import registry
from hf_eff.contracts.budget import Budget
from hf_eff.contracts.spec import Kind, MethodConfig, MethodSpec, knob
from hf_eff.errors import OptionError, PlanError

GOVERNOR_MODES = ("act", "advise", "observe")
OUT_OF_MEMORY = ("adapt", "exact", "raise")


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
        power_watts: Power of the machine under full load, for an estimate of its energy where no counter can be read.
        out_of_memory: What happens when memory runs out: ``"adapt"`` tries the rungs that the plan lists, ``"exact"``
            only those that leave the result as it is, ``"raise"`` none. None is ``"adapt"``, once anything else is set.
        selection_kwargs, memory_kwargs, governor_kwargs: Options of the methods.
    """

    selection: str = "all"
    memory: str = "full"
    governor: str | None = None
    budget: str | None = None
    governor_mode: str = "act"
    price_per_hour: float | None = None
    power_watts: float | None = None
    out_of_memory: str | None = None
    selection_kwargs: Mapping[str, Any] = field(default_factory=dict)
    memory_kwargs: Mapping[str, Any] = field(default_factory=dict)
    governor_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_neutral(self) -> bool:
        """Whether nothing is asked for, so that the parent trainer runs untouched."""
        methods = (self.selection, self.memory, self.governor or "none")
        return methods == ("all", "full", "none") and not self.budget and self.out_of_memory is None


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


@dataclass(frozen=True, kw_only=True)
class PoolOptions(MethodConfig):
    """Options of every selection before training, whatever its method."""

    pipeline: tuple[Any, ...] = knob(
        (), "Methods that narrow the pool before, in order: names, or {name: {option: value}}."
    )
    proxy_model: str | None = knob(
        None, "Smaller model with the same tokenizer, for methods that can score with one: folder or Hub id."
    )
    verify: float | None = knob(
        None, "Share of the rows that a proxy scored to score again with the model itself.", low=0.0, high=1.0
    )
    max_selection_fraction: float | None = knob(
        None,
        "Most that selection may take of all FLOPs; where it would take more, rows are drawn at random instead.",
        low=0.0,
        high=1.0,
    )
    stream_rows: int | None = knob(None, "Rows to read of a stream before choosing; None: all.", low=1, unit="rows")
    expected_speedup: float = knob(
        1.5, "How much faster than random rows the chosen ones are expected to teach, for the pay-back.", low=1.0
    )


@dataclass(frozen=True)
class ResolvedOptions:
    """Options with every name looked up and every value checked.

    Attributes:
        options: What was given.
        selection: Selection methods, one a slot.
        memory: Memory methods, one a slot.
        governor: The governor.
        budget: The limits.
        stages: Methods that narrow the pool before the selection method does, in order.
        pool: Options of the selection before training.
    """

    options: EffOptions
    selection: tuple[Chosen, ...]
    memory: tuple[Chosen, ...]
    governor: Chosen
    budget: Budget
    stages: tuple[Chosen, ...] = ()
    pool: PoolOptions = field(default_factory=PoolOptions)

    @property
    def methods(self) -> tuple[Chosen, ...]:
        """All methods: selection with its earlier stages, memory, governor."""
        return (*self.stages, *self.selection, *self.memory, self.governor)

    @property
    def pool_stages(self) -> tuple[Chosen, ...]:
        """What narrows the pool before training, in order; empty when every row is trained on."""
        return (*self.stages, *(chosen for chosen in self.selection if chosen.spec.slot == "pool"))

    @property
    def selects(self) -> bool:
        """Whether the pool is narrowed before training."""
        return self.options.selection != "all" or bool(self.stages)


def resolve_options(options: EffOptions) -> ResolvedOptions:
    """Look up methods and check options; two methods in one slot are refused.

    Raises:
        UnknownMethodError: A name is not registered.
        OptionError: An option or the budget is malformed.
        PlanError: Two methods fill the same slot.
    """
    if options.governor_mode not in GOVERNOR_MODES:
        raise OptionError(f"governor_mode must be one of {list(GOVERNOR_MODES)}, got {options.governor_mode!r}.")
    if options.out_of_memory not in (None, *OUT_OF_MEMORY):
        raise OptionError(f"out_of_memory must be one of {list(OUT_OF_MEMORY)}, got {options.out_of_memory!r}.")
    budget = Budget.parse(options.budget)
    if "usd" in budget.limits and options.price_per_hour is None:
        raise OptionError("budget in usd needs price_per_hour=..., the price of the machine in USD per hour.")
    if options.power_watts is not None and not 0 < options.power_watts < math.inf:
        raise OptionError(f"power_watts must be a positive number of watts, got {options.power_watts!r}.")
    governor = options.governor or ("budget" if budget else "none")
    if governor == "budget" and not budget:
        raise OptionError("governor='budget' needs budget='...', for example budget='2h' or budget='3e15flop'.")
    governors = choose("governor", governor, options.governor_kwargs)
    selection, stages, pool = choose_selection(options.selection, options.selection_kwargs)
    return ResolvedOptions(
        options=options,
        selection=selection,
        memory=choose("memory", options.memory, options.memory_kwargs),
        governor=governors[0],
        budget=budget,
        stages=stages,
        pool=pool,
    )


def choose_selection(
    names: str, kwargs: Mapping[str, Any] | str | None
) -> tuple[tuple[Chosen, ...], tuple[Chosen, ...], PoolOptions]:
    """Resolve selection methods, the stages before them and the options that all of them share.

    Returns:
        selection: One method a slot.
        stages: Methods of ``pipeline``, in order.
        pool: The shared options.

    Raises:
        UnknownMethodError: A name is not registered.
        OptionError: An option belongs to no method, or a stage is malformed.
        PlanError: Two methods of ``names`` fill the same slot, a stage does not narrow a pool, or a proxy has no use.
    """
    given = _as_mapping("selection", kwargs)
    shared = {item.name: given.pop(item.name) for item in fields(PoolOptions) if item.name in given}
    pool = PoolOptions.from_dict(shared)
    chosen, stages = choose("selection", names, given), tuple(_stage(entry) for entry in pool.pipeline)
    _refuse_idle_proxy(pool, chosen, stages)
    return chosen, stages, pool


def _refuse_idle_proxy(pool: PoolOptions, chosen: tuple[Chosen, ...], stages: tuple[Chosen, ...]) -> None:
    """Refuse a proxy that nothing scores with, and a check of a proxy that there is not."""
    names = [each.spec.name for each in (*stages, *chosen)]
    if pool.proxy_model is not None and not any(each.spec.traits.uses_proxy for each in (*stages, *chosen)):
        raise PlanError(f"proxy_model={pool.proxy_model!r} would score nothing: none of {names} scores with a proxy.")
    last = next((each for each in chosen if each.spec.slot == "pool"), None)
    if pool.verify is not None and (pool.proxy_model is None or last is None or not last.spec.traits.uses_proxy):
        raise PlanError(
            f"verify={pool.verify} compares a proxy with the model: give proxy_model= and a method that scores with "
            f"one; here are proxy_model={pool.proxy_model!r} and {names}."
        )


def _stage(entry: Any) -> Chosen:
    """A method of the pipeline, from its name or from ``{name: options}``."""
    options: Mapping[str, Any] = {}
    if isinstance(entry, str):
        name = entry
    elif isinstance(entry, Mapping) and len(entry) == 1:
        name, options = next(iter(entry.items()))
    else:
        raise OptionError(f"a stage of pipeline is a name or {{name: options}}, got {entry!r}.")
    chosen = choose("selection", name, options)
    if len(chosen) != 1 or chosen[0].spec.slot != "pool":
        raise PlanError(f"pipeline={name!r} does not narrow a pool; a stage is one method of the slot 'pool'.")
    return chosen[0]


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
