"""Recipes: named, versioned settings that can be shared, checked and run again.

A recipe holds fields of hf_eff, training arguments and, if it should, the model and the dataset they were found on.
It is plain YAML with a closed schema; reading one runs no code and opens no file that it names.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hf_eff import __version__, hub
from hf_eff.errors import EffWarning, OptionError
from hf_eff.files import write_text
from hf_eff.options import EffOptions, resolve_options
from hf_eff.recipe.card import may_replace_card, recipe_card
from hf_eff.recipe.schema import FORMAT, OPTIONS, TOP, TRAINING, VERSION, checked, without_refused
from hf_eff.recipe.text import MAX_BYTES, dump_yaml, read_yaml

if TYPE_CHECKING:
    from typing_extensions import Self

    from hf_eff.contracts.spec import MethodConfig, MethodSpec

__all__ = ["FOLDER", "ChangedDefaultWarning", "Recipe", "list_recipes", "spec_version"]

FOLDER = "recipes"
"""Where a repository keeps its recipes: one file each, named after the recipe."""
_SUFFIXES = (".yaml", ".yml")
_ABSENT = object()
_Kind = TypeVar("_Kind", bound="Recipe")
_ADDRESS = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(/(?P<name>[\w.-]+))?(@(?P<revision>[^@\s]+))?")


class ChangedDefaultWarning(EffWarning):
    """A recipe leaves an option at its default, and that default is another one now."""


@dataclass(frozen=True)
class Recipe:
    """One recipe. A value: two equal recipes ask for the same run.

    Attributes:
        name: Such as ``"badam-one-gpu"``: lower-case letters, digits, ``.``, ``_`` and ``-``.
        options: Fields of hf_eff, such as ``{"memory": "badam", "budget": "2h"}``.
        training: Training arguments that decide the result, such as ``{"learning_rate": 1e-5}``.
        run: What to train on what, by Hub ids; may be empty.
        version: Number of this recipe's edition.
        summary: What it is for, in a sentence.
        methods: For each method, its version and the defaults of its options when the recipe was written.
        made_with: Version of hf_eff that wrote it.

    Raises:
        OptionError: A field is unknown or forbidden, or a value has a wrong type.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)
    version: str = "1.0"
    summary: str = ""
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    made_with: str = __version__

    def __post_init__(self) -> None:
        """Check everything, whoever made it."""
        for key, value in checked({**vars(self), "format": FORMAT, "format_version": VERSION}).items():
            object.__setattr__(self, key, value)

    # Out of files and into them

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """A recipe from plain data.

        Raises:
            OptionError: The data is no recipe of this version.
        """
        return cls(**checked(values))

    def to_dict(self) -> dict[str, Any]:
        """Plain data in the order of the file; empty parts are left out."""
        head = {"format": FORMAT, "format_version": VERSION}
        parts = {key: getattr(self, key) for key in TOP if key not in head}
        return {**head, **{key: value for key, value in parts.items() if value}}

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a recipe file.

        Raises:
            OptionError: There is no such file, or it holds no recipe.
        """
        return cls.from_dict(read_yaml(Path(path)))

    def save(self, path: str | Path) -> Path:
        """Write the recipe.

        Args:
            path: A ``.yaml`` file; or a folder, which gets ``recipes/<name>.yaml``.

        Returns:
            The file.
        """
        target = Path(path)
        if target.suffix not in _SUFFIXES:
            target = target / FOLDER / f"{self.name}.yaml"
        write_text(target, dump_yaml(self.to_dict()))
        return target

    # Out of the Hub and into it

    @classmethod
    def from_pretrained(
        cls, source: str | Path, name: str | None = None, *, revision: str | None = None, token: str | None = None
    ) -> Self:
        """Read a recipe from a file, a folder or the Hub.

        Args:
            source: A file; a folder with ``recipes/``; or ``"user/repo[/name][@revision]"``, a model repository.
            name: Which recipe; may be left out where there is one.
            revision: Branch, tag or commit.
            token: Access token; None for the one that is logged in.

        Raises:
            OptionError: There is no such recipe, or it is not intact.
        """
        path = Path(source)
        if path.is_file() or path.suffix in _SUFFIXES:
            return cls.from_file(path)
        if path.is_dir():
            return _one_of(cls, path, name, str(source))
        match = _ADDRESS.fullmatch(str(source))
        if match is None:
            raise OptionError(
                f"recipe {str(source)!r} is neither a file nor a folder nor of the form 'user/repo[/name][@revision]'."
            )
        with tempfile.TemporaryDirectory() as folder:
            _pull(match["repo"], Path(folder), revision or match["revision"], token)
            return _one_of(cls, Path(folder), name or match["name"], match["repo"])

    def push_to_hub(self, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
        """Publish the recipe in one commit; other recipes of the repository stay.

        Args:
            repo_id: Model repository, such as ``"user/recipes"``; created when needed.
            private: Visibility of a repository that is created.
            token: Access token; None for the one that is logged in.

        Returns:
            The commit's hash.

        Raises:
            UnknownMethodError: A method of the recipe is not registered.
            OptionError: The methods do not take the recipe's options.
        """
        self.resolve()
        with tempfile.TemporaryDirectory() as folder:
            held, root = Path(folder) / "held", Path(folder) / "sent"
            if hub.exists(repo_id, "model", token):
                _pull(repo_id, held, None, token, "README.md")
            self.save(root)
            if may_replace_card(held / "README.md"):
                recipes = {each.name: each for each in (*_all_of(Recipe, held), self)}
                write_text(root / "README.md", recipe_card(repo_id, [each.to_dict() for each in recipes.values()]))
            title = f"Add recipe {self.name} {self.version}"
            return hub.push_folder(root, repo_id, "model", title, token, private=private)

    # Into a run

    def resolve(self) -> None:
        """Look up the methods and check their options; say which defaults are no longer those of the recipe.

        Raises:
            UnknownMethodError: A method is not registered here.
            OptionError: An option is unknown or outside its bounds.
            PlanError: Two methods fill the same slot.
        """
        resolved = resolve_options(EffOptions(**self.options))
        for chosen in resolved.methods:
            then = self.methods.get(f"{chosen.spec.kind}={chosen.spec.name}")
            if then is not None:
                self._compare(chosen.spec, then["defaults"], chosen.config)

    def _compare(self, spec: MethodSpec, then: Mapping[str, Any], config: MethodConfig) -> None:
        now, used = method_defaults(spec), config.to_dict()
        changed = [key for key in {**then, **now} if then.get(key, _ABSENT) != now.get(key, _ABSENT)]
        # An option that the recipe itself sets is what it was, whatever the default is now.
        loose = [key for key in changed if key not in now or used[key] == now[key]]
        if loose:
            steps = ", ".join(f"{key} {_side(then, key)} -> {_side(now, key)}" for key in loose)
            text = (
                f"recipe {self.name!r} was written with hf_eff {self.made_with or 'of unknown version'}, when "
                f"{spec.address} had other defaults ({steps}); set them in the recipe or by flag to be sure."
            )
            warnings.warn(text, ChangedDefaultWarning, stacklevel=4)

    def pinned(self) -> Self:
        """A copy that records the defaults of its methods as they are now.

        Raises:
            UnknownMethodError: A method is not registered here.
            OptionError: An option is unknown or outside its bounds.
            PlanError: Two methods fill the same slot.
        """
        resolved = resolve_options(EffOptions(**self.options))
        methods = {
            f"{spec.kind}={spec.name}": {"version": spec_version(spec), "defaults": method_defaults(spec)}
            for spec in (chosen.spec for chosen in resolved.methods)
        }
        return replace(self, methods=methods, made_with=__version__)

    @classmethod
    def of_arguments(cls, name: str, args: Any, *, run: Mapping[str, Any] | None = None, summary: str = "") -> Self:
        """The recipe of a run that is set up already.

        Args:
            name: Its name.
            args: Training arguments with the fields of hf_eff.
            run: What is trained on what; what is no Hub id is left out.
            summary: What it is for.

        Raises:
            OptionError: The name is not allowed.
        """
        options = {key: _plain(getattr(args, key, None)) for key in OPTIONS}
        neutral = vars(EffOptions())
        training = {key: _plain(getattr(args, key, None)) for key in TRAINING}
        if training["activation_checkpointing"] is not None:
            del training["gradient_checkpointing"]  # its older name
        values = {
            "format": FORMAT,
            "format_version": VERSION,
            "name": name,
            "version": "1.0",
            "summary": summary,
            "options": {key: value for key, value in options.items() if value not in (None, {}, neutral[key])},
            "training": {key: value for key, value in training.items() if value not in (None, [], {})},
            "run": {key: value for key, value in (run or {}).items() if value and not Path(str(value)).exists()},
        }
        return cls.from_dict(without_refused(values)).pinned()

    def settings(self) -> dict[str, Any]:
        """Every field as one mapping of option names to values, as a settings file would hold it.

        Raises:
            OptionError: The recipe names a repository, and a file or folder of that name lies here.
        """
        for key in ("model", "dataset", "eval_dataset"):
            value = self.run.get(key)
            if value is not None and Path(value).exists():
                raise OptionError(
                    f"recipe {self.name!r} names the {key} {value!r} of the Hub, but a local {value!r} would be read "
                    f"instead; run it in another folder, or give --{key}."
                )
        return {**self.run, **self.training, **self.options}


def list_recipes(source: str | Path, *, revision: str | None = None, token: str | None = None) -> list[Recipe]:
    """All recipes of a folder or of a repository, by name.

    Args:
        source: Folder, or ``"user/repo[@revision]"``.
        revision: Branch, tag or commit.
        token: Access token; None for the one that is logged in.

    Raises:
        OptionError: One of them is malformed.
    """
    if Path(source).is_dir():
        return _all_of(Recipe, Path(source))
    repo, _, marked = str(source).partition("@")
    with tempfile.TemporaryDirectory() as folder:
        _pull(repo, Path(folder), revision or marked or None, token)
        return _all_of(Recipe, Path(folder))


def method_defaults(spec: MethodSpec) -> dict[str, Any]:
    """The defaults of a method's options, as plain data: what a recipe that leaves them out relies on."""
    return {key: _plain(value) for key, value in spec.config().to_dict().items()}


