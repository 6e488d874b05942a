"""``hf-eff extension``: let ``hf eff ...`` run the hf_eff of this environment.

``hf extensions install OWNER/hf-eff`` makes an environment of its own out of a GitHub repository of that name, because
this package brings the console script ``hf-eff`` that it looks for. Here the note that ``hf`` reads is written for the
environment that is there already, so that both commands use the same packages.
"""

from __future__ import annotations

import datetime as dt
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from hf_eff.cli import COMMANDS
from hf_eff.cli.flags import SentenceErrors
from hf_eff.errors import OptionError
from hf_eff.files import write_json

SCRIPT = "hf-eff"
_ROOT = Path("~/.local/share/hf/extensions")
_NOTE = "manifest.json"
_SOURCE = "local"


def run(argv: Sequence[str]) -> int:
    """Write the note, or take it away."""
    parser = SentenceErrors(prog="hf-eff extension", description=COMMANDS["extension"], allow_abbrev=False)
    parser.add_argument("action", choices=("install", "remove"), help="make 'hf eff' this command, or no command")
    options = parser.parse_args(list(argv))
    if options.action == "install":
        print(f"'hf eff' runs {_install()}")
    else:
        _remove()
        print("'hf eff' is no command any more.")
    return 0


def _folder() -> Path:
    return _ROOT.expanduser() / SCRIPT


def _install() -> Path:
    """Write the note.

    Returns:
        The script that ``hf eff`` runs.

    Raises:
        OptionError: There is another extension of that name, or this package has no script.
    """
    if _folder().exists() and not _is_ours():
        raise OptionError("'hf eff' is another extension already; remove it with: hf extensions remove eff")
    script = _script()
    note = {
        "owner": _SOURCE,
        "repo": SCRIPT,
        "repo_id": f"{_SOURCE}/{SCRIPT}",
        "short_name": "eff",
        "executable_path": str(script),
        "type": "binary",  # not an environment that 'hf' made and may rebuild
        "installed_at": dt.datetime.now(dt.timezone.utc).isoformat(),
        "description": "Budgeted fine-tuning: which data, which memory strategy, when to stop.",
        "commit_sha": None,
    }
    write_json(_folder() / _NOTE, note)
    return script


def _remove() -> None:
    """Take the note away.

    Raises:
        OptionError: There is none of ours.
    """
    if not _is_ours():
        raise OptionError("'hf eff' was not set up by 'hf-eff extension install'.")
    shutil.rmtree(_folder())


def _is_ours() -> bool:
    """Whether the folder holds our note and no environment."""
    note = _folder() / _NOTE
    return note.is_file() and f'"{_SOURCE}/{SCRIPT}"' in note.read_text(encoding="utf-8") and _no_more_than_notes()


def _no_more_than_notes() -> bool:
    return all(path.name in (_NOTE, ".latest_commit") for path in _folder().iterdir())


def _script() -> Path:
    """The console script beside the running Python.

    Raises:
        OptionError: There is none.
    """
    found = shutil.which(SCRIPT, path=sysconfig.get_path("scripts")) or shutil.which(SCRIPT)
    if found is None:
        raise OptionError(f"there is no script {SCRIPT!r} beside {sys.executable!r}; install hf_eff with pip.")
    return Path(found).absolute()
