"""One feature more than quickstart.py: train on exact match itself, which has no gradient, and keep a log of kilobytes.

Run: python examples/zo_exact_match.py
Then rebuild the trained adapter from its log: hf-eff replay out/zo_exact_match --model smollm2 --output out/rebuilt
"""

import torch

from hf_eff import BudgetedSFTConfig, GenerationObjective, ZOSFTTrainer
from hf_eff.testing.real import load_smollm2, reasoning_pool


def main(model, tokenizer, pool, max_new_tokens=2, output_dir="out/zo_exact_match", **options):
    args = BudgetedSFTConfig(
        output_dir=output_dir,
        memory="lora+mezo",  # few parameters make the estimate less noisy
        memory_kwargs={"mezo": {"eps": 5e-2, "save": "log"}},  # far enough that some answers change
        lr_scheduler_type="constant",
        **options,
    )
    trainer = ZOSFTTrainer(
        model=model,
        args=args,
        train_dataset=pool,
        processing_class=tokenizer,
        objective=GenerationObjective(tokenizer, "exact_match", max_new_tokens=max_new_tokens),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    model, tokenizer = load_smollm2(cache_dir="out/smollm2")
    trainer = main(
        model,
        tokenizer,
        pool=reasoning_pool(["syllogism"], per_family=64),
        max_steps=4,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        logging_steps=1,
        use_cpu=not torch.accelerator.is_available(),
    )
    print(trainer.plan)
    print(f"log: {trainer.args.output_dir}/replay.jsonl, {len(trainer.budgeted_run.replay_log)} steps")