def spec_version(spec: MethodSpec) -> str:
    """Eight digits that change when an option of a method, or its default, changes."""
    facts = json.dumps([spec.kind, spec.name, spec.slot, method_defaults(spec)], sort_keys=True, default=str)
    return hashlib.blake2b(facts.encode(), digest_size=4).hexdigest()


def _pull(repo_id: str, folder: Path, revision: str | None, token: str | None, *others: str) -> None:
    patterns = [*(f"{FOLDER}/*{suffix}" for suffix in _SUFFIXES), *others]
    with contextlib.suppress(hub.HubError):  # without a network the cache answers, or pull_folder says why not
        for path, size in hub.list_files(repo_id, "model", revision=revision, token=token).items():
            if path.startswith(f"{FOLDER}/") and size > MAX_BYTES:
                raise OptionError(f"{path} of {repo_id!r} is larger than a recipe may be ({MAX_BYTES // 2**10} KiB).")
    hub.pull_folder(repo_id, folder, "model", patterns=patterns, revision=revision, token=token)


def _files(folder: Path) -> dict[str, Path]:
    paths = sorted((folder / FOLDER).glob("*")) if (folder / FOLDER).is_dir() else sorted(folder.glob("*"))
    return {path.stem: path for path in paths if path.suffix in _SUFFIXES and path.is_file() and not path.is_symlink()}


def _all_of(kind: type[Recipe], folder: Path) -> list[Recipe]:
    return [kind.from_file(path) for path in _files(folder).values()]


def _one_of(kind: type[_Kind], folder: Path, name: str | None, source: str) -> _Kind:
    files = _files(folder)
    if not files:
        raise OptionError(f"{source!r} holds no recipe: no {FOLDER}/<name>.yaml.")
    if name is None and len(files) > 1:
        raise OptionError(f"{source!r} holds the recipes {sorted(files)}; name one, as in '{source}/{min(files)}'.")
    if name is not None and name not in files:
        near = difflib.get_close_matches(name, files, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise OptionError(f"{source!r} holds no recipe {name!r}.{hint} It holds {sorted(files)}.")
    return kind.from_file(files[name] if name is not None else next(iter(files.values())))


def _plain(value: Any) -> Any:
    """Plain data of what arguments hold: enumerations by value, JSON text parsed, tuples as lists."""
    value = getattr(value, "value", value)
    if isinstance(value, str) and value.startswith("{"):
        with contextlib.suppress(ValueError):
            return json.loads(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    return value


def _side(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "none"
