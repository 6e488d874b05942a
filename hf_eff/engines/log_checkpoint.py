"""Checkpoints of zeroth-order runs that hold the replay log instead of weights: kilobytes for any model.

The log says how each step moved the weights, so they are rebuilt from those that the run started from. A digest of the
weights at the checkpoint stands in the log's last line, and a rebuilt model must have the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_eff.engines.replay import replay
from hf_eff.engines.replay_log import ReplayLog
from hf_eff.engines.replay_origin import require_origin, restore_initial_adapter
from hf_eff.errors import CheckpointError

REPLAY_LOG = "replay.jsonl"


def replay_log(parts: Iterable[Any]) -> ReplayLog | None:
    """The log of the one memory method that keeps one, if it has begun."""
    keepers = (part for part in parts if callable(getattr(part, "save_log", None)))
    optimizer = next((part.optimizer for part in keepers), None)
    return None if optimizer is None else optimizer.log


def write_log(path: Path, log: ReplayLog, model: nn.Module) -> None:
    """Write a log and the digest of the weights that it leads to, atomically.

    Args:
        path: The file.
        log: The run so far.
        model: Its model, unwrapped. Of one whose parameters are divided among processes no digest is taken.
    """
    log.save(path, None if _is_sharded(model) else weights_sha256(model, log))


def is_log_checkpoint(folder: Path) -> bool:
    """Whether a checkpoint holds a log in the place of weights."""
    return (folder / REPLAY_LOG).is_file()


def is_whole_log(path: Path) -> bool:
    """Whether a log can be read and is as it was written."""
    try:
        ReplayLog.load(path)
    except (CheckpointError, OSError):
        return False
    return True


def load_log_checkpoint(folder: Path, model: nn.Module, run_folder: Path) -> None:
    """Rebuild the weights of a checkpoint in a model that has those of the run's start.

    Args:
        folder: The checkpoint.
        model: Unwrapped; changed in place.
        run_folder: Folder of the run, with the first weights of an adapter that no seed makes again.

    Raises:
        CheckpointError: The log is damaged, or the model has other weights than the run started from.
    """
    log = ReplayLog.load(folder / REPLAY_LOG)
    restore_initial_adapter(model, log, run_folder)
    rebuild(model, log, recorded_weights(folder / REPLAY_LOG))


def rebuild(
    model: nn.Module, log: ReplayLog, recorded: str | None = None, until_step: int | None = None
) -> tuple[str, bool]:
    """Replay a run and compare the result with what the run had.

    Args:
        model: Has the weights that the run started from; changed in place.
        log: The run.
        recorded: Digest of the weights after the log's last step, or None where the run took none.
        until_step: Steps after which to end; None for all.

    Returns:
        Digest of the weights, and whether it was compared with the run's own.

    Raises:
        CheckpointError: Something is other than in the run.
    """
    require_origin(model, log.header)
    replay(model, log, until_step)
    found = weights_sha256(model, log)
    comparable = recorded is not None and until_step in (None, last_step(log))
    if comparable and found != recorded:
        raise CheckpointError(
            "the rebuilt weights are not those of the run: their digest differs, although the log is whole and the "
            "samples of the first weights agree; load the very weights that the run started from."
        )
    return found, comparable


def last_step(log: ReplayLog) -> int:
    """Steps after which the log ends, counted from the start of training."""
    return log.records[-1].step + 1 if log.records else 0


def recorded_weights(path: Path) -> str | None:
    """Digest of the weights in a log's last line; None where there is none."""
    end = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
    return end.get("weights") if isinstance(end, dict) else None


@torch.no_grad()
def weights_sha256(model: nn.Module, log: ReplayLog) -> str:
    """SHA-256 of every bit of the trained parameters and their names, in the log's order."""
    every, digest = dict(model.named_parameters(remove_duplicate=False)), hashlib.sha256()
    for name, *_ in log.header.parameters:
        digest.update(name.encode())
        flat = every[name].detach().reshape(-1).view(torch.uint8)
        for piece in flat.split(2**26):  # a part at a time: host memory need not hold the parameter twice
            digest.update(memoryview(piece.cpu().numpy()))
    return digest.hexdigest()


def _is_sharded(model: nn.Module) -> bool:
    from hf_eff.engines.sharded_weights import is_sharded

    return is_sharded(model)
