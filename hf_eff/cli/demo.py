"""``hf-eff demo``: select and train on a real model and real data, beside a random choice.

Two runs through the public trainer. The first selects by LESS and trains under a FLOP budget that
covers the selection, with the governor acting. The second draws rows at random and trains on as many
tokens. Both are judged on rows of the target that neither has seen.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_eff.cli import COMMANDS
from hf_eff.cli.embedded import FAMILIES, reasoning_pool, reasoning_target
from hf_eff.cli.flags import SentenceErrors
from hf_eff.cli.output import print_json, stdout_reserved
from hf_eff.errors import DataError
from hf_eff.files import require_writable, write_json, write_text
from hf_eff.report.markdown import table
from hf_eff.units import format_amount, format_seconds

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_eff.plan import Plan

BUDGET_SHARE = 1.15
"""Part of what the plan predicts for the whole first run that it may spend; lengths of rows are estimates."""


@dataclass(frozen=True)
class Size:
    """How much work a demo does."""

    families: int
    per_family: int
    target_rows: int
    test_rows: int
    keep: int
    steps: int
    dims: int
    checkpoints: int
    batch_size: int = 8


FULL = Size(families=12, per_family=40, target_rows=32, test_rows=64, keep=40, steps=10, dims=2048, checkpoints=1)
FAST = Size(families=6, per_family=12, target_rows=8, test_rows=16, keep=12, steps=4, dims=512, checkpoints=1)


@dataclass(frozen=True)
class Rows:
    """Pool, validation rows of the target (selection and governor see them), and test rows (nobody does)."""

    pool: Dataset
    target: Dataset
    test: Dataset
    target_name: str | None

    @property
    def chance(self) -> float | None:
        """Share of the pool that comes from the target's own family, in [0, 1]."""
        return None if self.target_name is None else _share(self.pool, self.target_name)


def run(argv: Sequence[str]) -> int:
    """Run both arms, print the comparison and write it as ``demo.json`` and ``demo.md``."""
    options = _options(argv)
    size = FAST if options.fast else FULL
    folder = require_writable(options.output_dir)
    # Intermediate scores of an earlier demo with other settings would be refused.
    shutil.rmtree(folder / "less" / "_selection_store", ignore_errors=True)
    with stdout_reserved(options.json):
        rows = load_demo_rows(options, size)
        outcome = compare(options, size, rows, folder)
        text = render(outcome)
    write_json(folder / "demo.json", outcome)
    write_text(folder / "demo.md", text)
    if options.json:
        print_json(outcome)
    else:
        print(text)
    return 0


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = SentenceErrors(prog="hf-eff demo", description=COMMANDS["demo"], allow_abbrev=False)
    add = parser.add_argument
    add("--fast", action="store_true", help="fewer families, rows and steps: under two minutes on two cores")
    add("--target", default="chain_sum", help=f"family to get better at (chain_sum); one of {', '.join(FAMILIES)}")
    add("--model", default="smollm2", help="Hub id or folder instead of the embedded model")
    add("--dataset", help="Hub id, folder or file instead of the embedded pool; then give --eval_dataset too")
    add("--eval_dataset", help="target rows of that dataset; half of them are kept for the final test")
    add("--memory", default="full", help="memory method of both runs (full)")
    add("--learning_rate", type=float, default=2e-5, help="constant learning rate of both runs (2e-5)")
    add("--budget", help="budget of the first run; by default 115%% of the FLOPs the plan predicts")
    add("--seed", type=int, default=0, help="equal seeds give equal runs (0)")
    add("--output_dir", type=Path, default=Path("demo_out"), help="folder of the results (demo_out)")
    add("--json", action="store_true", help="print one JSON object on stdout and the rest on stderr")
    return parser.parse_args(list(argv))


def load_demo_rows(options: argparse.Namespace, size: Size) -> Rows:
    """The embedded pool, or the rows that the flags name.

    Raises:
        DataError: A dataset is given without target rows, or the target is no family of the pool.
    """
    if options.dataset is None:
        families = [name for name in FAMILIES if name != options.target][: size.families - 1]
        pool = reasoning_pool([*families, options.target], size.per_family, options.seed)
        held_out = reasoning_target(options.target, size.target_rows + size.test_rows, options.seed)
        name, cut = options.target, size.target_rows
    else:
        if options.eval_dataset is None:
            raise DataError("--dataset needs --eval_dataset: the rows to get better at.")
        pool, held_out = _given_rows(options.dataset, held_out=False), _given_rows(options.eval_dataset, held_out=True)
        name, cut = _common_source(pool, held_out), len(held_out) // 2
        if cut < 1:
            raise DataError(f"--eval_dataset {options.eval_dataset!r} needs two rows or more.")
    return Rows(pool, held_out.select(range(cut)), held_out.select(range(cut, len(held_out))), name)


def _given_rows(name: str, *, held_out: bool) -> Dataset:
    from hf_eff.cli.columns import name_columns
    from hf_eff.cli.sources import load_rows

    return name_columns(load_rows(name, held_out=held_out), {}, name)


def _common_source(pool: Dataset, target: Dataset) -> str | None:
    """The one source of the target, where both sides name sources."""
    if "source" not in pool.column_names or "source" not in target.column_names:
        return None
    names = set(target["source"])
    return names.pop() if len(names) == 1 else None


