"""The generated head of a method card: the facts of a SPEC as Markdown, between two markers.

``python -m hf_eff.report.card`` rewrites the heads of all cards of a checkout; ``--check`` only
tells which ones are stale.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import sys
from pathlib import Path
from typing import Any

from hf_eff.contracts.spec import KINDS, MethodSpec, Traits
from hf_eff.files import write_text
from hf_eff.registry import get_method, list_methods, origin
from hf_eff.report.markdown import table

START, END = "<!-- spec -->", "<!-- /spec -->"


def render_head(spec: MethodSpec) -> str:
    """The head of the card, markers included, without a newline at its end."""
    parts = [f"# {spec.name}", spec.summary, _facts(spec), "## Options", _options(spec), "## Traits", _traits(spec)]
    return "\n\n".join([START, *parts, END])


def method_card(kind: str, name: str) -> str:
    """Markdown card of a method: its committed page under a head that is never stale, else that head alone.

    Raises:
        UnknownMethodError: The kind or the name is not registered.
    """
    spec = get_method(kind, name)
    source = Path(origin(kind, name))
    if source.is_file():  # a built-in; its page is inside the wheel, or beside the package in a checkout
        package = source.parents[1]
        for root in (package, package.parent):
            page = root / "model_cards" / kind / f"{name}.md"
            if page.is_file():
                return _with_head(page, spec)
    return render_head(spec)


def sync_card(path: Path, spec: MethodSpec) -> bool:
    """Rewrite the head of the card at ``path``; the hand-written body stays as it is.

    Returns:
        Whether the file changed.

    Raises:
        ValueError: The file does not hold the two markers once each, in order.
    """
    new = _with_head(path, spec)
    changed = new != path.read_text(encoding="utf-8")
    if changed:
        write_text(path, new)
    return changed


def _with_head(path: Path, spec: MethodSpec) -> str:
    """The page with the head that the SPEC gives."""
    before, start, rest = path.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not start or not end or START in rest or END in after:
        raise ValueError(f"{path} needs the line {START!r} and, after it, the line {END!r}, once each.")
    return before + render_head(spec) + after


def is_current(path: Path, spec: MethodSpec) -> bool:
    """Whether the card at ``path`` holds exactly the head that the SPEC gives."""
    return path.is_file() and render_head(spec) in path.read_text(encoding="utf-8")


def _facts(spec: MethodSpec) -> str:
    paper = "none: a baseline for comparison"
    if spec.paper is not None:
        paper = f"[{spec.paper.title}]({spec.paper.link}) ({spec.paper.year})"
    rows = [
        ("Use as", f"`{spec.kind}={spec.name!r}`".replace("'", '"')),
        ("Kind, slot", f"{spec.kind}, {spec.slot}"),
        ("Status", spec.status),
        ("Paper", paper),
    ]
    if spec.requires:
        rows.append(("Extra packages", ", ".join(f"{name} (`hf_eff[{x}]`)" for name, x in spec.requires.items())))
    return table(["Fact", "Value"], rows)


def _options(spec: MethodSpec) -> str:
    fields = dataclasses.fields(spec.config)
    if not fields:
        return "None."
    rows = [
        (
            f"`{field.name}`",
            f"`{field.default!r}`",
            _paper_value(field),
            _allowed(field),
            field.metadata.get("help", ""),
        )
        for field in fields
    ]
    return table(["Option", "Default", "Paper", "Allowed", "Meaning"], rows)


def _paper_value(field: dataclasses.Field[Any]) -> str:
    return str(field.metadata.get("paper") or "")


def _allowed(field: dataclasses.Field[Any]) -> str:
    meta = field.metadata
    if meta.get("choices") is not None:
        return ", ".join(f"`{choice!r}`" for choice in meta["choices"])
    low, high, unit = meta.get("low"), meta.get("high"), meta.get("unit")
    bounds = ""
    if low is not None and high is not None:
        bounds = f"{low} to {high}"
    elif low is not None:
        bounds = f"at least {low}"
    elif high is not None:
        bounds = f"at most {high}"
    return " ".join(part for part in (bounds, unit) if part)


def _traits(spec: MethodSpec) -> str:
    meanings = _trait_meanings()
    rows = []
    for field in dataclasses.fields(Traits):
        kinds, meaning = meanings.get(field.name, (KINDS, ""))
        if spec.kind in kinds:
            rows.append((f"`{field.name}`", "yes" if getattr(spec.traits, field.name) else "no", meaning))
    return table(["Trait", "Value", "Meaning"], rows)


def _trait_meanings() -> dict[str, tuple[tuple[str, ...], str]]:
    """Kinds and meaning of each trait, read from the strings below the fields of ``Traits``."""
    body = ast.parse(inspect.getsource(Traits)).body[0]
    meanings = {}
    nodes = body.body if isinstance(body, ast.ClassDef) else []
    for field, note in itertools.pairwise(nodes):
        if isinstance(field, ast.AnnAssign) and isinstance(note, ast.Expr) and isinstance(note.value, ast.Constant):
            meanings[ast.unparse(field.target)] = _split_kinds(" ".join(str(note.value.value).split()))
    return meanings


def _split_kinds(note: str) -> tuple[tuple[str, ...], str]:
    """``"Memory: text"`` -> ``(("memory",), "Text")``; a note that names no kind holds for all."""
    prefix, colon, text = note.partition(": ")
    kinds = tuple(kind for kind in KINDS if kind in prefix.lower())
    if not colon or not kinds:
        return KINDS, note
    return kinds, text[:1].upper() + text[1:]


def main(argv: list[str] | None = None) -> int:
    """Rewrite all heads, or with ``--check`` name the stale ones.

    Returns:
        0 when every method has a card with a current head (after rewriting), else 1.
    """
    parser = argparse.ArgumentParser(prog="python -m hf_eff.report.card", description=__doc__)
    parser.add_argument("--cards", type=Path, default=Path("model_cards"), help="folder of the cards")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when a head is stale")
    options = parser.parse_args(argv)
    code = 0
    for kind in KINDS:
        for name in list_methods(kind):
            path = options.cards / kind / f"{name}.md"
            state = _visit(path, get_method(kind, name), check=options.check)
            code |= state in ("missing", "stale")
            sys.stdout.write(f"{state:9} {path}\n")
    return code


def _visit(path: Path, spec: MethodSpec, *, check: bool) -> str:
    if not path.is_file():
        return "missing"
    if check:
        return "current" if is_current(path, spec) else "stale"
    return "rewritten" if sync_card(path, spec) else "current"


if __name__ == "__main__":
    sys.exit(main())
