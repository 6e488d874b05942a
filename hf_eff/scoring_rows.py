"""Rows as a trainer feeds them to its model, for scoring outside the loop: same tokens, same mask, no packing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset, concatenate_datasets

from hf_eff.errors import DataError


def scoring_rows(trainer: Any, dataset: Any) -> Any:
    """The dataset without the columns that the trainer would drop before its collator."""
    if isinstance(dataset, Dataset) and trainer.args.remove_unused_columns:
        return trainer._remove_unused_columns(dataset, description="scoring")  # noqa: SLF001 - its own rule
    return dataset


def scoring_collator(trainer: Any) -> Callable[[list[Mapping[str, Any]]], Mapping[str, Any]]:
    """The trainer's collator; a padding-free one is replaced by its padding twin, since rows are scored apart."""
    collator = trainer.data_collator
    if getattr(collator, "padding_free", False):
        collator = dataclasses.replace(collator, padding_free=False)
    if trainer.args.remove_unused_columns and not isinstance(trainer.train_dataset, Dataset):
        return trainer._get_collator_with_removed_columns(collator, description="scoring")  # noqa: SLF001
    return collator


def reference_rows(trainer: Any, kept: Mapping[str, Any]) -> tuple[Any, list[str] | None]:
    """Target rows and, when several evaluation sets were given, the name of each row's set.

    Args:
        trainer: Its ``eval_dataset`` is the target.
        kept: Unpacked rows by set name, where the trainer packs its evaluation sets.

    Raises:
        DataError: There is no target, or it cannot be indexed.
    """
    given = trainer.eval_dataset
    if given is None:
        raise DataError("this run needs a target; pass eval_dataset=... with a few examples.")
    sets = dict(given) if isinstance(given, Mapping) else {"eval": given}
    sets = {name: kept.get(name, rows) for name, rows in sets.items()}
    for name, rows in sets.items():
        if not hasattr(rows, "__getitem__") or not len(rows):
            raise DataError(f"eval_dataset {name!r} is empty or cannot be indexed; pass a map-style dataset with rows.")
    if len(sets) == 1:
        return scoring_rows(trainer, next(iter(sets.values()))), None
    groups = [name for name, rows in sets.items() for _ in range(len(rows))]
    return concatenate_datasets([scoring_rows(trainer, rows) for rows in sets.values()]), groups
