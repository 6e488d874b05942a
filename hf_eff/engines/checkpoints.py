"""Which checkpoint to resume from: the last one whose save was not cut short."""

from __future__ import annotations

import json
import re
from pathlib import Path

from hf_eff.engines.log_checkpoint import REPLAY_LOG, is_log_checkpoint, is_whole_log
from hf_eff.engines.sidecar import STATE_JSON
from hf_eff.errors import CheckpointError

_FOLDER = re.compile(r"^checkpoint-(\d+)$")


def is_complete(checkpoint: Path) -> bool:
    """Whether a save ran to its end: transformers writes ``trainer_state.json`` after all else.

    A replay log in the place of weights must be whole as well.
    """
    if is_log_checkpoint(checkpoint) and not is_whole_log(checkpoint / REPLAY_LOG):
        return False
    return _parses(checkpoint / "trainer_state.json") and _parses(checkpoint / STATE_JSON)


def _parses(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def last_complete(output_dir: str | Path) -> Path:
    """The newest complete checkpoint of a run.

    Raises:
        CheckpointError: The folder holds none.
    """
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if _FOLDER.match(path.name)]
    for path in sorted(folders, key=lambda each: int(each.name.partition("-")[2]), reverse=True):
        if is_complete(path):
            return path
    raise CheckpointError(
        f"resume_from_checkpoint=True, but {str(output_dir)!r} holds no complete checkpoint "
        f"({len(folders)} incomplete); start without resuming or name another folder."
    )


def resolve_checkpoint(resume: str | Path | bool | None, output_dir: str | Path) -> Path | None:
    """Turn the argument of ``Trainer.train`` into a folder, or None to start anew.

    Raises:
        CheckpointError: The named checkpoint does not exist or was cut short.
    """
    if resume is None or resume is False:
        return None
    if resume is True:
        return last_complete(output_dir)
    path = Path(resume)
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {str(path)!r} does not exist.")
    if not (path / STATE_JSON).is_file() and (path / "trainer_state.json").is_file():
        raise CheckpointError(
            f"checkpoint {str(path)!r} was written without hf_eff, so its spent budget and method state are unknown; "
            "start from its weights as a new run instead."
        )
    if not is_complete(path):
        raise CheckpointError(f"checkpoint {str(path)!r} is incomplete; resume from an earlier one.")
    return path
