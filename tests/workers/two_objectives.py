"""One of two processes under torchrun: trains on an objective whose value differs by rank.

Usage: torchrun --nproc_per_node 2 two_objectives.py FOLDER
"""

import gc
import hashlib
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from hf_eff import BudgetedTrainingArguments, ZOTrainer
from hf_eff.testing.tiny import collator, tiny_model, tiny_pool, tiny_tokenizer, tokenised
from hf_eff.testing.torchrun import leave


class Alternating:
    """(rank + 1) above, -(rank + 1) below."""

    def __init__(self):
        self.sign = -1.0

    def __call__(self, model, inputs):
        self.sign = -self.sign
        return self.sign * (dist.get_rank() + 1)


def gathered(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def main():
    folder = Path(sys.argv[1])
    gc.freeze()  # accelerate collects garbage after each training
    dist.init_process_group("gloo")
    args = BudgetedTrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-6,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        ddp_backend="gloo",
    )
    trainer = ZOTrainer(
        model=tiny_model(1, 16),
        args=args,
        train_dataset=tokenised(tiny_pool(16)),
        data_collator=collator(tiny_tokenizer()),
        objective=Alternating(),
    )
    trainer.train()
    weights = hashlib.sha256()
    for _, parameter in sorted(trainer.model.named_parameters()):
        weights.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    found = {
        "coefficients": gathered([record.coefficients[0] for record in trainer.budgeted_run.replay_log.records]),
        "weights": gathered(weights.hexdigest()),
    }
    leave(found, folder)


if __name__ == "__main__":
    main()
