"""One of two processes under torchrun: scores the toy pool with every selector, alone and together.

Usage: torchrun --nproc_per_node 2 two_scorers.py FOLDER
"""

import gc
import sys
from pathlib import Path

import torch.distributed as dist

from hf_eff.engines.ranks import Ranks
from hf_eff.registry import get_method, list_methods
from hf_eff.testing.selection_scene import make_context, pick
from hf_eff.testing.torchrun import leave


class Passes:
    """Rows that go through a model."""

    def __init__(self, *models):
        self.rows = 0
        self._handles = [
            model.get_input_embeddings().register_forward_pre_hook(self._count) for model in models if model is not None
        ]

    def _count(self, _module, inputs):
        self.rows += len(inputs[0])

    def close(self):
        for handle in self._handles:
            handle.remove()


def choose(spec, **changes):
    spent = []
    context = make_context(spec, spend=lambda flops, tokens: spent.append((flops, tokens)), **changes)
    counter = Passes(context.model, context.proxy.model if context.proxy else None)
    picks = pick(spec, context)
    counter.close()
    return {
        "positions": picks.positions.tolist(),
        "scores": None if picks.scores is None else [f"{score:.6g}" for score in picks.scores],
        "rows": counter.rows,
        "flops": sum(flops for flops, _ in spent),
    }


def gathered(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def main():
    folder = Path(sys.argv[1])
    gc.freeze()  # accelerate collects garbage after each training
    dist.init_process_group("gloo")
    ranks = Ranks()
    found = {}
    for name in list_methods("selection"):
        spec = get_method("selection", name)
        together = choose(spec, processes=ranks)
        stored = choose(spec, processes=ranks, folder=folder / f"{name}-{ranks.rank}")
        found[name] = {"alone": choose(spec), "together": gathered(together), "stored": gathered(stored)}
    leave(found, folder)


if __name__ == "__main__":
    main()
