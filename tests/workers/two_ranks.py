"""One of two processes under torchrun: trains with every method and writes what the ranks agree on.

Usage: torchrun --nproc_per_node 2 two_ranks.py FOLDER
"""

import dataclasses
import gc
import hashlib
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from hf_eff.contracts.spec import KINDS
from hf_eff.errors import PlanError
from hf_eff.registry import get_method, list_methods
from hf_eff.testing.torchrun import leave
from hf_eff.testing.toys import half
from hf_eff.testing.trial import Trial, outcome_of, registered

SINGLE = dataclasses.replace(half.SPEC, traits=dataclasses.replace(half.SPEC.traits, ddp=False))


class Drifts(half.Half):
    """Moves other tensors on each rank."""

    def create_optimizer(self, context):
        return super().create_optimizer(dataclasses.replace(context, seed=dist.get_rank()))


DRIFTING = dataclasses.replace(half.SPEC, build=Drifts)


def digest(weights):
    whole = hashlib.sha256()
    for name in sorted(weights):
        whole.update(weights[name].contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def gathered(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def train(spec, folder, trainer_kind):
    trial = Trial(spec, folder, trainer_kind, accumulation=2, max_steps=3)
    with registered(spec):
        try:
            trainer = trial.build("run")
        except PlanError as refusal:
            return {"refused": str(refusal)}
        before = digest({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
        trainer.train()
    result = outcome_of(trainer)
    return {
        "world_size": trainer.args.world_size,
        "steps": gathered(result.steps),
        "weights": gathered(digest(result.weights)),
        "before": before,
        "spent": gathered(dict(result.spent)),
        "selection": gathered(result.selection),
    }


def main():
    folder = Path(sys.argv[1])
    gc.freeze()  # accelerate collects garbage after each training
    dist.init_process_group("gloo")
    specs = [get_method(kind, name) for kind in KINDS for name in list_methods(kind)]
    found = {}
    for spec in [*specs, SINGLE]:
        for trainer_kind in ("trainer", "sft"):
            key = f"{spec.kind}={spec.name}-{trainer_kind}"
            found[key] = train(spec, folder / key, trainer_kind)
    found["drifting"] = train(DRIFTING, folder / "drifting", "trainer")
    leave(found, folder)


if __name__ == "__main__":
    main()
