"""The facts a method declares about itself: ``SPEC`` in its file, read by plan, cards and tests."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hf_eff.errors import OptionError

if TYPE_CHECKING:
    from typing_extensions import Self

Kind = Literal["selection", "memory", "governor"]
KINDS: tuple[Kind, ...] = ("selection", "memory", "governor")
SLOTS: Mapping[str, tuple[str, ...]] = {
    "selection": ("pool", "batch", "order"),
    # In the order in which they wrap each other, outermost first. The three kinds of activations are the factors
    # of what a step keeps: rows at a time, values a layer keeps, values the loss keeps.
    "memory": ("weights", "activations.rows", "activations.layers", "activations.loss", "update"),
    "governor": ("policy",),
}


def knob(
    default: Any,
    help: str,  # noqa: A002 - the word HfArgumentParser and argparse use
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[Any, ...] | None = None,
    unit: str | None = None,
    paper: str | None = None,
) -> Any:
    """Declare one option of a method: its default, help, bounds, unit and the paper's own value.

    The one declaration feeds validation, ``--help``, the method card and the manifest. Bounds are
    inclusive. ``None`` passes the bounds when the annotation allows it.
    """
    metadata = {"help": help, "low": low, "high": high, "choices": choices, "unit": unit, "paper": paper}
    if isinstance(default, (list, dict, set)):
        raise TypeError(f"knob default {default!r} is mutable; use a tuple or None")
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Options of one method. Subclasses are frozen dataclasses whose fields are all ``knob()``.

    Raises:
        OptionError: A value has the wrong type or lies outside its bounds or choices.
    """

    def __post_init__(self) -> None:
        """Coerce strings that YAML leaves behind (``'1e-3'``) and check bounds and choices."""
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = _coerce(getattr(self, field.name), hints[field.name], self._address(field.name))
            object.__setattr__(self, field.name, value)
            self._check(field, value)

    def _address(self, name: str) -> str:
        return f"{type(self).__name__}.{name}"

    def _check(self, field: dataclasses.Field[Any], value: Any) -> None:
        if value is None:
            return
        meta, where = field.metadata, self._address(field.name)
        if meta.get("choices") is not None and value not in meta["choices"]:
            raise OptionError(f"{where} must be one of {list(meta['choices'])}, got {value!r}.")
        low, high = meta.get("low"), meta.get("high")
        too_low = low is not None and not value >= low
        too_high = high is not None and not value <= high
        if too_low or too_high:
            bounds = f"[{'-inf' if low is None else low}, {'inf' if high is None else high}]"
            raise OptionError(f"{where} must be in {bounds}, got {value!r}.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> Self:
        """Build from a plain mapping, naming the nearest option for an unknown key."""
        known = {field.name for field in dataclasses.fields(cls)}
        for key in values or {}:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise OptionError(f"{cls.__name__} has no option {key!r}.{hint} Options: {sorted(known)}.")
        return cls(**dict(values or {}))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able mapping of every option."""
        return {
            field.name: list(value) if isinstance(value := getattr(self, field.name), tuple) else value
            for field in dataclasses.fields(self)
        }


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """Turn a value read from YAML, JSON or a shell into the annotated plain type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(value, args, where)
    if origin is Literal:
        return value
    if origin is tuple:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if not isinstance(value, (list, tuple)):
            raise OptionError(f"{where} must be a list, got {value!r}.")
        return tuple(_coerce(item, args[0], where) for item in value)
    return _coerce_scalar(value, hint, where)


def _coerce_union(value: Any, args: tuple[Any, ...], where: str) -> Any:
    if value is None and type(None) in args:
        return None
    rest = [arg for arg in args if arg is not type(None)]
    for arg in rest:
        if isinstance(arg, type) and type(value) is arg:
            return value
    for arg in rest:
        try:
            return _coerce(value, arg, where)
        except OptionError:
            continue
    raise OptionError(f"{where} must be {' or '.join(getattr(a, '__name__', str(a)) for a in rest)}, got {value!r}.")


def _coerce_scalar(value: Any, hint: Any, where: str) -> Any:
    problem = OptionError(f"{where} must be {getattr(hint, '__name__', hint)}, got {value!r}.")
    if hint is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        raise problem
    if hint in (int, float):
        if isinstance(value, bool):
            raise problem
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise problem from None
        if number != number or (hint is int and number != int(number)):
            raise problem
        return int(value) if hint is int and isinstance(value, int) else hint(number)
    if hint is str and not isinstance(value, str):
        raise problem
    return value


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Where a method comes from. ``arxiv`` is the bare identifier, such as ``"2404.02827"``."""

    title: str
    year: int
    arxiv: str | None = None
    url: str | None = None

    @property
    def link(self) -> str:
        """Address of the paper."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else (self.url or "")


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What a method needs and what it works with; the plan refuses the rest by name.

    Every flag is a promise that the conformance suite holds the method to.
    """

    baseline: bool = False
    """No paper of its own; exists for comparison."""
    deterministic: bool = True
    """The result depends on options and data only, not on the seed."""
    needs_model: bool = False
    """Selection: scores with a model."""
    uses_proxy: bool = False
    """Selection: scores the whole pool with a smaller model where one is given."""
    needs_reference_set: bool = False
    """Selection or governor: needs ``eval_dataset`` as target."""
    needs_causal_lm: bool = False
    """Works only on decoder-only language models."""
    needs_backward: bool = True
    """Memory: the training step differentiates (false for zeroth-order)."""
    needs_accelerator: bool = False
    """Memory: has no use, and is refused, where the model trains on a CPU."""
    needs_blocks: bool = False
    """Memory: needs a stack of at least two alike layers."""
    owns_backward: bool = False
    """Memory: replaces the training step's backward; gradient clipping and fp16 scaling do not apply."""
    owns_optimizer: bool = False
    """Memory: replaces the optimizer named by ``optim``."""
    stateless_optimizer: bool = False
    """Memory: its optimizer keeps no per-parameter state."""
    ddp: bool = True
    fsdp2: bool = False
    grad_accum: bool = True
    fp16: bool = True
    peft: bool = True
    """Works when the model already is a PEFT model."""
    quantized: bool = True
    """Works when base weights are quantised."""
    packing: bool = True
    streaming: bool = False
    """Selection: works with an ``IterableDataset`` of unknown length."""
    freezes_parameters: bool = False
    """Memory: toggles ``requires_grad`` while training, so DDP must expect unused parameters."""
    dropout_off: bool = False
    """Memory: its training forward runs in eval mode."""
    max_grad_norm: bool = True
    """Honours ``max_grad_norm`` as a global gradient norm."""


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """One registered method: a value in the method's own file.

    Attributes:
        name: The string users type; equals the file's name.
        kind: ``"selection"``, ``"memory"`` or ``"governor"``.
        slot: The one part of its kind it fills; methods of different slots compose with ``+``.
        summary: One line.
        config: Its options class.
        build: Called as ``build(config)``; returns the object its contract describes.
        cost: Called as ``cost(config, facts) -> Cost``: pure, no device, no torch objects.
        adapt: Called as ``adapt(config, facts) -> Facts``: the facts once this method is applied,
            for methods that change the model (adapters) under another method; None for no change.
        paper: Source, or None for a baseline.
        traits: What it needs and works with.
        tiny: Option values that suit a toy model in tests.
        status: ``"stable"`` or ``"experimental"``.
        requires: Import names of optional packages, mapped to the extra that installs them.
        known_failures: Pairs (conformance check, reason); run as strict expected failures.
    """

    name: str
    kind: Kind
    slot: str
    summary: str
    config: type[MethodConfig]
    build: Callable[[Any], Any]
    cost: Callable[[Any, Any], Any]
    adapt: Callable[[Any, Any], Any] | None = None
    paper: Paper | None = None
    traits: Traits = Traits()
    tiny: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    status: Literal["stable", "experimental"] = "stable"
    requires: Mapping[str, str] = dataclasses.field(default_factory=dict)
    known_failures: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        """Refuse a SPEC that contradicts itself.

        Raises:
            OptionError: The kind or slot does not exist.
        """
        if self.kind not in KINDS:
            raise OptionError(f"SPEC of {self.name!r}: kind must be one of {list(KINDS)}, got {self.kind!r}.")
        if self.slot not in SLOTS[self.kind]:
            raise OptionError(
                f"SPEC of {self.kind}={self.name!r}: slot must be one of {list(SLOTS[self.kind])}, got {self.slot!r}."
            )

    @property
    def address(self) -> str:
        """What the user typed, such as ``memory='badam'``."""
        return f"{self.kind}={self.name!r}"
