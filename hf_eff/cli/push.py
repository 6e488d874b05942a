"""``hf-eff push``: send a run, or a selection, from its folder to the Hub; now, or after a push that failed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hf_eff.cli import COMMANDS
from hf_eff.cli.flags import SentenceErrors
from hf_eff.cli.output import print_json
from hf_eff.errors import DataError, OptionError
from hf_eff.manifest import MANIFEST
from hf_eff.publish import PushRecord, push_folder_of_run
from hf_eff.report.secrets import mask_secrets


def run(argv: Sequence[str]) -> int:
    """Push and say where it is.

    Raises:
        DataError: There is no such folder.
    """
    options = _parser().parse_args(list(argv))
    if not options.folder.is_dir():
        raise DataError(f"{str(options.folder)!r} is no folder; give the output_dir of a run, or a selection's folder.")
    if (options.folder / MANIFEST).is_file():
        return _push_selection(options)
    pushed = push_folder_of_run(options.folder, _record(options))
    if options.json:
        print_json(asdict(pushed))
        return 0
    print(f"The run is in {pushed.repo_id}, read back: {pushed.commit_url}")
    if pushed.selection_repo:
        print(f"Its selection is in the dataset {pushed.selection_repo}.")
    if pushed.collection:
        print(f"They are linked in the collection {pushed.collection}.")
    return 0


def _parser() -> SentenceErrors:
    parser = SentenceErrors(prog="hf-eff push", description=COMMANDS["push"], allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="output_dir of a run, or folder of a selection")
    parser.add_argument("--repo-id", "--repo_id", help="such as user/name; default: the one that the run named")
    parser.add_argument("--public", action="store_true", help="make repositories that are created public")
    parser.add_argument("--message", help="title of the commit")
    parser.add_argument("--branch", help="branch to commit a run to")
    parser.add_argument("--selection-repo", "--selection_repo", help="dataset repository for the run's selection")
    parser.add_argument("--collection", help="title of a collection that links model, selection and dataset")
    parser.add_argument("--name", help="name of a selection in its repository")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _record(options: Any) -> PushRecord:
    """What was noted at the last attempt, changed by flags.

    Raises:
        OptionError: A flag holds an access token, which would end up in files.
    """
    given = ("repo_id", "message", "branch", "selection_repo", "collection")
    flags: dict[str, Any] = {name: getattr(options, name) for name in given if getattr(options, name) is not None}
    for value in flags.values():
        if mask_secrets(value) != value:
            raise OptionError("an option holds what looks like an access token; log in with 'hf auth login' instead.")
    if options.public:
        flags["private"] = False
    return replace(PushRecord.read(options.folder), **flags)


def _push_selection(options: Any) -> int:
    """Send a selection.

    Raises:
        OptionError: No repository is named.
    """
    from hf_eff.selection import Selection

    if not options.repo_id:
        raise OptionError(f"no repository is named for the selection in {str(options.folder)!r}; give --repo-id.")
    selection = Selection.load(options.folder)
    commit = selection.push_to_hub(options.repo_id, options.name, private=not options.public)
    if options.json:
        print_json({"repo_id": options.repo_id, "oid": commit})
    else:
        print(f"The selection is in the dataset {options.repo_id} (commit {commit[:12]}).")
    return 0
