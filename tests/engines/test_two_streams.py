"""Rows dealt out by length: every batch has its mix, every short row comes once an epoch, and skipping resumes."""

import math
from collections import Counter

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from hf_eff.engines.two_streams import TwoStreams, deal_by_length, row_lengths
from hf_eff.errors import EffWarning, PlanError


def batches(streams, epoch, size, *, drop_last=False):
    streams.set_epoch(epoch)
    return list(BatchSampler(streams, size, drop_last))


@st.composite
def situations(draw):
    lengths = draw(st.lists(st.integers(1, 12), min_size=2, max_size=40))
    limit = draw(st.integers(min(lengths), max(max(lengths) - 1, min(lengths))))
    take = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    return lengths, limit, take, draw(st.integers(0, 9))


@pytest.mark.filterwarnings("ignore::hf_eff.errors.EffWarning")
@settings(max_examples=60, deadline=None)
@given(situations())
def test_every_short_row_comes_once_an_epoch_beside_as_many_long_ones(situation):
    lengths, limit, take, seed = situation
    short = [row for row, length in enumerate(lengths) if length <= limit]
    long = [row for row, length in enumerate(lengths) if length > limit]
    streams = deal_by_length(lengths, limit, take, seed=seed)
    seen = Counter()
    for epoch in range(3):
        found = batches(streams, epoch, sum(take))
        assert len(streams) == sum(map(len, found))
        if not long:
            assert sorted(row for batch in found for row in batch) == short
            assert all(streams.first_rows(len(batch)) == len(batch) for batch in found)
            continue
        counts = [streams.first_rows(len(batch)) for batch in found]
        assert len(found) == streams.steps == math.ceil(len(short) / take[0])
        assert sorted(row for batch, count in zip(found, counts, strict=True) for row in batch[:count]) == short
        assert counts[:-1] == [take[0]] * (len(found) - 1)
        assert 1 <= counts[-1] <= take[0]
        beside = [row for batch, count in zip(found, counts, strict=True) for row in batch[count:]]
        assert len(beside) == take[1] * len(found)
        assert set(beside) <= set(long)
        seen.update(beside)
        assert max(seen.values()) - min(seen[row] for row in long) <= 1  # round and round, through all epochs


@pytest.mark.filterwarnings("ignore::hf_eff.errors.EffWarning")
@settings(max_examples=40, deadline=None)
@given(situations(), st.integers(0, 4), st.data())
def test_the_order_is_a_function_of_seed_epoch_and_position_alone(situation, epoch, data):
    lengths, limit, take, seed = situation
    used = deal_by_length(lengths, limit, take, seed=seed)
    for earlier in range(epoch):
        batches(used, earlier, sum(take))
    fresh = deal_by_length(lengths, limit, take, seed=seed)
    whole = batches(used, epoch, sum(take))
    assert batches(fresh, epoch, sum(take)) == whole
    done = data.draw(st.integers(0, len(whole)))
    fresh.set_epoch(epoch)
    assert list(SkipBatchSampler(BatchSampler(fresh, sum(take), False), done)) == whole[done:]
    for step, batch in enumerate(whole):
        first, second = fresh.batch(epoch, step)
        assert first + second == batch
        longest = fresh.longest(epoch * fresh.steps + step)
        assert longest == tuple(max((lengths[row] for row in rows), default=0) for rows in (first, second))


