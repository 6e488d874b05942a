"""The command line ``hf-eff``: one file per command, each imported only when it is called.

Exit codes: 0 done, 1 failure, 2 wrong usage (one sentence on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence

from hf_eff import __version__
from hf_eff.errors import (
    DataError,
    EffError,
    ManifestError,
    MissingDependencyError,
    OptionError,
    PlanError,
    UnknownMethodError,
)

COMMANDS = {
    "train": "Select, train under the budget, report.",
    "select": "Choose rows of a dataset and write their manifest; trains nothing.",
    "pull": "Fetch a published selection into a folder.",
    "push": "Send the folder of a run, or of a selection, to the Hub; what arrives is read back.",
    "recipes": "List, show, pull and push recipes: settings that others can run with 'train --recipe'.",
    "verify": "Check that a selection is intact and that a dataset is the one it was made from.",
    "compare-selections": "Show what selections of one dataset share, what they cost, whether their scores agree.",
    "plan": "Print what 'train' with the same flags would do and cost; spends nothing.",
    "profile": "Compare the memory that methods need, term by term, without weights.",
    "methods": "List the methods, or show the card of one.",
    "report": "Print the report of a finished run.",
    "governor": "Decide a recorded run again, by its own policy or by others; run the shipped simulations.",
    "race": "Several runs share one budget: the best goes on, the others stop early.",
    "replay": "Rebuild the weights of a zeroth-order run, after any step, from its first weights and its log.",
    "extension": "Make 'hf eff ...' this command, so that the hf command line has it, too.",
    "demo": "Select and train on a real model and real data, beside a random choice.",
}
USAGE_ERRORS = (DataError, ManifestError, MissingDependencyError, OptionError, PlanError, UnknownMethodError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Words after ``hf-eff``; those of the process when None.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        name = _command(words)
        if name is None:
            return 0
        code: int = importlib.import_module(f"hf_eff.cli.{name.replace('-', '_')}").run(words[1:])
    except SystemExit as end:  # argparse, after printing help
        return end.code if isinstance(end.code, int) else 2
    except EffError as error:
        print(f"hf-eff: {error}", file=sys.stderr)
        return 2 if isinstance(error, USAGE_ERRORS) else 1
    except KeyboardInterrupt:
        print("hf-eff: interrupted; run the same command again.", file=sys.stderr)
        return 130
    return code


def _command(words: list[str]) -> str | None:
    """Name of the command, or None after printing help or the version.

    Raises:
        OptionError: The first word is no command.
    """
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return None
    if words[0] == "--version":
        print(f"hf-eff {__version__}")
        return None
    if words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise OptionError(f"{words[0]!r} is no command.{hint} Commands: {', '.join(COMMANDS)}.")
    return words[0]


def _help() -> str:
    parser = argparse.ArgumentParser(
        prog="hf-eff",
        usage="hf-eff COMMAND [options]   (each command has --help)",
        description="Budgeted fine-tuning on Hugging Face: which data, which memory strategy, when to stop.",
        epilog="commands:\n" + "\n".join(f"  {name:<20}{line}" for name, line in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__, help="print the version")
    return parser.format_help().rstrip()
