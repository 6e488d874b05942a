"""A recipe file as text: a small part of YAML, read without aliases, tags or repeated keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from hf_eff.errors import OptionError

MAX_BYTES = 64 * 2**10
_MAX_DEPTH = 20


def read_yaml(path: Path) -> Any:
    """The plain data of a file that a stranger may have written.

    Raises:
        OptionError: The file is missing, too large, not text, no YAML, or uses more of YAML than a recipe needs.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise OptionError(f"recipe {path.name!r} is larger than a recipe may be ({MAX_BYTES // 2**10} KiB).")
        return parse_yaml(content.decode("utf-8"), path.name)
    except UnicodeDecodeError:
        raise OptionError(f"recipe {path.name!r} is not UTF-8 text.") from None
    except (OSError, ValueError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"recipe {str(path)!r} cannot be read ({_reason(error)}).") from None


def parse_yaml(text: str, name: str = "recipe") -> Any:
    """Plain data of YAML text.

    Aliases are refused because a few lines of them stand for gigabytes, tags because they ask for other types than
    plain ones, and deep nesting because the reader calls itself for each level.

    Raises:
        OptionError: The text is no YAML or holds one of these.
    """
    try:
        _refuse_features(text, name)
        loader = _PlainLoader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise OptionError(f"recipe {name!r} is not YAML ({' '.join(str(error).split())}).") from None
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # numbers that Python cannot hold
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"recipe {name!r} holds a value that cannot be read ({_reason(error)}).") from None


def dump_yaml(value: Any) -> str:
    """YAML text of plain data, in its order, readable by people."""
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110))


def _refuse_features(text: str, name: str) -> None:
    depth = 0
    event: Any
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise OptionError(f"recipe {name!r} uses '&' or '*' (anchors and aliases); write each value out.")
        if getattr(event, "tag", None) is not None:
            raise OptionError(f"recipe {name!r} uses the tag {event.tag!r}; a recipe holds plain values only.")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise OptionError(f"recipe {name!r} is nested more than {_MAX_DEPTH} levels deep.")


class _PlainLoader(yaml.SafeLoader):
    """The safe loader with dates left as text, without keys that overwrite one another."""

    yaml_constructors = {  # noqa: RUF012 - yaml's own name, read from the class
        **yaml.SafeLoader.yaml_constructors,
        "tag:yaml.org,2002:timestamp": yaml.SafeLoader.construct_yaml_str,
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping; a repeated key is an error, as is '<<'."""
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key.start_mark)
            if key.value in seen:
                problem = f"the key {key.value[:80]!r} is repeated"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _reason(error: Exception) -> str:
    text = str(getattr(error, "strerror", None) or error) or type(error).__name__
    return text if len(text) <= 120 else f"{text[:117]}..."
