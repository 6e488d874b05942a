"""Parsers whose mistakes are one sentence, and settings read from a YAML file under the flags."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hf_eff.errors import OptionError


class SentenceErrors(argparse.ArgumentParser):
    """Raises ``OptionError`` with one sentence where argparse prints usage and exits."""

    def error(self, message: str) -> NoReturn:
        """Turn argparse's complaint into a sentence.

        Raises:
            OptionError: Always.
        """
        raise OptionError(f"{message.rstrip('.')}; see '{self.prog} --help'.")

    def apply_config(self, config: Mapping[str, Any]) -> None:
        """Make the entries of a settings file the defaults that flags override.

        Raises:
            OptionError: An entry is no option.
        """
        actions = {action.dest: action for action in self._actions if action.dest != "help"}
        for key in config:
            if key not in actions:
                raise OptionError(f"the settings file has the unknown option {key!r}.{_hint(key, actions)}")
        for action in self._actions:  # several may share a destination: --flag and --no_flag
            if action.dest in config:
                action.default = config[action.dest]
                action.required = False

    def refuse_unknown(self, words: Sequence[str]) -> None:
        """Refuse what no option took.

        Raises:
            OptionError: There are such words.
        """
        if not words:
            return
        options = [name for action in self._actions for name in action.option_strings]
        raise OptionError(f"unknown option {words[0]!r}.{_hint(words[0].partition('=')[0], options)}")


def read_config(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Split ``--config FILE`` off and read the file.

    Returns:
        Its entries (empty without the flag) and the other words.

    Raises:
        OptionError: The file cannot be read or holds no mapping.
    """
    finder = SentenceErrors(prog="hf-eff", add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    found, rest = finder.parse_known_args(list(argv))
    return ({} if found.config is None else _read_yaml(Path(found.config))), rest


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--config {str(path)!r} cannot be read ({_reason(error)}).") from None
    except yaml.YAMLError as error:
        raise OptionError(f"--config {str(path)!r} is not YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(values, dict):
        raise OptionError(f"--config {str(path)!r} must hold 'option: value' lines, got {type(values).__name__}.")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _hint(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
