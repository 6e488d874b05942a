"""A real training step of a memory method in a process of its own, so that what it leaves behind counts for no other.

``measure_step`` starts the process; ``hf_eff.measured_step_worker`` is what runs in it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_eff.hardware.probe import hardware_facts
from hf_eff.options import EffOptions
from hf_eff.units import format_bytes

WORKER = "hf_eff.measured_step_worker"
REQUEST, RESULT, MODEL = "request.json", "result.json", "model"
_IDLE_BYTES = 700 * 2**20  # of the interpreter with torch and transformers, before there is a model


@dataclass(frozen=True)
class StepRequest:
    """What is trained, whatever the method.

    Attributes:
        config: A transformers configuration.
        architecture: Class of the model in transformers.
        dtype: Type of the weights.
        frozen: Names of parameters that do not train.
        setting: ``bf16``, ``activation_checkpointing`` and ``optim`` of the training arguments.
    """

    config: Any
    architecture: str
    dtype: str = "float32"
    frozen: tuple[str, ...] = ()
    setting: Mapping[str, Any] = field(default_factory=dict)


def measure_step(
    request: StepRequest, options: EffOptions, batch_size: int, length: int, predicted_bytes: float
) -> dict[str, Any]:
    """Train two optimizer steps (the first makes the optimizer's state) on random weights and tokens.

    Args:
        request: What is trained.
        options: With which memory methods.
        batch_size: Rows of a micro-batch.
        length: Tokens of each row.
        predicted_bytes: Predicted peak; nothing is started where it exceeds the free memory.

    Returns:
        ``bytes`` by term, their measured peak ``total``, and the bytes ``predicted`` for the layers that trained; or
        ``failed``, a sentence that says why there are none, with ``out_of_memory`` and whether it was that.
    """
    facts = hardware_facts()
    needed = predicted_bytes + (_IDLE_BYTES if facts.device == "cpu" else 0)
    if needed > facts.free_bytes:
        return _failure(
            f"not measured: it is predicted to need {format_bytes(needed)} with the process itself, and "
            f"{format_bytes(facts.free_bytes)} are free",
            out_of_memory=True,
        )
    with tempfile.TemporaryDirectory(prefix="hf_eff-") as name:
        folder = Path(name)
        request.config.save_pretrained(folder / MODEL)
        words = {
            each.name: getattr(request, each.name) for each in dataclasses.fields(request) if each.name != "config"
        }
        words.update(memory=options.memory, memory_kwargs=dict(options.memory_kwargs), batch_size=batch_size)
        text = json.dumps({**words, "setting": dict(request.setting), "length": length})
        (folder / REQUEST).write_text(text, encoding="utf-8")
        return _run(folder)


def _run(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", WORKER, str(folder)]
    # Freed memory goes back to the system at once, so that the peak is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603 - ours
    if (folder / RESULT).is_file():
        result: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        return result
    if done.returncode == -signal.SIGKILL:
        return _failure("ran out of memory: the system ended the process", out_of_memory=True)
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    memory = "MemoryError" in last or "bad_alloc" in done.stderr
    why = "ran out of memory" if memory else f"the process ended with code {done.returncode}"
    return _failure(f"{why} ({last})", out_of_memory=memory)


def _failure(sentence: str, *, out_of_memory: bool) -> dict[str, Any]:
    return {"failed": sentence, "out_of_memory": out_of_memory}
