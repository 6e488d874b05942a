"""``hf-eff pull``: fetch a published selection into a folder, checked before it is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_eff.cli import COMMANDS
from hf_eff.cli.flags import SentenceErrors
from hf_eff.cli.output import print_json
from hf_eff.files import require_writable

if TYPE_CHECKING:
    from hf_eff.manifest import Selection


def run(argv: Sequence[str]) -> int:
    """Fetch, check, write; print what it is."""
    parser = SentenceErrors(prog="hf-eff pull", description=COMMANDS["pull"], allow_abbrev=False)
    add = parser.add_argument
    add("source", help="Hub dataset repository, or an address such as 'hub:user/repo/name@revision'")
    add("--name", help="which selection of the repository; may be left out when it holds one")
    add("--revision", help="branch, tag or commit")
    add("--output_dir", default="selection", help="folder of manifest.json and train.parquet (selection)")
    add("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(list(argv))
    from hf_eff.selection import Selection

    selection = Selection.from_pretrained(options.source, options.name, revision=options.revision)
    folder = selection.save(require_writable(options.output_dir))
    facts = {**describe(selection), "manifest": str(Path(folder) / "manifest.json")}
    if options.json:
        print_json(facts)
    else:
        print("\n".join(f"{key:<12}{value}" for key, value in facts.items()))
    return 0


def describe(selection: Selection) -> dict[str, Any]:
    """What people ask of a selection that is not theirs."""
    about, data = selection.manifest["selection"], selection.manifest["dataset"]
    return {
        "name": about["name"],
        "method": about["method"],
        "dataset": data["repo_id"] or "a local one",
        "revision": data["revision"] or "unknown",
        "rows": f"{len(selection)} of {data['num_rows']}",
        "seed": about["seed"],
        "digest": selection.digest,
    }
