"""``hf-eff verify``: whether a selection is intact and fits a dataset. Exit code 1 where it does not."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from hf_eff.cli import COMMANDS
from hf_eff.cli.flags import SentenceErrors
from hf_eff.cli.output import print_json, stdout_reserved
from hf_eff.cli.pull import describe
from hf_eff.errors import ManifestError


def run(argv: Sequence[str]) -> int:
    """Read the selection and, unless told otherwise, the dataset it names; say in one sentence what differs."""
    options = _parse(argv)
    try:
        with stdout_reserved(options.json):
            facts = _verified(options)
    except ManifestError as error:
        if options.json:
            print_json({"verified": False, "differs": str(error)})
        print(f"hf-eff: {error}", file=sys.stderr)
        return 1
    if options.json:
        print_json({"verified": True, **facts})
    else:
        print("\n".join(f"{key:<12}{value}" for key, value in facts.items()))
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = SentenceErrors(prog="hf-eff verify", description=COMMANDS["verify"], allow_abbrev=False)
    add = parser.add_argument
    add("selection", help="folder of a selection or run, Hub repository, or 'hub:user/repo/name@revision'")
    add("--name", help="which selection of a repository")
    add("--revision", help="branch, tag or commit of the selection's repository")
    add("--dataset", help="Hub id, folder or file of the dataset; the one that the manifest names without")
    add("--dataset_config", help="configuration of a Hub dataset; the manifest's own without")
    add("--split", help="split; the manifest's own without")
    add("--level", default="rows", choices=("fast", "rows", "full"), help="names, chosen rows (rows), or every row")
    add("--no_dataset", action="store_true", help="check that the selection itself is intact, and nothing else")
    add("--json", action="store_true", help="print one JSON object on stdout and the rest on stderr")
    return parser.parse_args(list(argv))


def _verified(options: argparse.Namespace) -> dict[str, Any]:
    from hf_eff.selection import Selection

    selection = Selection.from_pretrained(options.selection, options.name, revision=options.revision)
    facts = describe(selection)
    if options.no_dataset:
        return {**facts, "verified": "intact; no dataset was looked at"}
    about = selection.manifest["dataset"]
    name = options.dataset or about["repo_id"]
    if name is None:
        raise ManifestError("the manifest names no Hub dataset; give --dataset, or --no_dataset.")
    selection.verify(_rows(name, options, about), options.level)
    return {**facts, "verified": f"{name} fits, level {options.level}"}


def _rows(name: str, options: argparse.Namespace, about: dict[str, Any]) -> Any:
    """The rows of the dataset, at the revision that the manifest names where it is the manifest's dataset."""
    from hf_eff.cli.sources import load_rows
    from hf_eff.hub import fetch_split

    split, config = options.split or about["split"], options.dataset_config or about["config"]
    if name == about["repo_id"]:
        return fetch_split(name, config=config, split=split, revision=about["revision"])
    return load_rows(name, split=split or "train", config=options.dataset_config)
