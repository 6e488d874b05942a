"""Hugging Face style doors to the registry: a name and options in, a built method out.

``from_pretrained`` reads JSON that names a registered method and its options. It never runs code
that came with the file.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from hf_eff import hub, registry
from hf_eff.contracts.spec import Kind, MethodSpec
from hf_eff.errors import OptionError, UnknownMethodError
from hf_eff.files import write_json

FILE = "hf_eff_method.json"
_KEYS = {"kind", "name", "options", "format_version"}
_VERSION = 1
_MAX_BYTES = 256 * 2**10


class _AutoMethod:
    """Common to the three doors."""

    kind: ClassVar[Kind]

    def __init__(self) -> None:
        raise TypeError(f"{type(self).__name__} is not instantiated; call {type(self).__name__}.from_name('...').")

    @classmethod
    def from_name(cls, name: str, **options: Any) -> Any:
        """Build a method.

        Args:
            name: Registered name, such as ``"less"``.
            **options: Its options; the others take their defaults.

        Raises:
            UnknownMethodError: The name is not registered.
            OptionError: An option is unknown or outside its bounds.
            MissingDependencyError: A package the method needs is not installed.
        """
        return registry.build(registry.get_method(cls.kind, name), options)

    @classmethod
    def list(cls) -> list[str]:
        """Registered names, sorted."""
        return registry.list_methods(cls.kind)

    @classmethod
    def register(cls, spec: MethodSpec, *, replace: bool = False) -> MethodSpec:
        """Register a method for this process.

        Raises:
            OptionError: The SPEC is of another kind, or its name is taken and ``replace`` is false.
        """
        if spec.kind != cls.kind:
            raise OptionError(f"{cls.__name__} registers {cls.kind} methods, got {spec.address}.")
        return registry.register_method(spec, replace=replace)

    @classmethod
    def save_pretrained(cls, folder: str | Path, name: str, **options: Any) -> Path:
        """Write a name and its checked options for ``from_pretrained``.

        Returns:
            The file.

        Raises:
            UnknownMethodError: The name is not registered.
            OptionError: An option is unknown or outside its bounds.
        """
        config = registry.get_method(cls.kind, name).config.from_dict(options)
        path = Path(folder) / FILE
        write_json(path, {"format_version": _VERSION, "kind": cls.kind, "name": name, "options": config.to_dict()})
        return path

    @classmethod
    def push_to_hub(
        cls, repo_id: str, name: str, *, private: bool = True, token: str | None = None, **options: Any
    ) -> str:
        """Publish a name and its checked options, so that ``from_pretrained(repo_id)`` builds the same method.

        Args:
            repo_id: Model repository, such as ``"user/less-for-code"``; created when needed.
            name: Registered name. Others can build it where it is registered, too: no code is sent.
            private: Visibility of a repository that is created.
            token: Access token; None for the one that is logged in.
            **options: Options of the method.

        Returns:
            The commit's hash.

        Raises:
            UnknownMethodError: The name is not registered.
            OptionError: An option is unknown or outside its bounds.
        """
        with tempfile.TemporaryDirectory() as folder:
            cls.save_pretrained(folder, name, **options)
            return hub.push_folder(folder, repo_id, "model", f"Describe {cls.kind}={name}", token, private=private)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None, token: str | None = None) -> Any:
        """Build the method that a folder or a Hub repository describes.

        Args:
            source: Folder, or id of a model repository, that holds ``hf_eff_method.json``.
            revision: Branch, tag or commit of the repository.
            token: Access token; None for the one that is logged in.

        Raises:
            OptionError: The file is missing, malformed or of another kind.
            UnknownMethodError: The name is not registered here; nothing else is tried.
        """
        described = _read(source, revision, token)
        if described["kind"] != cls.kind:
            raise OptionError(
                f"{str(source)!r} describes a {described['kind']} method; {cls.__name__} needs {cls.kind}."
            )
        if described["name"] not in cls.list():  # an address would be fetched; a file may not ask for that
            raise UnknownMethodError(f"{str(source)!r} names {described['name']!r}, which is not registered here.")
        return registry.build(registry.get_method(cls.kind, described["name"]), described["options"])


class AutoSelector(_AutoMethod):
    """Door to the selection methods.

    >>> "random" in AutoSelector.list()
    True
    """

    kind = "selection"


class AutoMemoryStrategy(_AutoMethod):
    """Door to the memory methods.

    >>> "badam" in AutoMemoryStrategy.list()
    True
    """

    kind = "memory"


class AutoGovernor(_AutoMethod):
    """Door to the governors.

    >>> "budget" in AutoGovernor.list()
    True
    """

    kind = "governor"


def _read(source: str | Path, revision: str | None, token: str | None) -> dict[str, Any]:
    if Path(source).is_dir():
        return _parse(Path(source) / FILE)
    with tempfile.TemporaryDirectory() as folder:
        hub.pull_folder(str(source), folder, "model", patterns=[FILE], revision=revision, token=token)
        return _parse(Path(folder) / FILE)


def _parse(path: Path) -> dict[str, Any]:
    """Plain data only: a mapping with exactly the known keys and JSON options."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError:
        raise OptionError(f"no {FILE} was found; save_pretrained writes one.") from None
    if len(content) > _MAX_BYTES:
        raise OptionError(f"{FILE} is larger than a description may be ({_MAX_BYTES // 2**10} KiB).")
    try:
        values = json.loads(content, object_pairs_hook=_distinct_keys)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{FILE} is not JSON ({error}).") from None
    if not isinstance(values, dict) or set(values) != _KEYS or values["format_version"] != _VERSION:
        raise OptionError(f"{FILE} must hold exactly {sorted(_KEYS)} with format_version {_VERSION}.")
    if not isinstance(values["name"], str) or not isinstance(values["options"], dict):
        raise OptionError(f"{FILE}: 'name' must be a string and 'options' a mapping.")
    return values


def _distinct_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is repeated")
    return result
