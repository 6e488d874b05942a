"""Every beginning of the ranking is shared as water-filling shares it."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hf_eff.numerics.round_robin import round_robin
from hf_eff.numerics.water_filling import water_fill


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 60))
def test_every_beginning_is_water_filled(sizes, length):
    starts = np.cumsum([0, *sizes])
    groups = [np.arange(start, start + size) for start, size in zip(starts, sizes, strict=False)]
    order = round_robin(groups)
    assert sorted(order.tolist()) == list(range(sum(sizes)))
    taken = [int(np.isin(group, order[:length]).sum()) for group in groups]
    assert sorted(taken) == sorted(water_fill(sizes, length).tolist())


def test_inside_a_group_the_order_stays():
    order = round_robin([np.array([5, 3, 8]), np.array([2, 9])]).tolist()
    assert [row for row in order if row in (5, 3, 8)] == [5, 3, 8]
    assert order[:2] == [5, 2]


def test_no_groups_and_empty_groups():
    assert round_robin([]).tolist() == []
    assert round_robin([np.zeros(0, dtype=np.int64), np.array([4])]).tolist() == [4]
