"""``hf-eff methods``: list the methods, all or those that fit a question; or show the card of one."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Any

from hf_eff.cli import COMMANDS
from hf_eff.cli.flags import SentenceErrors
from hf_eff.contracts.spec import KINDS
from hf_eff.errors import OptionError, UnknownMethodError
from hf_eff.registry import get_method, list_methods, origin, summaries
from hf_eff.report.card import method_card
from hf_eff.report.markdown import table

_FILTERS = {
    "slot": "the part of its kind that it fills, such as pool, weights, activations or update",
    "saves": "memory term that is smaller than with full fine-tuning: weights, gradients, optimizer, activations, rest",
    "backend": "way of running it works with: ddp, fsdp2, fp16, peft, quantized",
    "needs": "what a run must bring for it: model, target, backward, causal_lm, accelerator, blocks, package",
    "without": "what a run need not bring for it; the same words",
    "status": "stable or experimental",
}


def run(argv: Sequence[str]) -> int:
    """Print names and summaries, without importing a method unless a filter asks for its facts; or one card."""
    parser = SentenceErrors(prog="hf-eff methods", description=COMMANDS["methods"], allow_abbrev=False)
    parser.add_argument("kind", nargs="?", help="selection, memory or governor; or the name of a method")
    parser.add_argument("name", nargs="?", help="method whose card to print")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    filters = parser.add_argument_group("filters", "each may be repeated; a method has to pass all of them")
    for flag, meaning in _FILTERS.items():
        filters.add_argument(f"--{flag}", action="append", default=[], metavar="NAME", help=meaning)
    options = parser.parse_args(list(argv))
    kind, name = options.kind, options.name
    if kind is not None and name is None and kind not in KINDS:
        kind, name = _kind_of(kind), kind
    if name is not None:
        _print_card(kind, name, as_json=options.json)
        return 0
    wanted = {flag: getattr(options, flag) for flag in _FILTERS if getattr(options, flag)}
    listing = {each: _sentences(each) for each in ([kind] if kind else KINDS)}
    if wanted:
        listing = _narrowed(listing, wanted)
    if options.json:
        print(json.dumps(listing, indent=2))
    elif options.markdown:
        print(_markdown(listing))
    else:
        print(_text(listing))
    return 0


def _narrowed(listing: dict[str, dict[str, str]], wanted: dict[str, list[str]]) -> dict[str, dict[str, str]]:
    """The methods that pass every filter; kinds without one are left out."""
    from hf_eff.report.method_facts import described

    allowed = _words_of_filters()
    for flag, words in wanted.items():
        for word in words:
            _require_word(flag, word, allowed[flag])
    kept = {
        kind: {name: line for name, line in lines.items() if _passes(described(get_method(kind, name)), wanted)}
        for kind, lines in listing.items()
    }
    return {kind: lines for kind, lines in kept.items() if lines}


def _words_of_filters() -> dict[str, list[str]]:
    from hf_eff.contracts.cost import MEMORY_TERMS
    from hf_eff.contracts.spec import SLOTS
    from hf_eff.report.method_facts import BACKENDS, NEEDS

    slots = sorted({part for names in SLOTS.values() for name in names for part in (name, name.partition(".")[0])})
    return {
        "slot": slots,
        "saves": list(MEMORY_TERMS),
        "backend": list(BACKENDS),
        "needs": [*NEEDS, "package"],
        "without": [*NEEDS, "package"],
        "status": ["stable", "experimental"],
    }


def _require_word(flag: str, word: str, allowed: list[str]) -> None:
    if word in allowed:
        return
    near = difflib.get_close_matches(word, allowed, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise OptionError(f"--{flag} must be one of {allowed}, got {word!r}.{hint}")


def _passes(facts: dict[str, Any], wanted: dict[str, list[str]]) -> bool:
    needs = {need.partition(" ")[0] for need in facts["needs"]}
    held = {
        "slot": {facts["slot"], facts["slot"].partition(".")[0]},
        "saves": set(facts["saves"]),
        "backend": set(facts["backends"]),
        "needs": needs,
        "status": {facts["status"]},
    }
    if needs & set(wanted.get("without", ())):
        return False
    return all(set(words) <= held[flag] for flag, words in wanted.items() if flag != "without")


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
        from hf_eff.recipe import spec_version
        from hf_eff.report.method_facts import described

        facts = {**described(get_method(kind, name)), "version": spec_version(get_method(kind, name))}
        print(json.dumps({**facts, "origin": origin(kind, name), "card": card}, indent=2))
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
