from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_eff.errors import OptionError
from hf_eff.numerics.balanced_influence import balanced_order, standardise


def naive(standardised, count, mode):
    """The definition: every step looks at every unused row and column."""
    table, taken = standardised.astype(np.float64), []
    for step in range(count):
        mean = sum((table[i] for i in taken), np.zeros(table.shape[1])) / max(1, step)
        free = [i for i in range(len(table)) if i not in set(taken)]
        if mode == "max_row" or step == 0:
            taken.append(max(free, key=lambda i: ((table[i] - mean).max(), -i)))
        else:
            behind = [j for j in range(table.shape[1]) if mean[j] == mean.min()]
            taken.append(max(free, key=lambda i: (max(table[i, j] for j in behind), -i)))
    return taken


@pytest.mark.parametrize("mode", ["max_row", "argmin_task"])
@pytest.mark.parametrize("clip", [None, 1.5])
def test_fast_equals_naive(mode, clip):
    """With a low bound many entries are equal: ties go by row in both."""
    standardised = standardise(np.random.default_rng(0).standard_t(3, size=(500, 17)), clip)
    rows, targets = balanced_order(standardised, 75, mode)
    assert rows.tolist() == naive(standardised, 75, mode)
    assert ((targets >= 0) & (targets < 17)).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 2**31), st.sampled_from(["max_row", "argmin_task"]))
def test_fast_equals_naive_down_to_the_last_row(rows, columns, seed, mode):
    """Small whole numbers: ties within and between columns, and columns that are used up."""
    table = np.random.default_rng(seed).integers(-2, 3, size=(rows, columns)).astype(np.float32)
    found, _ = balanced_order(table, rows, mode)
    assert sorted(found.tolist()) == list(range(rows))
    assert found.tolist() == naive(table, rows, mode)


def test_one_target_is_plain_top_k():
    values = np.random.default_rng(1).normal(size=(300, 1))
    for mode in ("max_row", "argmin_task"):
        rows, _ = balanced_order(standardise(values), 40, mode)
        assert rows.tolist() == np.argsort(-values[:, 0])[:40].tolist()


def test_positive_affine_maps_of_columns_change_nothing():
    rng = np.random.default_rng(2)
    influence = rng.normal(size=(400, 9))
    moved = influence * 10 ** rng.uniform(-3, 3, size=9) + rng.normal(size=9)
    expected = balanced_order(standardise(influence), 60)[0]
    assert np.array_equal(balanced_order(standardise(moved), 60)[0], expected)
    raw = [balanced_order(each.astype(np.float32), 60)[0] for each in (influence, moved)]
    assert not np.array_equal(*raw)


def test_a_task_of_ten_times_the_influence_does_not_take_all():
    """Two tasks of equal size; the rows of each help their own targets."""
    rng = np.random.default_rng(3)
    influence = 0.3 * rng.normal(size=(400, 10))
    influence[:200, :5] += 1.0
    influence[200:, 5:] += 1.0
    influence[:, :5] *= 10

    def share(rows):
        return np.mean(np.asarray(rows) < 200)

    assert share(np.argsort(-influence.sum(axis=1))[:60]) > 0.95
    for mode in ("max_row", "argmin_task"):
        assert 0.35 < share(balanced_order(standardise(influence), 60, mode)[0]) < 0.65


def test_columns_are_standardised_cut_and_silenced():
    values = np.random.default_rng(4).normal(size=(1000, 3))
    values[7, 0], values[:, 2] = 1e6, 3.7
    free, cut = standardise(values, None), standardise(values, 6.0)
    assert np.allclose(free[:, 1].mean(), 0, atol=1e-6)
    assert np.allclose(free[:, 1].std(), 1, atol=1e-5)
    assert free[7, 0] > 30
    assert cut[7, 0] == 6.0
    assert not cut[:, 2].any()


def test_wrong_modes_and_counts_are_refused():
    for count, mode in ((4, "max_row"), (1, "best")):
        with pytest.raises(OptionError, match="count at most 3"):
            balanced_order(np.zeros((3, 2), dtype=np.float32), count, mode)
