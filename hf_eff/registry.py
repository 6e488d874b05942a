"""Name to SPEC. Built-ins are found by listing a folder, third parties by entry point.

Listing names and summaries imports no method; a SPEC is imported when it is asked for.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.metadata
from pathlib import Path
from typing import Any

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.spec import KINDS, MethodConfig, MethodSpec
from hf_eff.errors import OptionError, UnknownMethodError

_ROOT = Path(__file__).parent
_registered: dict[tuple[str, str], MethodSpec] = {}


def list_methods(kind: str | None = None) -> list[str]:
    """Names of the registered methods of one kind, sorted; of all kinds without one.

    Raises:
        UnknownMethodError: ``kind`` is not selection, memory or governor.

    >>> "badam" in list_methods("memory")
    True
    """
    kinds = KINDS if kind is None else (_checked(kind),)
    return sorted({name for each in kinds for name in _names(each)})


def summaries(kind: str) -> dict[str, str]:
    """One line a method, read from the head of its file without importing it."""
    lines = {}
    for name in list_methods(kind):
        if (kind, name) in _registered:
            lines[name] = _registered[kind, name].summary
        else:
            lines[name] = _head(kind, name)
    return lines


def get_method(kind: str, name: str) -> MethodSpec:
    """The SPEC behind ``kind=name``.

    Raises:
        UnknownMethodError: The kind or the name is not registered; the message names the nearest.
        OptionError: A plugin's SPEC does not match the name it is registered under.
    """
    _checked(kind)
    if (kind, name) in _registered:
        return _registered[kind, name]
    if name in _builtin_names(kind):
        spec = importlib.import_module(f"hf_eff.{kind}.{name}").SPEC
    elif name in (points := _entry_points(kind)):
        spec = points[name].load()
    elif kind == "selection" and (name.startswith("hub:") or ("/" in name and Path(name).is_dir())):
        spec = importlib.import_module("hf_eff.stages.published").published_spec(name)
    else:
        raise UnknownMethodError(_unknown(kind, name))
    if not isinstance(spec, MethodSpec) or (spec.kind, spec.name) != (kind, name):
        raise OptionError(f"{kind}={name!r} does not lead to a MethodSpec of that kind and name; got {spec!r}.")
    return spec


def resolve(kind: str, names: str) -> list[MethodSpec]:
    """SPECs of a composition such as ``"lora+badam"``, in the order given."""
    parts = [part.strip() for part in names.split("+")]
    if not all(parts):
        raise UnknownMethodError(f"{kind}={names!r} has an empty part; write names joined by '+'.")
    return [get_method(kind, part) for part in parts]


def register_method(spec: MethodSpec | None = None, *, replace: bool = False, **facts: Any) -> Any:
    """Register a method for this process: a SPEC, or as a decorator the class below it.

    The decorator takes the fields of ``MethodSpec`` but ``build``, which is the class itself, called
    with its options; ``config`` and ``cost`` may be left out::

        @register_method(kind="selection", name="shortest", slot="pool", summary="Short rows first.")
        class Shortest:
            def __init__(self, config): ...
            def select(self, context): ...

    Args:
        spec: What to register; None to use as a decorator.
        replace: Whether a taken name is replaced.
        facts: Fields of the SPEC, for the decorator.

    Returns:
        The SPEC, or the decorator, which returns the class unchanged.

    Raises:
        OptionError: The name is taken and ``replace`` is false, or a SPEC contradicts itself.
    """
    if spec is not None:
        if not replace and spec.name in _names(spec.kind):
            raise OptionError(
                f"{spec.address} is already registered at {origin(spec.kind, spec.name)}; pass replace=True."
            )
        _registered[spec.kind, spec.name] = spec
        return spec

    def decorate(method: type) -> type:
        defaults: dict[str, Any] = {"config": MethodConfig, "cost": _costs_nothing, "status": "experimental"}
        register_method(MethodSpec(**{**defaults, **facts, "build": method}), replace=replace)
        return method

    return decorate


def _costs_nothing(_config: MethodConfig, _facts: Facts) -> Cost:
    """Stands in where a method registered in passing says nothing about its cost."""
    return Cost()


def unregister_method(kind: str, name: str) -> None:
    """Remove what ``register_method`` added; built-ins and plugins stay."""
    _registered.pop((kind, name), None)


def origin(kind: str, name: str) -> str:
    """Where a method comes from: a file, an entry point or this process."""
    if (kind, name) in _registered:
        return "this process (register_method)"
    if name in _builtin_names(kind):
        return str(_ROOT / kind / f"{name}.py")
    return str(_entry_points(kind).get(name, "nowhere"))


def method_card(kind: str, name: str) -> str:
    """Markdown card of a method: its committed page, else one rendered from the SPEC."""
    spec = get_method(kind, name)
    page = _ROOT / "model_cards" / kind / f"{name}.md"
    for folder in (page, _ROOT.parent / "model_cards" / kind / f"{name}.md"):
        if (kind, name) not in _registered and folder.is_file():
            return folder.read_text(encoding="utf-8")
    from hf_eff.report.card import render_head

    return render_head(spec)


def _checked(kind: str) -> str:
    if kind not in KINDS:
        near = difflib.get_close_matches(str(kind), KINDS, n=1)
        raise UnknownMethodError(
            f"Method kind {kind!r} does not exist.{f' Did you mean {near[0]!r}?' if near else ''} Kinds: {list(KINDS)}."
        )
    return kind


def _builtin_names(kind: str) -> list[str]:
    return [path.stem for path in (_ROOT / kind).glob("*.py") if not path.stem.startswith("_")]


def _entry_points(kind: str) -> dict[str, importlib.metadata.EntryPoint]:
    points: dict[str, importlib.metadata.EntryPoint] = {}
    for point in importlib.metadata.entry_points(group=f"hf_eff.{kind}"):
        if point.name in points and points[point.name].value != point.value:
            raise OptionError(
                f"{kind}={point.name!r} is offered by two packages: {points[point.name].value} and {point.value}. "
                "Uninstall one."
            )
        points[point.name] = point
    return points


def _names(kind: str) -> list[str]:
    here = [name for each, name in _registered if each == kind]
    return sorted({*_builtin_names(kind), *_entry_points(kind), *here})


def _unknown(kind: str, name: str) -> str:
    names = _names(kind)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{kind}={name!r} is not registered.{hint} Available: {names}."


def _head(kind: str, name: str) -> str:
    path = _ROOT / kind / f"{name}.py"
    if not path.is_file():
        return f"from {origin(kind, name)}"
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = text.splitlines()[0] if text else ""
    return first.partition(": ")[2] or first


def build(spec: MethodSpec, options: dict[str, Any] | None) -> Any:
    """Make the method from plain options.

    Raises:
        OptionError: An option is unknown or outside its bounds.
        MissingDependencyError: A package the method needs is not installed.
    """
    require(spec)
    return spec.build(spec.config.from_dict(options))


def require(spec: MethodSpec) -> None:
    """Fail early, with the install line, when an optional package is missing."""
    from importlib.util import find_spec

    from hf_eff.errors import MissingDependencyError

    for package, extra in spec.requires.items():
        if find_spec(package) is None:
            raise MissingDependencyError(
                f"{spec.address} needs the package {package!r}; install it with: pip install 'hf_eff[{extra}]'"
            )
