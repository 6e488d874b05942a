"""One of two processes under torchrun: trains sharded, is cut and resumed, and writes what came out.

Usage: torchrun --nproc_per_node 2 fsdp2.py FOLDER

accelerate shards on accelerators only and ignores ``fsdp`` on a CPU; ``shard_on_cpu`` changes that, for tests.
"""

import contextlib
import dataclasses
import gc
import hashlib
import sys
import traceback
import warnings
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import PrinterCallback

from hf_eff import BudgetedTrainer, BudgetedTrainingArguments
from hf_eff.registry import get_method
from hf_eff.testing.tiny import collator, tiny_model, tiny_pool, tokenised
from hf_eff.testing.torchrun import leave
from hf_eff.testing.trial import registered

CUT, END, ROWS = 3, 6, 24
BLOCKS = {"switch_every": 2, "mode": "ascending"}
EACH_STEP = {"switch_every": 1, "mode": "ascending"}
FAR = {"learning_rate": 1e-4, "memory_kwargs": {"eps": 1.0}}
"""A small eps would carry the last bits of two losses into the weights 500-fold."""
CASES = {
    "badam, accumulated, DDP": {  # first: accelerate does not go back from shards to replicas
        "memory": "badam",
        "memory_kwargs": BLOCKS,
        "gradient_accumulation_steps": 2,
    },
    "full": {"memory": "full"},
    "badam, bf16": {"memory": "badam", "memory_kwargs": BLOCKS},
    "badam, state kept": {"memory": "badam", "memory_kwargs": {**EACH_STEP, "state_policy": "keep"}},
    "badam, accumulated, sharded checkpoint": {
        "memory": "badam",
        "memory_kwargs": BLOCKS,
        "gradient_accumulation_steps": 2,
    },
    "row_chunks+checkpointing+badam": {"memory": "row_chunks+checkpointing+badam", "memory_kwargs": {"badam": BLOCKS}},
    "lisa": {"memory": "lisa", "memory_kwargs": {"switch_every": 2, "active_layers": 1}},
    "hift": {"memory": "hift"},
    "lora+badam": {"memory": "lora+badam", "memory_kwargs": {"badam": BLOCKS}},
    "fused": {"memory": "fused", "memory_kwargs": {"rule": "sgd", "clip": "two_backwards"}},
    "top_layers": {"memory": "top_layers", "memory_kwargs": {"layers": 1}},
    "mezo": {"memory": "mezo", "gradient_accumulation_steps": 2, **FAR},
    "mezo, momentum": {"memory": "mezo", **FAR, "memory_kwargs": {"eps": 1.0, "num_directions": 2, "momentum": 0.5}},
    "lozo": {"memory": "lozo", **FAR, "memory_kwargs": {"eps": 1.0, "refresh_every": 2}},
    "subzero": {"memory": "subzero", **FAR, "memory_kwargs": {"eps": 1.0, "rank": 4, "refresh_every": 2}},
}
PROMISED = (
    *("full", "badam", "hift", "lisa", "lora", "fused", "top_layers", "checkpointing", "row_chunks"),
    *("mezo", "lozo", "subzero"),
)
"""Methods that the cases above show to work sharded."""


def shard_on_cpu():
    """Let accelerate shard under gloo."""
    start = AcceleratorState.__init__

    def starts(self, *args, fsdp_plugin=None, **kwargs):
        start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = starts


@cache
def rows():
    return tokenised(tiny_pool(ROWS))


def build(folder, case, **changes):
    """A trainer over a model of three layers; sharded where there are two processes."""
    options = {
        "output_dir": str(folder),
        "budget": "1e12flop",
        "per_device_train_batch_size": 4,
        "max_steps": END,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-3,  # updates in proportion to gradients, so that rounding stays rounding
        "warmup_steps": 1,
        "save_strategy": "steps",
        "save_steps": CUT,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    model = tiny_model(layers=3, width=32, tie_word_embeddings=False)
    model = model.to(torch.bfloat16) if "bf16" in str(folder) else model
    trainer = BudgetedTrainer(
        model=model,
        args=BudgetedTrainingArguments(**{**options, **case, **changes}),
        train_dataset=rows(),
        data_collator=collator(),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def sharded(name):
    """Arguments of one of two processes."""
    if name.endswith("DDP"):
        return {"per_device_train_batch_size": 2}
    kind = "SHARDED_STATE_DICT" if "sharded checkpoint" in name else "FULL_STATE_DICT"
    layers = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": kind}
    return {"per_device_train_batch_size": 2, "fsdp": True, "fsdp_config": layers}


def sharding_specs(case):
    """Methods of a case with the promise under test made."""
    specs = [get_method("memory", name) for name in case["memory"].split("+")]
    return [dataclasses.replace(spec, traits=dataclasses.replace(spec.traits, fsdp2=True)) for spec in specs]


def whole_weights(trainer):
    tensors = {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).clone().contiguous() for n, t in tensors.items()}


def digest(weights):
    whole = hashlib.sha256()
    for name in sorted(weights):
        whole.update(weights[name].view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def gathered(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def states_held(trainer):
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return sum(1 for state in optimizer.state.values() if state)


def train(folder, case):
    trainer = build(folder, case, **sharded(folder.name))
    trainer.train()
    weights = whole_weights(trainer)
    resumed = build(folder, case, **sharded(folder.name))
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{CUT}"))
    if dist.get_rank() == 0:
        save_file(weights, folder / "weights.safetensors")
    return {
        "sharded": all(isinstance(each, DTensor) for each in trainer.model.parameters()),
        "weights": gathered(digest(weights)),
        "resumed": gathered(digest(whole_weights(resumed))),
        "spent": gathered({k: v for k, v in trainer.ledger.spent().items() if k in ("flops", "tokens", "steps")}),
        "states": states_held(trainer),
    }


def attempt(folder, name):
    case = CASES[name]
    with contextlib.ExitStack() as stack:
        for spec in sharding_specs(case):
            stack.enter_context(registered(spec))
        try:
            return train(folder / name, case)
        except Exception:  # noqa: BLE001 - the other cases shall still be told
            return {"failed": traceback.format_exc()[-3000:]}


def main():
    folder = Path(sys.argv[1])
    warnings.simplefilter("ignore")
    gc.freeze()  # accelerate collects garbage after each training
    dist.init_process_group("gloo")
    shard_on_cpu()
    found = {name: attempt(folder, name) for name in sys.argv[2:] or CASES}
    leave(found, folder)


if __name__ == "__main__":
    main()
