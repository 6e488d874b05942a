"""``hf-eff select``: choose rows of a dataset and write their manifest; trains nothing."""

from __future__ import annotations

import argparse
import collections
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_eff.cli import COMMANDS
from hf_eff.cli.flags import SentenceErrors, read_config
from hf_eff.errors import DataError, OptionError
from hf_eff.files import require_writable
from hf_eff.units import format_amount

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_eff.manifest import Selection

_DRIVER_OPTIONS = ("max_length", "batch_tokens", "id_column", "learning_rate", "train_epochs")


def run(argv: Sequence[str]) -> int:
    """Select and save; print where the manifest lies. Ctrl-C keeps what was scored."""
    options = parse_select(argv)
    if options.dry_run:
        return _dry_run(options)
    folder = require_writable(options.output_dir)
    from hf_eff.cli.output import print_json, stdout_reserved

    try:
        with stdout_reserved(options.json):
            pool, selection = _select(options, folder)
    except KeyboardInterrupt:
        print("hf-eff: interrupted; the same command goes on from what was scored.", file=sys.stderr)
        return 130
    summary = _summary(pool, selection)
    if options.json:
        print_json({"manifest": str(folder / "manifest.json"), **summary})
    else:
        lines = {**summary, **_readable(summary), "manifest": folder / "manifest.json"}
        print("\n".join(f"{key:<12}{value}" for key, value in lines.items()))
    return 0


def parse_select(argv: Sequence[str]) -> argparse.Namespace:
    """Read flags and ``--config``; names are those of the training arguments.

    Raises:
        OptionError: A flag or value is wrong.
    """
    config, words = read_config(argv)
    parser = SentenceErrors(prog="hf-eff select", description=COMMANDS["select"], allow_abbrev=False)
    add = parser.add_argument
    add("--config", help="YAML file with any of these options; flags override it")
    add("--dataset", required=True, help="Hub id, folder, file or 'reasoning-gym[:family]'")
    add("--dataset_config", help="configuration of a Hub dataset")
    add("--split", default="train", help="split to choose from (train)")
    add("--selection", default="less", help="selection method (less); 'hf-eff methods selection' lists them")
    add("--selection_kwargs", default="{}", help="options of the method as JSON, such as '{\"fraction\": 0.1}'")
    add("--eval_dataset", help="target rows, for methods that need them")
    add("--eval_split", help="split of the target")
    add("--model", help="model that scores: Hub id, folder or 'smollm2'")
    add("--dtype", default="float32", help="type of its weights (float32)")
    add("--cache_dir", help="folder that keeps the converted 'smollm2'")
    add("--output_dir", default="selection", help="folder of manifest.json and train.parquet (selection)")
    add("--budget", help="limit of what selecting may spend, such as '1e15flop, 10min'")
    add("--seed", type=int, default=0, help="equal seeds give equal selections (0)")
    add("--max_length", type=int, help="tokens at which rows are cut (1024)")
    add("--batch_tokens", type=int, help="padded tokens in one scoring batch (16384)")
    add("--learning_rate", type=float, help="learning rate of the run to come (2e-5)")
    add("--id_column", help="column whose value the manifest records for each row")
    add("--text_column", help="column that holds whole texts")
    add("--prompt_column", help="column that holds prompts")
    add("--completion_column", help="column that holds answers")
    add("--dry-run", action="store_true", help="print what selecting would cost and whether it pays; spends nothing")
    add("--train_model", help="model that will be trained on the choice, where it is not --model (dry run)")
    add("--train_epochs", type=float, default=3.0, help="epochs it will be trained for (3)")
    add(
        "--measured",
        type=Path,
        help="JSON lines of trainings done: selection, flops, value; for the dry run's speed-up",
    )
    add("--json", action="store_true", help="print one JSON object on stdout and the rest on stderr")
    parser.apply_config(config)
    options, rest = parser.parse_known_args(words)
    parser.refuse_unknown(rest)
    options.selection_kwargs = _mapping(options.selection_kwargs)
    _refuse_idle(options)
    return options


def _refuse_idle(options: argparse.Namespace) -> None:
    """Refuse flags that only a dry run reads."""
    idle = [f"--{name}" for name in ("train_model", "measured") if getattr(options, name) is not None]
    if idle and not options.dry_run:
        raise OptionError(f"{' and '.join(idle)} say what a dry run compares with; add --dry-run or leave them out.")