def test_orders_differ_between_seeds_epochs_and_streams():
    rows = list(range(30))
    streams = TwoStreams([1] * 30, rows, rows, (3, 3), seed=0)
    first = [row for batch in batches(streams, 0, 6) for row in batch[:3]]
    second = [row for batch in batches(streams, 0, 6) for row in batch[3:]]
    later = [row for batch in batches(streams, 1, 6) for row in batch[:3]]
    other = [row for batch in batches(TwoStreams([1] * 30, rows, rows, (3, 3), seed=1), 0, 6) for row in batch[:3]]
    assert sorted(first) == sorted(second) == rows
    assert len({tuple(order) for order in (rows, first, second, later, other)}) == 5


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize(("short", "take"), [(7, (2, 3)), (1, (3, 1)), (12, (2, 2)), (13, (4, 1))])
def test_each_process_gets_the_mix_and_as_many_batches(processes, short, take):
    """Dealt out by accelerate as in training, which fills up with whatever rows came first."""
    lengths = [1] * short + [9] * 5
    streams = deal_by_length(lengths, 1, take, seed=3, processes=processes)
    for epoch in range(2):
        streams.set_epoch(epoch)
        shards = [
            list(BatchSamplerShard(BatchSampler(streams, sum(take), False), processes, rank))
            for rank in range(processes)
        ]
        assert len({len(shard) for shard in shards}) == 1
        everything = [batch for shard in shards for batch in shard]
        for batch in everything:
            assert [lengths[row] for row in batch] == [1] * take[0] + [9] * take[1]
        counts = Counter(row for batch in everything for row in batch[: take[0]])
        assert set(counts) == set(range(short))
        assert max(counts.values()) - min(counts.values()) <= 1


def test_an_incomplete_last_batch_can_be_left_out():
    streams = deal_by_length([1] * 7 + [9] * 4, 1, (2, 1), seed=0, drop_last=True)
    found = batches(streams, 0, 3, drop_last=True)
    assert [len(batch) for batch in found] == [3, 3, 3]
    assert len(streams) == 9
    assert streams.steps == 3


def test_one_empty_set_gives_batches_of_the_other_and_a_warning():
    with pytest.warns(EffWarning, match="no row is longer than 5 tokens, so that all 3 rows of a batch are first-ord"):
        streams = deal_by_length([5] * 7, 5, (1, 2), seed=0)
    assert [len(batch) for batch in batches(streams, 0, 3)] == [3, 3, 1]
    assert streams.first_rows(3) == 3
    with pytest.warns(EffWarning, match="every row is longer than 4 tokens, so that all 3 rows of a batch are zeroth"):
        streams = deal_by_length([5] * 7, 4, (1, 2), seed=0)
    found = batches(streams, 1, 3)
    assert sorted(row for batch in found for row in batch) == list(range(7))
    assert streams.first_rows(3) == 0
    assert streams.longest(0) == (0, 5)


def test_without_assignment_both_sets_are_all_rows():
    streams = deal_by_length([5] * 6, None, (2, 1), seed=0)
    found = batches(streams, 0, 3) + batches(streams, 1, 3)
    assert sorted(row for batch in found[:3] for row in batch[:2]) == list(range(6))
    assert sorted(batch[2] for batch in found) == list(range(6))
    assert streams.longest(0) == (5, 5)


def test_no_rows_are_refused():
    with pytest.raises(PlanError, match="no rows"):
        TwoStreams([], [], [], (1, 1), seed=0)


def test_lengths_are_those_of_the_tokens():
    rows = [{"input_ids": [1] * size, "length": 99} for size in (3, 1, 2)]
    assert row_lengths(rows) == [3, 1, 2]
    assert row_lengths(Dataset.from_list(rows).select([2, 0])) == [2, 3]
    tensors = Dataset.from_list(rows).with_format("torch")
    assert row_lengths(tensors) == [3, 1, 2]
    made = Dataset.from_list([{"text": "abc"}, {"text": "a"}])
    made.set_transform(lambda batch: {"input_ids": [torch.ones(len(text)) for text in batch["text"]]})
    assert row_lengths(made) == [3, 1]
    assert row_lengths([{"length": 4}]) == [4]


def test_rows_that_do_not_tell_their_length_are_refused():
    with pytest.raises(PlanError, match=r"\['text'\] does not tell it; tokenise the dataset"):
        row_lengths(Dataset.from_list([{"text": "a"}]))
    with pytest.raises(PlanError, match="list does not tell"):
        row_lengths([[1, 2]])
    with pytest.raises(PlanError, match="map-style"):
        row_lengths(iter([]))
