"""A method is what its address says: one name for file, class, options, card; a head that can be read."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

from hf_eff.contracts.spec import KINDS, MethodSpec
from hf_eff.testing.check import Check, expect

SECTIONS = ("Idea", "Cost", "Use when", "Avoid when", "Differs", "Paper")
_METHOD_FOLDERS = tuple(f"hf_eff.{kind}." for kind in KINDS)
_BUILT_IN_LAYERS = ("engines", "numerics", "hardware", "contracts", "errors", "units")
_ARXIV = re.compile(r"\d{4}\.\d{4,5}")


def _module(spec: MethodSpec) -> ModuleType:
    return sys.modules[spec.config.__module__]


def _has_file(spec: MethodSpec) -> bool:
    """Whether the method lives in a file of its own; one registered from a notebook does not."""
    module = _module(spec)
    return getattr(module, "__file__", None) is not None and getattr(module, "SPEC", None) is not None


def _is_built_in(spec: MethodSpec) -> bool:
    return spec.config.__module__.startswith(_METHOD_FOLDERS)


def _has_paper(spec: MethodSpec) -> bool:
    return spec.paper is not None


def check_address(spec: MethodSpec) -> None:
    """Name, file, class, options class, cost function and SPEC agree."""
    module, word = _module(spec), spec.name.replace("_", "")
    stem = Path(str(module.__file__)).stem
    expect(re.fullmatch(r"[a-z][a-z0-9_]*", spec.name), f"name {spec.name!r} is not snake_case.")
    expect(stem == spec.name, f"{spec.address} lives in {stem}.py; the file must be {spec.name}.py.")
    expect(spec == module.SPEC, f"SPEC in {stem}.py is not the one under {spec.address}.")
    expect(inspect.isclass(spec.build), f"build of {spec.address} must be the method's class, got {spec.build!r}.")
    for found, suffix in ((spec.build.__name__, ""), (spec.config.__name__, "config")):
        expect(found.lower() == word + suffix, f"class {found} does not spell {spec.name!r} in CapWords.")
    expect(spec.config.__name__ == f"{spec.build.__name__}Config", "the options class is not named <Class>Config.")
    expect(getattr(module, "cost", None) is spec.cost, f"{stem}.py has no function 'cost' that SPEC.cost names.")


def check_head(spec: MethodSpec) -> None:
    """The file's docstring begins with name and summary and has every section of a card."""
    text = inspect.getdoc(_module(spec)) or ""
    first = text.partition("\n")[0]
    name, _, summary = first.partition(": ")
    expect(name.lower().replace("_", "").replace(" ", "") == spec.name.replace("_", ""), f"head begins {first!r}.")
    expect(summary.strip(), "the head's first line has no summary after 'name: '.")
    lines = text.splitlines()
    sections = SECTIONS if spec.paper is not None else SECTIONS[:-2]
    missing = [section for section in sections if not any(line.startswith(section) for line in lines)]
    expect(not missing, f"the head lacks the sections {missing}.")


def check_summary(spec: MethodSpec) -> None:
    """The SPEC has a summary of one line."""
    expect(spec.summary.strip() and "\n" not in spec.summary, f"summary is {spec.summary!r}; write one line.")
    expect(len(spec.summary) <= 120, f"summary has {len(spec.summary)} characters; keep it within 120.")


def check_paper(spec: MethodSpec) -> None:
    """A method names its paper, a baseline says that it is one, never both or neither."""
    expect(
        (spec.paper is None) == spec.traits.baseline,
        f"{spec.address} must have either a paper or the trait 'baseline', and not both.",
    )


def check_citation(spec: MethodSpec) -> None:
    """The citation is well formed and leads somewhere."""
    paper = spec.paper
    if paper is None:
        return
    expect(paper.title.strip() and 1950 <= paper.year <= 2100, f"citation {paper} lacks a title or a likely year.")
    expect(paper.link, f"citation {paper.title!r} has neither an arXiv identifier nor a url.")
    if paper.arxiv is not None:
        expect(_ARXIV.fullmatch(paper.arxiv), f"arXiv identifier {paper.arxiv!r} is not like '2404.02827'.")
        posted = 2000 + int(paper.arxiv[:2])
        expect(posted <= paper.year, f"arXiv:{paper.arxiv} was posted in {posted}, after the year given, {paper.year}.")


def check_imports(spec: MethodSpec) -> None:
    """The file imports no other method; a built-in only what lies below it."""
    tree = ast.parse(Path(str(_module(spec).__file__)).read_text(encoding="utf-8"))
    for name in _imported(tree):
        if not name.startswith("hf_eff"):
            continue
        other = name.startswith(_METHOD_FOLDERS) and not name.startswith(_module(spec).__name__)
        expect(not other, f"{spec.name}.py imports {name}: a method imports no other method.")
        if _is_built_in(spec):
            layer = [*name.split("."), ""][1]
            expect(layer in _BUILT_IN_LAYERS, f"{spec.name}.py imports {name}, which lies above the methods.")


def _imported(tree: ast.AST) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def check_card(spec: MethodSpec) -> None:
    """The committed card begins with the head that the SPEC gives."""
    from hf_eff.registry import method_card
    from hf_eff.report.card import render_head

    card = method_card(spec.kind, spec.name)
    expect(
        render_head(spec) in card, f"the head of the card of {spec.address} is stale; run python -m hf_eff.report.card"
    )
    body = card.partition("<!-- /spec -->")[2]
    expect(len(body.split()) >= 40, f"the card of {spec.address} has no hand-written body.")


CHECKS = (
    Check(check_address, when=_has_file),
    Check(check_head, when=_has_file),
    Check(check_summary),
    Check(check_paper),
    Check(check_citation, when=_has_paper),
    Check(check_imports, when=_has_file),
    Check(check_card, when=_is_built_in),
)
