"""The best of a stream, against sorting all of it."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hf_eff.numerics.top_k import TopK


@given(
    st.lists(st.one_of(st.integers(-3, 3).map(float), st.just(float("nan"))), max_size=30),
    st.integers(0, 8),
    st.integers(1, 7),
)
def test_a_stream_in_pieces_is_a_sort_of_the_whole(values, k, step):
    scores = np.array(values, dtype=float)
    top = TopK(k)
    for start in range(0, len(scores), step):
        part = scores[start : start + step]
        top.add(np.arange(start, start + len(part)), part)
    expected = sorted((i for i in range(len(values)) if values[i] == values[i]), key=lambda i: (-values[i], i))[:k]
    assert top.positions.tolist() == expected
    assert top.scores.tolist() == [values[i] for i in expected]


def test_memory_does_not_grow_with_the_stream():
    top = TopK(5)
    for start in range(0, 100_000, 1000):
        top.add(np.arange(start, start + 1000), np.random.default_rng(start).normal(size=1000))
        assert len(top.positions) == 5
