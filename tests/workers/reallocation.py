"""One of two processes under torchrun: rows change twice and the best weights come back; writes what each rank has.

Usage: torchrun --nproc_per_node 2 reallocation.py FOLDER
"""

import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from hf_eff.testing.torchrun import leave
from hf_eff.testing.toys import scripted
from hf_eff.testing.trial import Trial, registered

STEPS = 6


def gathered(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def weights(trainer):
    return [float(each.detach().double().sum()) for each in trainer.model.parameters()]


def rows_seen(trainer):
    """Rows of each micro-batch of this rank, without padding, as they come."""
    rows, stock = [], trainer.training_step

    def spy(model, inputs, num_items=None):
        rows.append(
            [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
        )
        return stock(model, inputs, num_items)

    trainer.training_step = spy
    return rows


def train(folder, name, resume=False, **changes):
    knobs = {
        "script": "1 refresh, 3 widen, 6 rises",
        "actions": "refresh+widen",
        "window_steps": 2,
        "restore_best": True,
    }
    arguments = {
        "selection": "perplexity",
        "selection_kwargs": {"num_examples": 20, "band": "high"},
        "governor_kwargs": knobs,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    trial = Trial(scripted.SPEC, folder, "trainer", 2, STEPS, arguments)
    with registered(scripted.SPEC):
        trainer = trial.build(name, **changes)
        rows = rows_seen(trainer)
        trainer.train(resume_from_checkpoint=str(folder / name / "checkpoint-3") if resume else None)
    return trainer, rows


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    gc.freeze()  # accelerate collects garbage after each training
    dist.init_process_group("gloo")
    trainer, rows = train(folder, "run")
    again, _ = train(folder, "run", resume=True)
    run = trainer.budgeted_run
    found = {
        "weights": gathered(weights(trainer)),
        "resumed": gathered(weights(again)),
        "rows": gathered(rows),
        "phases": gathered(trainer.selection_stage.phases.record()),
        "events": gathered([(e["action"], e.get("from_step")) for e in run.reallocation.events]),
        "best": gathered([run.best.step, run.weights_of_step]),
        "spent": gathered({name: trainer.ledger.spent()[name] for name in ("flops", "tokens")}),
        "governor": gathered(run.supervisor.state_dict()),
    }
    leave(found, folder)


if __name__ == "__main__":
    main()
