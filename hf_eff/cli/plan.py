"""``hf-eff plan``: what ``train`` with the same flags would do and cost. Loads no weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_eff.cli.columns import name_columns, tokenise
from hf_eff.cli.output import print_json, stdout_reserved
from hf_eff.cli.run_flags import RunFlags, parse_run
from hf_eff.cli.sources import load_config, load_rows, load_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from hf_eff.contracts.cost import PoolFacts
    from hf_eff.plan import Plan

_SAMPLE = 512  # rows tokenised for the mean length


def run(argv: Sequence[str]) -> int:
    """Print the plan."""
    flags, args = parse_run(argv, "plan")
    with stdout_reserved(flags.json):
        pool, target = load_data(flags)
        plan = preview(flags, args, pool, target)
    if flags.json:
        print_json(plan.to_dict())
    else:
        print(plan)
    return 0


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


def preview(flags: RunFlags, args: TrainingArguments, pool: Dataset, target: Dataset | None) -> Plan:
    """Plan from the model's configuration and a sample of the rows.

    Raises:
        PlanError: The combination cannot work.
    """
    from hf_eff.arguments import options_of, run_facts
    from hf_eff.contracts.cost import Facts
    from hf_eff.engines.facts import model_facts_from_config
    from hf_eff.hardware.probe import hardware_facts
    from hf_eff.plan import make_plan

    config = load_config(flags.model, flags.cache_dir)
    tokenizer = load_tokenizer(flags.model, flags.cache_dir)
    facts = Facts(
        model=model_facts_from_config(config),
        pool=sampled_facts(pool, target, tokenizer, _limit(flags, args)),
        hardware=hardware_facts(world_size=args.world_size),
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
