"""One feature more than quickstart.py: watch a governor without letting it act, then read what it saw and decided.

Run: python examples/governed_sft.py
"""

import torch

from hf_eff import BudgetedSFTConfig, BudgetedSFTTrainer
from hf_eff.governor import GovernorLog
from hf_eff.testing.real import load_smollm2, reasoning_pool, reasoning_target


def main(model, tokenizer, pool, target, budget="60Tflop", output_dir="out/governed_sft", **options):
    args = BudgetedSFTConfig(
        output_dir=output_dir,
        governor="marginal_gain",
        governor_mode="observe",  # "act" ends the run, "advise" says when it would
        governor_kwargs={"num_examples": 16, "probe_share": 0.1},
        budget=budget,  # is kept whatever the governor says
        **options,
    )
    trainer = BudgetedSFTTrainer(
        model=model, args=args, train_dataset=pool, eval_dataset=target, processing_class=tokenizer
    )
    trainer.train()
    return trainer, GovernorLog(f"{output_dir}/governor.jsonl").decisions()


if __name__ == "__main__":
    model, tokenizer = load_smollm2(cache_dir="out/smollm2")
    trainer, looks = main(
        model,
        tokenizer,
        pool=reasoning_pool(["chain_sum"], per_family=200),
        target=reasoning_target("chain_sum"),
        lr_scheduler_type="constant",
        use_cpu=not torch.accelerator.is_available(),
    )
    for look in looks:
        print(f"step {look.telemetry.step:3}: {look.decision.action}, {look.decision.reason}")
    print(f"spent: {trainer.ledger.spent()}")
