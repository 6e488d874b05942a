"""``hf-eff compare-selections``: what selections of one dataset share, what they cost, whether their scores agree."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_eff.cli import COMMANDS
from hf_eff.cli.flags import SentenceErrors
from hf_eff.cli.output import print_json

if TYPE_CHECKING:
    from hf_eff.manifest import Selection
    from hf_eff.report.selection_comparison import Scores


def run(argv: Sequence[str]) -> int:
    """Print the comparison."""
    parser = SentenceErrors(
        prog="hf-eff compare-selections", description=COMMANDS["compare-selections"], allow_abbrev=False
    )
    parser.add_argument("selections", nargs="+", help="folders of selections or runs, or Hub ids of selections")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(list(argv))
    from hf_eff.report.selection_comparison import compare_selections, render_comparison

    found = {name: _load(name) for name in options.selections}
    facts = compare_selections(found, {name: _all_scores(name) for name in found})
    if options.json:
        print_json(facts)
    else:
        print(render_comparison(facts).rstrip("\n"))
    return 0


def _load(name: str) -> Selection:
    """A selection from its own folder, from that of the run that made it, or from the Hub."""
    from hf_eff.run_directory import SELECTION
    from hf_eff.selection import Selection

    inside = Path(name) / SELECTION
    return Selection.from_pretrained(inside if inside.is_dir() else name)


def _all_scores(name: str) -> Scores | None:
    from hf_eff.report.selection_report import read_scores

    return read_scores(Path(name))
