"""random: every row is equally likely, sources get their share, seeds decide and nothing else does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from hf_eff.contracts.selection import Pool, SelectionContext
from hf_eff.errors import DataError, OptionError
from hf_eff.numerics.water_filling import water_fill
from hf_eff.registry import get_method
from hf_eff.selection.random import Random, RandomConfig
from hf_eff.testing.selection_scene import chosen_hashes, make_context, pick, toy_pool

SPEC = get_method("selection", "random")


def context_of(sources, lengths=None, seed=0):
    count = len(sources)
    lengths = np.full(count, 10) if lengths is None else np.asarray(lengths)
    pool = Pool(
        rows=[{}] * count,
        index=np.arange(count),
        lengths=lengths,
        loss_lengths=lengths - 1,
        sources=list(sources),
        row_hash=[f"{i:032x}" for i in range(count)],
    )
    return SelectionContext(pool=pool, collate=None, generator=torch.Generator().manual_seed(seed), seed=seed)


def select(context, **options):
    return Random(RandomConfig(**options)).select(context)


def chi_square(counts, draws, kept, total):
    """Statistic of inclusion counts under sampling without replacement: chi-square with total - 1 degrees."""
    expected = draws * kept / total
    return float(((counts - expected) ** 2).sum() / (expected * (1 - kept / total)) * (total - 1) / total)


CHI_SQUARE_11 = 31.26  # 0.999 quantile with 11 degrees of freedom


def test_every_row_is_included_equally_often():
    context, counts = context_of("a" * 12), np.zeros(12)
    for _ in range(10_000):  # one generator all the way: its stream is what is tested
        counts[select(context, num_examples=4).positions] += 1
    assert chi_square(counts, 10_000, 4, 12) < CHI_SQUARE_11


def test_the_statistic_notices_a_biased_draw():
    generator, counts = np.random.default_rng(0), np.zeros(12)
    for _ in range(10_000):
        counts[generator.choice(12, 4, replace=False, p=np.linspace(0.95, 1.05, 12) / 12)] += 1
    assert chi_square(counts, 10_000, 4, 12) > CHI_SQUARE_11


def test_seeds_differ_and_each_repeats():
    draws = [select(context_of("a" * 50, seed=seed), num_examples=10).positions.tolist() for seed in (0, 1, 2, 0)]
    assert draws[0] == draws[3]
    assert len({tuple(draw) for draw in draws}) == 3


def test_another_process_draws_the_same():
    code = (
        "from hf_eff.testing.tiny import tiny_pool, tiny_tokenizer\n"
        "from hf_eff.selection import select_dataset\n"
        "s = select_dataset(tiny_pool(30), 'random', processing_class=tiny_tokenizer(), seed=11, fraction=0.3,"
        " mode='balanced')\n"
        "print(s.indices.tolist(), s.digest)"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": salt},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for salt in ("1", "2")
    }
    assert len(answers) == 1


def test_the_order_of_the_rows_plays_no_part():
    plain, order = toy_pool(24), np.random.default_rng(1).permutation(24)
    for mode in ("plain", "balanced", "proportional"):
        first = pick(SPEC, make_context(SPEC, pool=plain), mode=mode)
        shuffled = toy_pool(24, order)
        second = pick(SPEC, make_context(SPEC, pool=shuffled), mode=mode)
        assert chosen_hashes(first, plain) == chosen_hashes(second, shuffled)


def test_balanced_is_a_water_fill():
    sources = "a" * 2 + "b" * 20 + "c" * 30 + "d" * 5
    picks = select(context_of(sources), mode="balanced", num_examples=21)
    shares = dict(zip("abcd", water_fill([2, 20, 30, 5], 21).tolist(), strict=True))
    assert picks.notes["rows_by_source"] == shares == {"a": 2, "b": 7, "c": 7, "d": 5}
    assert Counter(np.array(list(sources))[picks.positions].tolist()) == shares
    assert picks.reasons == [f"random draw from {name}" for name in np.array(list(sources))[picks.positions]]


def test_proportional_keeps_the_shares_of_the_pool():
    picks = select(context_of("a" * 50 + "b" * 30 + "c" * 20), mode="proportional", num_examples=7)
    assert picks.notes["rows_by_source"] == {"a": 4, "b": 2, "c": 1}


def test_draws_within_a_source_are_uniform():
    context, counts = context_of("a" * 12 + "b" * 12), np.zeros(24)
    for _ in range(3_000):
        counts[select(context, mode="balanced", num_examples=8).positions] += 1
    assert chi_square(counts[:12], 3_000, 4, 12) < CHI_SQUARE_11
    assert chi_square(counts[12:], 3_000, 4, 12) < CHI_SQUARE_11


@pytest.mark.parametrize("mode", ["plain", "balanced", "proportional"])
@pytest.mark.parametrize("seed", range(25))
def test_a_token_budget_is_used_up_and_never_passed(mode, seed):
    lengths = np.random.default_rng(seed).integers(5, 40, size=60)
    context = context_of("aab" * 20, lengths, seed)
    kept = select(context, mode=mode, num_tokens=500).positions
    assert len(set(kept.tolist())) == len(kept)
    sources = 1 if mode == "plain" else 2
    assert 500 - 40 * sources < lengths[kept].sum() <= 500


def test_balanced_tokens_are_balanced_in_tokens():
    lengths = np.r_[np.full(30, 40), np.full(60, 10)]
    kept = select(context_of("a" * 30 + "b" * 60, lengths), mode="balanced", num_tokens=800).positions
    assert lengths[kept][kept < 30].sum() == lengths[kept][kept >= 30].sum() == 400


def test_invalid_rows_are_never_drawn():
    context = context_of("ab" * 10)
    context.pool.loss_lengths[::3] = 0
    valid = np.flatnonzero(context.pool.loss_lengths)
    for mode in ("plain", "balanced", "proportional"):
        assert sorted(select(context, mode=mode, fraction=1.0).positions.tolist()) == valid.tolist()


def test_wrong_uses_are_named():
    context = context_of("ab" * 10)
    context.pool.sources = None
    with pytest.raises(DataError, match=r"mode='balanced' needs the source .* no column 'origin'"):
        select(context, mode="balanced", source_column="origin")
    with pytest.raises(DataError, match="num_tokens=15 shared among 2 sources is less than one row each"):
        select(context_of("ab" * 10), mode="balanced", num_tokens=15)
    with pytest.raises(OptionError, match=r"RandomConfig.mode must be one of \['plain', 'balanced', 'proportional'\]"):
        RandomConfig(mode="even")
