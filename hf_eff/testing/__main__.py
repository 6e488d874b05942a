"""``python -m hf_eff.testing selection=less`` prints the verdict of every check; ``new`` writes a skeleton."""

from __future__ import annotations

import logging
import sys

from hf_eff.errors import EffError, OptionError
from hf_eff.registry import get_method, list_methods

USAGE = "usage: python -m hf_eff.testing KIND=NAME ... | new KIND NAME [FOLDER]"


def main(arguments: list[str] | None = None) -> int:
    """Entry point. 0: all conform, 1: a check failed, 2: wrong usage."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        if words[:1] == ["new"] and len(words) in (3, 4):
            from hf_eff.testing.skeleton import write_skeleton

            for path in write_skeleton(words[1], words[2], words[3] if len(words) == 4 else "."):
                print(path)
            return 0
        if not words or words[0] in ("-h", "--help", "new"):
            print(USAGE)
            return 0 if words[:1] in (["-h"], ["--help"]) else 2
        verdicts = [_report(word) for word in words]
        return 0 if all(verdicts) else 1
    except EffError as error:
        print(error, file=sys.stderr)
        return 2


def _report(address: str) -> bool:
    kind, equals, name = address.partition("=")
    if not equals:
        raise OptionError(f"{address!r} is no address; write for example selection={list_methods('selection')[0]}.")
    spec = get_method(kind, name)
    from hf_eff.testing.suite import run_suite

    _only_verdicts()
    acceptable, total, count = True, 0.0, 0
    for verdict in run_suite(spec):
        acceptable &= verdict.acceptable
        total, count = total + verdict.seconds, count + 1
        print(f"{verdict.status:<20} {verdict.seconds:6.2f}s  {verdict.check.name}  {verdict.reason}".rstrip())
    print(f"{spec.address}: {'conforms' if acceptable else 'does not conform'}; {count} checks in {total:.1f}s")
    return acceptable


def _only_verdicts() -> None:
    """No progress bars nor notes of the stack between the lines."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("hf_eff").setLevel(logging.ERROR)


if __name__ == "__main__":
    raise SystemExit(main())
