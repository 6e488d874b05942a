"""difficulty: bands cut the distribution exactly, and quotas give every query its number."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_eff.contracts.cost import Facts
from hf_eff.engines.facts import model_facts
from hf_eff.engines.signal_pass import pool_signals
from hf_eff.errors import BudgetExceededError, DataError, OptionError
from hf_eff.numerics.water_filling import water_fill
from hf_eff.registry import get_method
from hf_eff.selection.difficulty import fail_quotas
from hf_eff.testing.selection_scene import chosen_hashes, make_context, pick, pool_facts_of, pool_of, toy_pool

SPEC = get_method("selection", "difficulty")
BANDS = ("easy", "mid", "hard")


def with_columns(columns, rows=24):
    """Toy pool whose rows have these columns."""
    examples = [{name: values[i] for name, values in columns.items()} for i in range(rows)]
    return replace(toy_pool(rows), examples=examples)


def scene(**changes):
    return make_context(SPEC, **{"proxy": None, **changes})


@pytest.mark.parametrize("signal", ["loss", "el2n", "entropy", "margin"])
def test_signals_of_the_model_are_those_of_the_pass(signal):
    context = scene()
    picks = pick(SPEC, context, signal=signal, band="hard", fraction=0.25)
    expected = pool_signals(context, context.pool, [signal])[signal]
    assert np.array_equal(picks.scores, expected)
    hardest = np.argsort(expected if signal == "margin" else -expected)[:6]
    assert picks.positions.tolist() == hardest.tolist()
    assert picks.higher_is_better == (signal != "margin")


def test_the_proxy_scores_where_there_is_one():
    context = make_context(SPEC)
    expected = pool_signals(context.by_proxy(), context.pool, ["el2n"])["el2n"]
    assert np.array_equal(pick(SPEC, context).scores, expected)
    assert not np.array_equal(pick(SPEC, scene()).scores, expected)


@pytest.mark.parametrize("count", [9, 12, 24])
def test_thirds_partition_the_pool(count):
    pool = with_columns({"hard": np.random.default_rng(0).permutation(count).tolist()}, count)
    options = {"signal": "column:hard", "column_means": "difficulty", "fraction": 1 / 3}
    found = [pick(SPEC, scene(pool=pool), **options, band=band).positions for band in BANDS]
    assert sorted(np.concatenate(found).tolist()) == list(range(count))
    values = [[pool.examples[i]["hard"] for i in rows] for rows in found]
    assert max(values[0]) < min(values[1])
    assert max(values[1]) < min(values[2])
    assert (values[0][0], values[2][0]) == (0, count - 1)


@given(low=st.floats(0, 0.9), width=st.floats(0.05, 1), band=st.sampled_from(BANDS), values=st.permutations(range(24)))
@settings(max_examples=30, deadline=None)
def test_a_range_keeps_its_places_in_the_distribution(low, width, band, values):
    high = min(1.0, low + width)
    pool, u = with_columns({"v": values}), (np.asarray(values) + 0.5) / 24
    inside = np.flatnonzero((u >= low) & (u <= high))
    options = {"signal": "column:v", "column_means": "difficulty", "low": low, "high": high, "band": band}
    if len(inside):
        picks = pick(SPEC, scene(pool=pool), **options, fraction=1.0)
        assert sorted(picks.positions.tolist()) == sorted(inside.tolist())
        distance = np.abs(u[picks.positions] - {"easy": 0.0, "mid": 0.5, "hard": 1.0}[band])
        assert (np.diff(distance) > -1e-9).all()


def test_a_high_pass_rate_is_easy():
    pool = with_columns({"pass_rate": np.linspace(0, 1, 24).tolist()})
    options = {"signal": "column:pass_rate", "fraction": None, "num_examples": 3}
    assert pick(SPEC, scene(pool=pool), band="easy", **options).positions.tolist() == [23, 22, 21]
    hard = pick(SPEC, scene(pool=pool), band="hard", **options)
    assert hard.positions.tolist() == [0, 1, 2]
    assert not hard.higher_is_better


def test_length_counts_the_tokens_that_carry_loss():
    picks = pick(SPEC, scene(), signal="length", band="hard")
    assert np.array_equal(picks.scores, scene().pool.loss_lengths)
    assert picks.scores[picks.positions].min() >= np.delete(picks.scores, picks.positions).max()


def test_columns_of_tokenised_rows_are_read_too():
    pool = toy_pool(4)
    for place, row in enumerate(pool.rows):
        row["rate"] = place / 3
    pool.examples = None
    picks = pick(SPEC, scene(pool=pool), signal="column:rate", band="hard", fraction=0.5)
    assert picks.positions.tolist() == [0, 1]


def test_rows_without_a_number_are_left_out():
    rates = [0.5, float("nan"), float("inf"), *([0.1] * 21)]
    picks = pick(SPEC, scene(pool=with_columns({"r": rates})), signal="column:r", fraction=1.0)
    assert sorted(picks.positions.tolist()) == [0, *range(3, 24)]
    assert np.flatnonzero(np.isnan(picks.scores)).tolist() == [1, 2]


def literal_quotas(fails, sizes, total):
    """c times the fail rate within its bounds, for the c found by trying."""
    for c in np.linspace(0, 100, 20_001):
        quotas = np.clip(c * fails, 1, sizes)
        if quotas.sum() >= total:
            return quotas
    raise AssertionError("no such c")


def test_quotas_follow_the_fail_rate():
    fails, sizes = np.array([0.9, 0.6, 0.3, 0.05, 0.0]), np.array([12, 30, 30, 30, 30])
    for total in (8, 20, 40):
        found = fail_quotas(fails, sizes, total)
        expected = literal_quotas(fails, np.where(fails > 0, sizes, 1), total)
        assert found.sum() == total
        assert np.abs(found - expected).max() < 1
    assert fail_quotas(fails, sizes, 40)[0] == 12


@given(
    fails=st.lists(st.sampled_from([0.0, 0.125, 0.5, 0.9, 1.0]), min_size=1, max_size=8),
    sizes=st.lists(st.integers(1, 12), min_size=8, max_size=8),
    share=st.floats(0, 1),
)
@settings(max_examples=200, deadline=None)
def test_quotas_are_exact(fails, sizes, share):
    rates, room = np.asarray(fails), np.asarray(sizes[: len(fails)])
    total = int(share * room.sum())
    found = fail_quotas(rates, room, total)
    assert found.sum() == total
    assert (found <= room).all()
    if total >= len(fails):
        assert found.min() >= 1
    else:
        assert found.max(initial=0) <= 1
        assert rates[found == 1].min(initial=1) >= rates[found == 0].max(initial=0)
    for first in range(len(fails)):
        for second in range(len(fails)):
            if rates[first] > rates[second] and found[first] < room[first]:
                assert found[first] >= found[second]


QUERIES = ["a"] * 10 + ["b"] * 8 + ["c"] * 6
RATES = [0.2] * 10 + [0.6] * 8 + [1.0] * 6


@pytest.mark.parametrize("count", [2, 3, 9, 15, 24])
@pytest.mark.parametrize("quota", ["prop2diff", "uniform"])
def test_every_query_gives_its_quota(quota, count):
    pool = with_columns({"pass_rate": RATES, "query": QUERIES})
    options = {"signal": "column:pass_rate", "quota": quota, "query_column": "query", "fraction": None}
    picks = pick(SPEC, scene(pool=pool), **options, num_examples=count)
    found = [sum(QUERIES[i] == name for i in picks.positions) for name in "abc"]
    sizes = np.array([10, 8, 6])
    expected = {
        "prop2diff": fail_quotas(np.array([0.8, 0.4, 0.0]), sizes, count),
        "uniform": water_fill(sizes, count),
    }[quota]
    assert found == expected.tolist()
    assert len(picks.positions) == count
    assert picks.notes["num_queries"] == 3
    order = np.random.default_rng(0).permutation(24)
    turned = replace(toy_pool(24, order), examples=[pool.examples[i] for i in order])
    again = pick(SPEC, scene(pool=turned), **options, num_examples=count)
    assert chosen_hashes(again, turned) == chosen_hashes(picks, pool)


def test_options_that_contradict_are_refused():
    for options, message in (
        ({"signal": "grand"}, "signal must be one of"),
        ({"signal": "column:"}, "or 'column:<name>'"),
        ({"low": 0.5, "high": 0.5}, "must lie below high"),
        ({"quota": "uniform"}, "pass query_column="),
        ({"quota": "uniform", "query_column": "q", "num_tokens": 5}, "not tokens"),
        ({"quota": "prop2diff", "query_column": "q"}, "shares by fail rate"),
    ):
        with pytest.raises(OptionError, match=message):
            SPEC.config.from_dict(options)


def test_columns_that_do_not_fit_are_refused_for_free():
    def spend(flops, tokens):
        raise BudgetExceededError("computed")

    pool = with_columns({"word": ["x"] * 24, "rate": [2.0] * 24, "query": QUERIES})
    quota = {"quota": "prop2diff", "query_column": "query"}
    for options, message in (
        ({"signal": "column:none"}, "has no column 'none'"),
        ({"signal": "column:word"}, "one number a row"),
        ({"signal": "column:rate", **quota}, "pass rates between 0 and 1"),
        ({"quota": "uniform", "query_column": "none"}, "has no column 'none'"),
        ({"fraction": None, "num_examples": 99}, "more than the 24 valid rows"),
    ):
        with pytest.raises(DataError, match=message):
            pick(SPEC, scene(pool=pool, spend=spend), **options)


def test_the_predicted_cost_is_what_is_spent():
    pool, bills = pool_of([{"input_ids": [5 + i] * 20, "labels": [5 + i] * 20} for i in range(16)]), []
    context = scene(pool=pool, spend=lambda flops, tokens: bills.append((flops, tokens)))
    facts = Facts(model=model_facts(context.model), pool=pool_facts_of(pool, None))
    pick(SPEC, context)
    predicted = SPEC.cost(SPEC.config(), facts)
    assert sum(flops for flops, _ in bills) == pytest.approx(predicted.flops, rel=1e-12)
    assert sum(tokens for _, tokens in bills) == predicted.tokens
    assert SPEC.cost(SPEC.config(signal="length"), facts).flops == 0
    pick(SPEC, replace(context, spend=lambda *_: pytest.fail("charged")), signal="length")
