"""Files for a new method: its module, its card and its test, each with the places to fill marked ``FILL``.

The skeleton has a sound identity from the start and fails its behaviour checks until it is filled.
"""

from __future__ import annotations

import re
from pathlib import Path
from string import Template

from hf_eff.contracts.spec import KINDS
from hf_eff.errors import OptionError
from hf_eff.files import write_text

_MODULE = Template('''"""$name: FILL what it does, in one line.

Idea
    FILL the rule, with its formula in the paper's symbols.

Cost      FILL the symbols
    flops  FILL
    bytes  FILL

Use when  FILL
Avoid when FILL
Differs   FILL from the paper, and where paper and official code disagree.

Paper     FILL title (year), arXiv:0000.00000
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_eff.contracts.cost import Cost, Facts
$imports
from hf_eff.contracts.spec import MethodConfig, MethodSpec, Traits, knob


@dataclass(frozen=True, kw_only=True)
class ${title}Config(MethodConfig):
    """Options of ``$kind="$name"``."""

    strength: float = knob(1.0, "FILL what it does.", low=0.0, paper="FILL")


class $title$base:
    """FILL what it does."""

    def __init__(self, config: ${title}Config) -> None:
        self.config = config

$hook

def cost(config: ${title}Config, facts: Facts) -> Cost:
    """FILL the closed form."""
    raise NotImplementedError("FILL the cost")


SPEC = MethodSpec(
    name="$name",
    kind="$kind",
    slot="$slot",
    summary="FILL what it does, in one line.",
    config=${title}Config,
    build=$title,
    cost=cost,
    paper=None,  # FILL Paper(title=..., year=..., arxiv=...) and drop the trait below, unless it is a baseline
    traits=Traits(baseline=True),
    tiny={},
    status="experimental",
)
''')

_IMPORTS = {
    "selection": "from hf_eff.contracts.selection import Picks, SelectionContext",
    "memory": "from hf_eff.contracts.memory import MemoryMethod, StepContext",
    "governor": "from hf_eff.contracts.governor import Decision, Governor, Telemetry",
}
_SLOT = {"selection": "pool", "memory": "update", "governor": "policy"}
_BASES = {"selection": "", "memory": "(MemoryMethod)", "governor": "(Governor)"}
_HOOKS = {
    "selection": '''    def select(self, context: SelectionContext) -> Picks:
        """FILL which rows it chooses."""
        raise NotImplementedError("FILL the selection")
''',
    "memory": '''    def training_step(self, context: StepContext) -> "torch.Tensor":
        """FILL what it changes; every hook of MemoryMethod may be overridden."""
        raise NotImplementedError("FILL the step")
''',
    "governor": '''    def observe(self, telemetry: Telemetry) -> Decision:
        """FILL when it stops the run, as a function of the tape."""
        raise NotImplementedError("FILL the decision")
''',
}

_CARD = Template("""<!-- spec -->
<!-- /spec -->

## Use when

FILL

## Avoid when

FILL

## The paper's claim

FILL the claim with its model, data and numbers, and where it stands.

## Measured here

| what | value | command | date |
|---|---|---|---|
| FILL | not measured yet | `python -m hf_eff.testing $kind=$name` | |

## Differences from paper and official code

FILL

## Pitfalls

FILL
""")

_TEST = Template('''"""$kind="$name" against a literal reference."""

import pytest

from hf_eff.registry import get_method


def reference(FILL):
    """Ten plain lines of the paper's equation."""
    raise NotImplementedError


def test_agrees_with_the_reference():
    spec = get_method("$kind", "$name")
    pytest.fail(f"FILL: compare {spec.address} with reference()")
''')


def write_skeleton(kind: str, name: str, folder: str | Path = ".") -> list[Path]:
    """Write module, card and test of a new method below ``folder``; the card's head comes from its SPEC later.

    Args:
        kind: ``"selection"``, ``"memory"`` or ``"governor"``.
        name: snake_case; becomes the string that users type.
        folder: Root of a checkout.

    Returns:
        The files, in the order in which to fill them.

    Raises:
        OptionError: The kind or the name is not allowed, or a file exists.
    """
    if kind not in KINDS:
        raise OptionError(f"kind must be one of {list(KINDS)}, got {kind!r}.")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise OptionError(f"name must be snake_case, such as 'my_method', got {name!r}.")
    words = {
        "kind": kind,
        "name": name,
        "slot": _SLOT[kind],
        "title": "".join(part.capitalize() for part in name.split("_")),
        "base": _BASES[kind],
        "hook": _HOOKS[kind],
        "imports": _IMPORTS[kind],
    }
    root = Path(folder)
    files = {
        root / "hf_eff" / kind / f"{name}.py": _module(words),
        root / "model_cards" / kind / f"{name}.md": _CARD.substitute(words),
        root / "tests" / kind / f"test_{name}.py": _TEST.substitute(words),
    }
    for path in files:
        if path.exists():
            raise OptionError(f"{path} exists; choose another name or remove it.")
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    return list(files)


def _module(words: dict[str, str]) -> str:
    text = _MODULE.substitute(words)
    if '"torch.Tensor"' in text:
        text = text.replace('"torch.Tensor"', "torch.Tensor")
        text = text.replace("import dataclass\n\nfrom hf_eff", "import dataclass\n\nimport torch\n\nfrom hf_eff", 1)
    return text
