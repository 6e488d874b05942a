"""One feature more than quickstart.py: compare memory methods, first on paper, then by running each for a few steps.

Run: python examples/compare_memory.py
"""

import torch

from hf_eff import BudgetedSFTConfig, BudgetedSFTTrainer, profile_memory
from hf_eff.testing.real import load_smollm2, reasoning_pool
from hf_eff.units import format_bytes

METHODS = {"full": {}, "lora": {}, "badam": {"switch_every": 1}, "mezo": {}}


def main(load, pool, methods=METHODS, output_dir="out/compare_memory", **options):
    model, _ = load()
    print(profile_memory(model.config, memory=list(methods), batch_size=2, max_length=128))  # no weights needed
    peaks = {}
    for name, memory_kwargs in methods.items():
        model, tokenizer = load()  # fresh weights for each
        args = BudgetedSFTConfig(
            output_dir=f"{output_dir}/{name}",
            memory=name,
            memory_kwargs=memory_kwargs,
            budget="4steps",
            per_device_train_batch_size=2,
            max_length=128,
            save_strategy="no",
            **options,
        )
        trainer = BudgetedSFTTrainer(model=model, args=args, train_dataset=pool, processing_class=tokenizer)
        trainer.train()
        peaks[name] = trainer.report["memory"]["peak"]
    return peaks


if __name__ == "__main__":
    peaks = main(
        lambda: load_smollm2(cache_dir="out/smollm2"),
        reasoning_pool(per_family=4),
        use_cpu=not torch.accelerator.is_available(),
    )
    for name, peak in peaks.items():
        measured = "unavailable" if peak["measured"] is None else format_bytes(peak["measured"])
        print(f"{name:<8}predicted {format_bytes(peak['predicted']):>12}   measured {measured:>12}")
