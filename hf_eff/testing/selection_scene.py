"""A toy pool, target and model, put together as the context a selector receives."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from hf_eff.contracts.cost import PoolFacts
from hf_eff.contracts.memory import BatchShape
from hf_eff.contracts.selection import Picks, Pool, Scorer, SelectionContext
from hf_eff.contracts.spec import MethodSpec
from hf_eff.engines.facts import model_facts
from hf_eff.numerics.flops import forward_flops
from hf_eff.registry import build
from hf_eff.testing.tiny import collator, tiny_model, tiny_pool, tiny_target, tiny_tokenizer, tokenised

SEED = 7
BATCH_TOKENS = 256

Row = dict[str, list[int]]


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@functools.lru_cache(maxsize=8)
def _encoded(target: bool, rows: int) -> tuple[tuple[Row, ...], tuple[str, ...]]:
    with _no_progress_bars():
        data = tokenised(tiny_target(rows) if target else tiny_pool(rows), tiny_tokenizer())
    return tuple({"input_ids": row["input_ids"], "labels": row["labels"]} for row in data), tuple(data["source"])


def pool_of(rows: Sequence[Row], sources: Sequence[str] | None = None) -> Pool:
    """Pool over encoded rows, described as the driver describes it."""
    digests = [hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest() for row in rows]
    return Pool(
        rows=list(rows),
        index=np.arange(len(rows)),
        lengths=np.array([len(row["input_ids"]) for row in rows], dtype=np.int64),
        loss_lengths=np.array([sum(label != -100 for label in row["labels"][1:]) for row in rows], dtype=np.int64),
        sources=list(sources) if sources is not None else None,
        row_hash=digests,
    )


def toy_pool(rows: int = 24, order: Sequence[int] | None = None) -> Pool:
    """Half sums, half reversed words; ``order`` lists them in another order."""
    encoded, sources = _encoded(False, rows)
    order = range(rows) if order is None else order
    return pool_of(_copies(encoded[i] for i in order), [sources[i] for i in order])


def _copies(rows: Iterable[Row]) -> list[Row]:
    """Rows that a careless method may spoil without harm to the next test."""
    return [{name: list(values) for name, values in row.items()} for row in rows]


def toy_target(rows: int = 8) -> Pool:
    """Sums that differ from the pool's."""
    encoded, sources = _encoded(True, rows)
    target = pool_of(_copies(encoded), sources)
    target.groups = list(sources)
    return target


def unlabelled(pool: Pool) -> Pool:
    """The same rows without a single token that carries loss."""
    rows = [{"input_ids": row["input_ids"], "labels": [-100] * len(row["labels"])} for row in pool.rows]
    return pool_of(rows, pool.sources)


def make_context(
    spec: MethodSpec, *, pool: Pool | None = None, extra_padding: int = 0, folder: Path | None = None, **changes: Any
) -> SelectionContext:
    """Context with exactly what the method declares to need.

    Args:
        spec: The method.
        pool: Candidates; the toy pool without one.
        extra_padding: Columns of padding that every batch gets on top.
        folder: ``store_dir``.
        **changes: Fields of ``SelectionContext`` to set otherwise; ``seed`` also seeds the generator.
    """
    seed = changes.pop("seed", SEED)
    # Eager attention: its result does not depend on which fused kernel a padded shape gets.
    scorer = _scorer(layers=2) if spec.traits.needs_model else None
    fields: dict[str, Any] = {
        "pool": toy_pool() if pool is None else pool,
        "reference": toy_target() if spec.traits.needs_reference_set else None,
        "collate": _padded(collator(), extra_padding),
        "generator": torch.Generator().manual_seed(seed),
        "seed": seed,
        "batch_tokens": BATCH_TOKENS,
        "store_dir": folder,
        "learning_rate": 1e-3,
        "tokenizer": tiny_tokenizer(),
        "proxy": _scorer(layers=1) if spec.traits.uses_proxy else None,
    }
    if scorer is not None:
        fields |= {"model": scorer.model, "forward_flops": scorer.forward_flops}
    return SelectionContext(**{**fields, **changes})


def _scorer(layers: int) -> Scorer:
    # Eager attention: its result does not depend on which fused kernel a padded shape gets.
    model = tiny_model(layers=layers, width=32, attn_implementation="eager")
    facts = model_facts(model)
    return Scorer(model, lambda rows, length: forward_flops(facts, BatchShape(rows, length)))


def _padded(collate: Callable[[list[Any]], Any], extra: int) -> Callable[[list[Mapping[str, Any]]], Any]:
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}

    def padded(rows: list[Mapping[str, Any]]) -> Mapping[str, torch.Tensor]:
        batch = collate([dict(row) for row in rows])
        return {
            name: torch.nn.functional.pad(values, (0, extra), value=fill.get(name, 0)) for name, values in batch.items()
        }

    return padded


def pick(spec: MethodSpec, context: SelectionContext, **options: Any) -> Picks:
    """What the method chooses with its toy options, some of them changed."""
    picks: Picks = build(spec, {**spec.tiny, **options}).select(context)
    return picks


def chosen_hashes(picks: Picks, pool: Pool) -> set[str]:
    """Content of the choice, whatever order the pool has."""
    hashes = pool.row_hash or []
    return {hashes[int(position)] for position in picks.positions}


def pool_facts_of(pool: Pool, reference: Pool | None) -> PoolFacts:
    """Facts of a pool and target, as the plan would see them."""
    lengths = np.asarray(pool.lengths)
    return PoolFacts(
        num_rows=len(pool),
        mean_tokens=float(lengths.mean()),
        max_tokens=int(lengths.max()),
        num_reference=len(reference) if reference is not None else 0,
        mean_reference_tokens=float(np.mean(reference.lengths)) if reference is not None else 0.0,
        columns=("input_ids", "labels"),
    )
