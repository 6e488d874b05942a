"""One of two processes under torchrun: trains sharded, is cut and resumed, and writes what came out.

Usage: torchrun --nproc_per_node 2 fsdp2.py FOLDER

accelerate shards on accelerators only and ignores ``fsdp`` on a CPU; ``shard_on_cpu`` changes that, for tests.
"""

import dataclasses
import hashlib
import json
import sys
import traceback
import warnings
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
from hf_eff.testing.trial import registered

CUT, END, ROWS = 3, 6, 24
BLOCKS = {"switch_every": 2, "mode": "ascending"}
CASES = {
    "full": {"memory": "full"},
    "badam": {"memory": "badam", "memory_kwargs": BLOCKS},
    "badam, accumulated": {
        "memory": "badam",
        "memory_kwargs": BLOCKS,
        "gradient_accumulation_steps": 2,
    },
    "badam, bf16": {"memory": "badam", "memory_kwargs": BLOCKS},
    "badam, state kept": {"memory": "badam", "memory_kwargs": {"switch_every": 1, "mode": "ascending", "state_policy": "keep"}},
    "badam, state on disk": {"memory": "badam", "memory_kwargs": {"switch_every": 1, "mode": "ascending", "state_policy": "disk"}},
    "badam, checkpointed": {"memory": "checkpointing+badam", "memory_kwargs": {"badam": BLOCKS}},
    "badam, rows in chunks": {"memory": "row_chunks+badam", "memory_kwargs": {"badam": BLOCKS}},
    "lisa": {"memory": "lisa", "memory_kwargs": {"switch_every": 2, "active_layers": 1}},
    "hift": {"memory": "hift", "memory_kwargs": {"switch_every": 2}},
    "lora": {"memory": "lora"},
    "mezo": {"memory": "mezo"},
    "fused": {"memory": "fused", "memory_kwargs": {"rule": "sgd"}, "max_grad_norm": 0.0},
    "galore": {"memory": "galore"},
    "apollo": {"memory": "apollo"},
    "chunked_loss": {"memory": "chunked_loss+full"},
    "top_layers": {"memory": "top_layers"},
}


def shard_on_cpu():
    """Let accelerate shard under gloo."""
    start = AcceleratorState.__init__

    def starts(self, *args, fsdp_plugin=None, **kwargs):
        start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = starts


def build(folder, case, **changes):
    """A trainer over a model of three layers; sharded where there are two processes."""
    options = {
        "output_dir": str(folder),
        "budget": "1e12flop",
        "per_device_train_batch_size": 4,
        "max_steps": END,
        "learning_rate": 1e-2,
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
        train_dataset=tokenised(tiny_pool(ROWS)),
        data_collator=collator(),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


SHARDED = {
    "per_device_train_batch_size": 2,
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "state_dict_type": "FULL_STATE_DICT",
    },
}


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
    trainer = build(folder, case, **SHARDED)
    trainer.train()
    weights = whole_weights(trainer)
    resumed = build(folder, case, **SHARDED)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{CUT}"))
    if dist.get_rank() == 0:
        save_file(weights, folder / "weights.safetensors")
    return {
        "sharded": all(isinstance(each, DTensor) for each in trainer.model.parameters()),
        "weights": gathered(digest(weights)),
        "resumed": gathered(digest(whole_weights(resumed))),
        "spent": gathered({k: v for k, v in trainer.ledger.spent().items() if k in ("flops", "tokens", "steps")}),
        "states": states_held(trainer),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def attempt(folder, name):
    import contextlib

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
    dist.init_process_group("gloo")
    shard_on_cpu()
    names = sys.argv[2:] or list(CASES)
    found = {name: attempt(folder, name) for name in names}
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
