"""Trains in forked children that die on purpose; prints as JSON how each ended.

Usage: killed.py FOLDER KIND=NAME:SCENARIO ...  with SCENARIO one of ``term`` (SIGTERM in mid-step), ``save:K`` (SIGKILL
when file K of the second checkpoint is opened), ``half`` (SIGKILL in the middle of trainer_state.json) and ``select``
(SIGKILL when the selection's manifest is about to be written).
"""

import json
import os
import signal
import sys
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState

from hf_eff.registry import get_method
from hf_eff.testing.trial import Trial

STEP = 2


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


class TerminateAt(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == STEP:
            os.kill(os.getpid(), signal.SIGTERM)


def kill_at_file(folder, number):
    """Die when the ``number``-th file (from 1) below a folder of this name is opened for writing."""
    opened = 0

    def hear(event, arguments):
        nonlocal opened
        if event == "open" and folder in str(arguments[0]) and _writes(arguments):
            opened += 1
            if opened == number:
                kill()

    sys.addaudithook(hear)


def _writes(arguments):
    mode, flags = arguments[1], arguments[2]
    return any(c in mode for c in "wax+") if isinstance(mode, str) else bool(flags & (os.O_WRONLY | os.O_RDWR))


def kill_in_state():
    """Die when half of the second checkpoint's trainer_state.json is written."""

    def half(self, path):
        text = json.dumps({"global_step": self.global_step, "log_history": self.log_history})
        Path(path).write_text(text[: len(text) // 2] if self.global_step == STEP else text)
        if self.global_step == STEP:
            kill()
        whole(self, path)

    whole = TrainerState.save_to_json
    TrainerState.save_to_json = half


def die(trainer, scenario):
    if scenario == "term":
        trainer.add_callback(TerminateAt())
    elif scenario == "half":
        kill_in_state()
    elif scenario == "select":
        kill_at_file(f"{os.sep}selection{os.sep}", 1)
    else:
        kill_at_file(f"checkpoint-{STEP}", int(scenario.removeprefix("save:")))
    trainer.train()


def main():
    folder, ends = Path(sys.argv[1]), {}
    for word in sys.argv[2:]:
        address, scenario = word.split(":", 1)
        child = os.fork()
        if child == 0:
            trial = Trial(get_method(*address.split("=")), folder / word.replace(":", "-"), accumulation=2)
            die(trial.build("run", save_strategy="steps", save_steps=1), scenario)
            os._exit(0)
        ends[word] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sys.stdout.write("ENDS " + json.dumps(ends) + "\n")


if __name__ == "__main__":
    main()
