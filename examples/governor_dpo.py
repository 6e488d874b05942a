"""One feature more than quickstart.py: govern a TRL trainer that is not ours, with a callback alone.

The governor watches the held-out preference loss. The reference model's forwards count, too.

Run: python examples/governor_dpo.py
"""

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from hf_eff import GovernorCallback
from hf_eff.testing.real import load_smollm2


def sums(count):
    rows = [(i, 3 * i + 1) for i in range(count)]
    return [{"prompt": f"What is {a} + {b}?", "chosen": f" {a + b}", "rejected": f" {a - b}"} for a, b in rows]


def main(model, reference, tokenizer, budget="60Tflop", output_dir="out/governor_dpo", pairs=200, **options):
    trainer = DPOTrainer(
        model,
        ref_model=reference,
        args=DPOConfig(output_dir=output_dir, lr_scheduler_type="constant", **options),
        train_dataset=Dataset.from_list(sums(pairs)),
        eval_dataset=Dataset.from_list(sums(pairs + 16)[pairs:]),
        processing_class=tokenizer,
    )
    governor = GovernorCallback(
        "marginal_gain",
        budget=budget,
        governor_kwargs={"num_examples": 16, "probe_share": 0.1},
        trainer=trainer,  # lends its held-out pairs, its loss and its reference model
        log_path=f"{output_dir}/governor.jsonl",
    )
    trainer.add_callback(governor)
    trainer.train()
    return trainer, governor


if __name__ == "__main__":
    model, tokenizer = load_smollm2(cache_dir="out/smollm2")
    reference, _ = load_smollm2(cache_dir="out/smollm2")
    trainer, governor = main(
        model, reference, tokenizer, use_cpu=not torch.accelerator.is_available(), report_to="none"
    )
    print(f"ended: {governor.stop_reason or 'all steps done'} after step {trainer.state.global_step}")
    print(f"spent: {governor.ledger.spent()}, binding: {governor.ledger.binding()}")
