"""``hf-eff plan``: what ``train`` with the same flags would do and cost, and what loss to expect. Loads no weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_eff.cli.columns import name_columns, tokenise
from hf_eff.cli.flags import read_config
from hf_eff.cli.loss_plan import parse_forecast, prospect_of
from hf_eff.cli.output import print_json, stdout_reserved
from hf_eff.cli.run_flags import RunFlags, parse_run
from hf_eff.cli.sources import load_config, load_rows, load_tokenizer

if TYPE_CHECKING:
    import argparse

    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from hf_eff.cli.pilot import PilotFile
    from hf_eff.contracts.cost import PoolFacts
    from hf_eff.loss_forecast import LossForecast
    from hf_eff.plan import Plan

_SAMPLE = 512  # rows tokenised for the mean length


_NO_ROWS = "(--unique_tokens)"


def run(argv: Sequence[str]) -> int:
    """Print the plan and, under it, the forecast of the loss."""
    wishes, words = parse_forecast(argv)
    flags, args = parse_run(_named_rows(words, wishes), "plan")
    with stdout_reserved(flags.json):
        pilot = _pilot(wishes)
        speed = wishes.flops_per_second or (pilot.flops_per_second if pilot is not None else None)
        plan = _plan(flags, args, wishes, speed)
        found = _forecast(plan, wishes, pilot)
    if flags.json:
        print_json({**plan.to_dict(), "loss_forecast": found if isinstance(found, str) else found.to_dict()})
    else:
        print(f"{plan}\n\n{'note: ' + found if isinstance(found, str) else found}")
    return 0


def _named_rows(words: list[str], wishes: argparse.Namespace) -> list[str]:
    """Words that name a dataset: their own, or a stand-in where the number of different tokens is enough."""
    named = {word.partition("=")[0] for word in words}
    if wishes.unique_tokens is None or {"--dataset", "--recipe"} & named or "dataset" in read_config(words)[0]:
        return words
    return [*words, "--dataset", _NO_ROWS]


def _pilot(wishes: argparse.Namespace) -> PilotFile | None:
    if wishes.pilot is None:
        return None
    from hf_eff.cli.pilot import read_pilot

    return read_pilot(wishes.pilot)


def _plan(flags: RunFlags, args: TrainingArguments, wishes: argparse.Namespace, speed: float | None) -> Plan:
    if flags.dataset != _NO_ROWS:
        pool, target = load_data(flags)
        return preview(flags, args, pool, target, speed)
    from hf_eff.contracts.cost import PoolFacts

    length = _limit(flags, args) or flags.max_tokens
    rows = max(1, round(wishes.unique_tokens / length))
    return _plan_on(flags, args, PoolFacts(num_rows=rows, mean_tokens=float(length), max_tokens=length), speed)


def _forecast(plan: Plan, wishes: argparse.Namespace, pilot: PilotFile | None) -> LossForecast | str:
    """The forecast, drawn where that was asked for, or why there is none."""
    from hf_eff.loss_forecast import forecast

    prospect = prospect_of(plan, wishes, pilot)
    if isinstance(prospect, str):
        return prospect
    found = forecast(prospect)
    if wishes.figure is not None:
        from hf_eff.report.forecast_figure import draw_forecast

        draw_forecast(found.to_dict(), wishes.figure)
    return found


def load_data(flags: RunFlags) -> tuple[Dataset, Dataset | None]:
    """The pool and, where flags name one, the target, in the columns that trainers expect.

    Raises:
        DataError: Rows cannot be read or have an unknown shape.
    """
    pool = load_rows(flags.dataset, split=flags.split, config=flags.dataset_config)
    pool = name_columns(pool, flags.columns, flags.dataset)
    name = flags.eval_dataset or (flags.dataset if flags.eval_split else None)
    if name is None:
        return pool, None
    target = load_rows(name, split=flags.eval_split or "train", config=flags.dataset_config, held_out=True)
    return pool, name_columns(target, flags.columns, name)


def preview(
    flags: RunFlags,
    args: TrainingArguments,
    pool: Dataset,
    target: Dataset | None,
    flops_per_second: float | None = None,
) -> Plan:
    """Plan from the model's configuration and a sample of the rows.

    Args:
        flags: What to train on what.
        args: Arguments of the trainer.
        pool: Candidates.
        target: Target rows, or None.
        flops_per_second: Measured speed of one process, or None.

    Raises:
        PlanError: The combination cannot work.
    """
    tokenizer = load_tokenizer(flags.model, flags.cache_dir)
    return _plan_on(flags, args, sampled_facts(pool, target, tokenizer, _limit(flags, args)), flops_per_second)


def _plan_on(flags: RunFlags, args: TrainingArguments, pool: PoolFacts, flops_per_second: float | None) -> Plan:
    from hf_eff.arguments import options_of, run_facts
    from hf_eff.contracts.cost import Facts
    from hf_eff.engines.facts import model_facts_from_config
    from hf_eff.hardware.probe import hardware_facts
    from hf_eff.plan import make_plan

    hardware = hardware_facts(world_size=args.world_size)
    facts = Facts(
        model=model_facts_from_config(load_config(flags.model, flags.cache_dir)),
        pool=pool,
        hardware=dataclasses.replace(hardware, flops_per_second=flops_per_second),
        run=run_facts(args, flags.task),
    )
    return make_plan(options_of(args), facts)


def _limit(flags: RunFlags, args: TrainingArguments) -> int | None:
    return getattr(args, "max_length", None) if flags.task == "sft" else flags.max_tokens


def sampled_facts(
    pool: Dataset, target: Dataset | None, tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> PoolFacts:
    """Counts of all rows, lengths of a sample.

    Args:
        pool: Candidates.
        target: Target rows, or None.
        tokenizer: Tokenises the sample.
        limit: Tokens at which a row is cut, or None.
    """
    from hf_eff.engines.facts import pool_facts

    sample = pool.shuffle(seed=0).select(range(min(_SAMPLE, len(pool))))
    facts = pool_facts(tokenise(sample, tokenizer, limit))
    if target is not None:
        wanted = pool_facts(tokenise(target.select(range(min(_SAMPLE, len(target)))), tokenizer, limit))
        facts = dataclasses.replace(facts, num_reference=len(target), mean_reference_tokens=wanted.mean_tokens)
    return dataclasses.replace(facts, num_rows=len(pool), columns=tuple(pool.column_names))
