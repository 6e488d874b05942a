"""Sizes: at most one is given, invalid rows never count, limits are never passed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_eff.contracts.selection import Pool
from hf_eff.engines.pool_size import SizedConfig
from hf_eff.errors import DataError, OptionError


def pool_of(lengths, invalid=()):
    loss = np.maximum(np.asarray(lengths) - 1, 0)
    loss[list(invalid)] = 0
    return Pool(rows=None, index=np.arange(len(lengths)), lengths=np.asarray(lengths), loss_lengths=loss)


@pytest.mark.parametrize(
    ("options", "expected", "size"),
    [
        ({}, 10, {"kind": "fraction", "value": 0.1}),
        ({"fraction": 0.29}, 29, {"kind": "fraction", "value": 0.29}),  # 0.29 * 100 < 29 in floats
        ({"fraction": 1.0}, 100, {"kind": "fraction", "value": 1.0}),
        ({"num_examples": 7}, 7, {"kind": "num_examples", "value": 7}),
        ({"num_tokens": 57}, 5, {"kind": "num_tokens", "value": 57}),
        ({"num_tokens": 60}, 6, {"kind": "num_tokens", "value": 60}),
    ],
    ids=str,
)
def test_each_size_takes_its_share(options, expected, size):
    config, pool = SizedConfig(**options), pool_of([10] * 100)
    assert config.take(np.arange(100), pool).tolist() == list(range(expected))
    assert config.size == size


def test_invalid_rows_do_not_count():
    pool = pool_of([10] * 20, invalid=range(10))
    assert SizedConfig(fraction=0.5).limit(pool) == 5
    with pytest.raises(DataError, match=r"num_examples=11 is more than the 10 valid rows .* \(20 rows in all\)"):
        SizedConfig(num_examples=11).limit(pool)
    with pytest.raises(DataError, match="none of the 3 rows of the pool has a token that carries loss"):
        SizedConfig().limit(pool_of([10] * 3, invalid=range(3)))


def test_sizes_that_select_nothing_are_refused():
    with pytest.raises(DataError, match=r"fraction=0\.1 of 9 valid rows is less than one row"):
        SizedConfig().limit(pool_of([5] * 9))
    with pytest.raises(DataError, match=r"fraction=0\.0 of 9 valid rows is less than one row"):
        SizedConfig(fraction=0.0).limit(pool_of([5] * 9))
    with pytest.raises(DataError, match="num_tokens=4 is less than the 5 tokens of the first row chosen"):
        SizedConfig(num_tokens=4).take(np.arange(9), pool_of([5] * 9))


def test_two_sizes_contradict_each_other():
    with pytest.raises(OptionError, match="takes one size, got fraction and num_tokens"):
        SizedConfig(fraction=0.1, num_tokens=5)
    with pytest.raises(OptionError, match=r"SizedConfig.fraction must be in \[0.0, 1.0\], got 1.5"):
        SizedConfig(fraction=1.5)
    with pytest.raises(OptionError, match="num_examples must be in"):
        SizedConfig(num_examples=0)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 500), st.randoms())
def test_a_token_limit_is_never_passed_and_stops_at_the_first_row_that_would(lengths, limit, shuffler):
    pool, order = pool_of([length + 1 for length in lengths]), list(range(len(lengths)))
    shuffler.shuffle(order)
    if pool.lengths[order[0]] > limit:
        with pytest.raises(DataError, match="of the first row chosen"):
            SizedConfig(num_tokens=limit).take(np.array(order), pool)
        return
    kept = SizedConfig(num_tokens=limit).take(np.array(order), pool).tolist()
    assert kept == order[: len(kept)]
    assert pool.lengths[kept].sum() <= limit
    assert len(kept) == len(order) or pool.lengths[order[: len(kept) + 1]].sum() > limit