def _mapping(value: Any) -> dict[str, Any]:
    """JSON from a flag, or the mapping that YAML gives."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise OptionError(f"selection_kwargs={value!r} is not JSON ({error.msg}).") from None
    if not isinstance(found, dict):
        raise OptionError(f"selection_kwargs must be a mapping of option names to values, got {found!r}.")
    return found


def _dry_run(options: argparse.Namespace) -> int:
    """Print cost and pay-back of the choice, from configurations and a sample of the rows."""
    from hf_eff.cli.columns import name_columns
    from hf_eff.cli.output import print_json, stdout_reserved
    from hf_eff.cli.pay_back import pay_back_lines, selection_plan
    from hf_eff.cli.sources import load_rows

    names = {"text": options.text_column, "prompt": options.prompt_column, "completion": options.completion_column}
    with stdout_reserved(options.json):
        rows = load_rows(options.dataset, split=options.split, config=options.dataset_config)
        target = _target(options, needed=False, names=names)
        facts = selection_plan(options, name_columns(rows, names, options.dataset), target)
    if options.json:
        print_json(facts)
    else:
        print("\n".join(pay_back_lines(facts)))
    return 0


def _select(options: argparse.Namespace, folder: Path) -> tuple[Dataset, Selection]:
    """Load only what the method needs, then run it."""
    from hf_eff.cli.columns import name_columns
    from hf_eff.cli.sources import load_model, load_rows
    from hf_eff.selection import choose_pool, select_dataset

    # Names and bounds, before anything is loaded.
    specs = [chosen.spec for chosen in choose_pool(options.selection, options.selection_kwargs).stages]
    scores = any(spec.traits.needs_model for spec in specs)
    names = {"text": options.text_column, "prompt": options.prompt_column, "completion": options.completion_column}
    pool = name_columns(
        load_rows(options.dataset, split=options.split, config=options.dataset_config), names, options.dataset
    )
    target = _target(options, needed=any(spec.traits.needs_reference_set for spec in specs), names=names)
    if options.model is None and (scores or "input_ids" not in pool.column_names):
        raise DataError(
            f"selection={options.selection!r} needs --model, whose tokenizer (and, to score, whose weights) it uses."
        )
    model, tokenizer = None, None
    if options.model is not None:
        model, tokenizer = load_model(options.model, options.dtype, options.cache_dir)
    driver = {name: getattr(options, name) for name in _DRIVER_OPTIONS if getattr(options, name) is not None}
    selection = select_dataset(
        pool,
        options.selection,
        target=target,
        model=model if scores else None,
        processing_class=tokenizer,
        seed=options.seed,
        output_dir=folder,
        budget=options.budget,
        **driver,
        **options.selection_kwargs,
    )
    return pool, selection


def _target(options: argparse.Namespace, *, needed: bool, names: dict[str, str | None]) -> Dataset | None:
    from hf_eff.cli.columns import name_columns
    from hf_eff.cli.sources import load_rows

    name = options.eval_dataset or (options.dataset if options.eval_split else None)
    if name is None:
        if needed:
            raise DataError(f"selection={options.selection!r} needs target rows; give --eval_dataset or --eval_split.")
        return None
    rows = load_rows(name, split=options.eval_split or "train", config=options.dataset_config, held_out=True)
    return name_columns(rows, names, name)


def _summary(pool: Dataset, selection: Selection) -> dict[str, Any]:
    about, cost = selection.manifest["selection"], selection.manifest["cost"]
    summary = {
        "method": about["method"],
        "rows": f"{len(selection)} of {len(pool)}",
        "tokens": about["num_tokens"],
        "flops": cost.get("flops"),
        "seconds": cost.get("seconds"),
        "digest": selection.digest,
    }
    if "source" in pool.column_names:
        counts = collections.Counter(str(name) for name in pool.select(selection.indices)["source"])
        summary["sources"] = dict(counts.most_common())
    return summary


def _readable(summary: dict[str, Any]) -> dict[str, str]:
    """Amounts with units, and sources in words."""
    lines = {name: format_amount(name, summary[name]) for name in ("tokens", "flops", "seconds")}
    if "sources" in summary:
        lines["sources"] = ", ".join(f"{name} {count}" for name, count in summary["sources"].items())
    return lines
