"""``hf-eff methods``: list the methods, or show the card of one."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence

from hf_eff.cli import COMMANDS
from hf_eff.cli.flags import SentenceErrors
from hf_eff.contracts.spec import KINDS
from hf_eff.errors import UnknownMethodError
from hf_eff.registry import list_methods, origin, summaries
from hf_eff.report.card import method_card
from hf_eff.report.markdown import table


def run(argv: Sequence[str]) -> int:
    """Print names and summaries without importing a method, or one card."""
    parser = SentenceErrors(prog="hf-eff methods", description=COMMANDS["methods"], allow_abbrev=False)
    parser.add_argument("kind", nargs="?", help="selection, memory or governor; or the name of a method")
    parser.add_argument("name", nargs="?", help="method whose card to print")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    options = parser.parse_args(list(argv))
    kind, name = options.kind, options.name
    if kind is not None and name is None and kind not in KINDS:
        kind, name = _kind_of(kind), kind
    if name is not None:
        _print_card(kind, name, as_json=options.json)
        return 0
    listing = {each: _sentences(each) for each in ([kind] if kind else KINDS)}
    if options.json:
        print(json.dumps(listing, indent=2))
    elif options.markdown:
        print(_markdown(listing))
    else:
        print(_text(listing))
    return 0


def _sentences(kind: str) -> dict[str, str]:
    return {name: line[:1].upper() + line[1:] for name, line in summaries(kind).items()}


def _kind_of(name: str) -> str:
    kinds = [kind for kind in KINDS if name in list_methods(kind)]
    if len(kinds) == 1:
        return kinds[0]
    if kinds:
        raise UnknownMethodError(f"{name!r} is a method of {' and of '.join(kinds)}; name the kind before it.")
    near = difflib.get_close_matches(name, [*KINDS, *list_methods()], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UnknownMethodError(f"{name!r} is neither a kind {list(KINDS)} nor a method {list_methods()}.{hint}")


def _print_card(kind: str, name: str, *, as_json: bool) -> None:
    card = method_card(kind, name)
    if as_json:
        print(json.dumps({"kind": kind, "name": name, "origin": origin(kind, name), "card": card}, indent=2))
    else:
        print(card)


def _text(listing: dict[str, dict[str, str]]) -> str:
    width = max((len(name) for lines in listing.values() for name in lines), default=0) + 2
    parts = []
    for kind, lines in listing.items():
        parts.append("\n".join([kind, *(f"  {name:<{width}}{summary}" for name, summary in lines.items())]))
    return "\n\n".join(parts)


def _markdown(listing: dict[str, dict[str, str]]) -> str:
    rows = [
        (f"`{kind}={name!r}`".replace("'", '"'), line)
        for kind, lines in listing.items()
        for name, line in lines.items()
    ]
    return table(["Method", "What it does"], rows)