def compare(options: argparse.Namespace, size: Size, rows: Rows, folder: Path) -> dict[str, Any]:
    """Run both arms.

    Returns:
        JSON-able figures of both, and what they were compared on.
    """
    chosen = {
        "selection": "less",
        "selection_kwargs": {
            "num_examples": min(size.keep, len(rows.pool) - 1),
            "dims": size.dims,
            "warmup_epochs": size.checkpoints,
            "warmup_fraction": 0.1,
            "dtype": "bfloat16",
            "gradient_tokens": 2048,
        },
        "governor": "marginal_gain",
        "governor_kwargs": {"num_examples": min(len(rows.target), 32), "probe_share": 0.1},
    }
    budget = options.budget or _budget(options, size, rows, folder, chosen)
    less = _arm(options, size, rows, folder / "less", {**chosen, "budget": budget})
    equal = {
        "selection": "random",
        "selection_kwargs": {"num_tokens": less["selected_tokens"]},
        "budget": f"{less['train_tokens']:.0f}tok",
    }
    random = _arm(options, size, rows, folder / "random", equal)
    return {
        "target": rows.target_name,
        "chance": rows.chance,
        "pool_rows": len(rows.pool),
        "budget": budget,
        "less": less,
        "random": random,
    }


def _budget(options: argparse.Namespace, size: Size, rows: Rows, folder: Path, chosen: dict[str, Any]) -> str:
    """A part of the FLOPs that the plan predicts for the whole run, selection included."""
    from hf_eff.cli.plan import preview
    from hf_eff.cli.run_flags import RunFlags

    flags = RunFlags(model=options.model, dataset="", cache_dir=str(folder / "model"))
    plan: Plan = preview(flags, _arguments(options, size, folder / "less", chosen), rows.pool, rows.target)
    print(plan)
    return f"{BUDGET_SHARE * sum(plan.flops.values()):.3g}flop"


def _arguments(options: argparse.Namespace, size: Size, folder: Path, chosen: dict[str, Any]) -> Any:
    from hf_eff.hardware.probe import hardware_facts
    from hf_eff.sft import BudgetedSFTConfig

    return BudgetedSFTConfig(
        output_dir=str(folder),
        memory=options.memory,
        **chosen,
        max_steps=size.steps,
        per_device_train_batch_size=size.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        bf16=True,
        use_cpu=hardware_facts().device == "cpu",
        gradient_checkpointing=False,
        max_length=256,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        seed=options.seed,
    )


def _arm(options: argparse.Namespace, size: Size, rows: Rows, folder: Path, chosen: dict[str, Any]) -> dict[str, Any]:
    """One run: fresh weights, test loss, training, test loss."""
    from hf_eff.cli.sources import load_model
    from hf_eff.sft import BudgetedSFTTrainer

    print(f"\n== {chosen['selection']}, budget {chosen['budget']}")
    model, tokenizer = load_model(options.model, cache_dir=str(folder.parent / "model"))
    trainer = BudgetedSFTTrainer(
        model=model,
        args=_arguments(options, size, folder, chosen),
        train_dataset=rows.pool,
        eval_dataset=rows.target,
        processing_class=tokenizer,
    )
    before = trainer.evaluate(rows.test, metric_key_prefix="test")["test_loss"]
    trainer.train()
    after = trainer.evaluate(rows.test, metric_key_prefix="test")["test_loss"]
    trainer.save_model()
    return {**_figures(trainer, rows), "loss_before": before, "loss_after": after, "report": str(folder / "report.md")}


def _figures(trainer: Any, rows: Rows) -> dict[str, Any]:
    """What a finished run chose and spent."""
    purposes, selection = trainer.ledger.by_purpose(), trainer.selection
    return {
        "rows": len(selection),
        "selected_tokens": selection.manifest["selection"]["num_tokens"],
        "target_share": None if rows.target_name is None else _share(selection.apply(rows.pool), rows.target_name),
        "steps": trainer.state.global_step,
        "train_tokens": purposes["train"]["tokens"],
        "flops": {name: amounts["flops"] for name, amounts in purposes.items()},
        "seconds": {name: amounts["seconds"] for name, amounts in purposes.items()},
        "ended": trainer.report["binding"]["stopped_by"] or "all planned steps done",
    }


def _share(rows: Dataset, source: str) -> float:
    return list(rows["source"]).count(source) / len(rows)


def render(outcome: dict[str, Any]) -> str:
    """The comparison as a Markdown table, ending in a newline."""
    arms = [outcome["less"], outcome["random"]]
    chance = outcome["chance"]
    share = "share of picks from the target" + ("" if chance is None else f" (chance {chance:.2f})")
    lines = [
        (share, *(_figure(arm["target_share"]) for arm in arms)),
        ("rows chosen", *(f"{arm['rows']} of {outcome['pool_rows']}" for arm in arms)),
        ("test loss before (nats per token)", *(f"{arm['loss_before']:.3f}" for arm in arms)),
        ("test loss after", *(f"{arm['loss_after']:.3f}" for arm in arms)),
        ("optimizer steps", *(arm["steps"] for arm in arms)),
        ("training tokens", *(format_amount("tokens", arm["train_tokens"]) for arm in arms)),
        ("compute spent", *(format_amount("flops", sum(arm["flops"].values())) for arm in arms)),
        ("  of it on selection", *(format_amount("flops", arm["flops"]["select"]) for arm in arms)),
        ("  of it on probes", *(format_amount("flops", arm["flops"]["probe"]) for arm in arms)),
        ("time selecting", *(format_seconds(arm["seconds"]["select"]) for arm in arms)),
        ("time training", *(format_seconds(arm["seconds"]["train"]) for arm in arms)),
        ("time probing", *(format_seconds(arm["seconds"]["probe"]) for arm in arms)),
        ("ended by", *(arm["ended"] for arm in arms)),
        ("report", *(arm["report"] for arm in arms)),
    ]
    title = f"Target {outcome['target'] or 'rows'}; budget of the first run {outcome['budget']}, selection included."
    return f"{title}\n\n{table(['', 'less', 'random'], lines)}\n"


def _figure(value: float | None) -> str:
    return "unavailable" if value is None else f"{value:.2f}"
