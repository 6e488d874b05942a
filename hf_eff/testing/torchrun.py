"""Tests over several processes: launch a script as torchrun does, and leave it without torch's crash at exit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

FOUND = "found.json"


def torchrun(script: Path, *arguments: str, processes: int = 2, timeout: float = 900.0) -> None:
    """Run a script on several processes of this machine and wait for them.

    Args:
        script: What each of them runs.
        arguments: Passed on to it.
        processes: How many.
        timeout: Seconds to wait at most.

    Raises:
        AssertionError: A process failed; the message has the end of what they printed.
        subprocess.TimeoutExpired: They took longer.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(  # noqa: S603 - a test names the script
        [*launcher, str(script), *arguments], capture_output=True, text=True, check=False, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-6000:]


def leave(found: Any, folder: Path) -> NoReturn:
    """The last call of such a script: the first process writes what was found, JSON-able, and all of them end.

    Gloo's threads may hold tensors that Python knows; one let go while the interpreter shuts down aborts the process
    (https://github.com/pytorch/pytorch/pull/179291). So it is not shut down.

    Args:
        found: What to write.
        folder: Where ``found.json`` goes.
    """
    if dist.get_rank() == 0:
        (folder / FOUND).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
