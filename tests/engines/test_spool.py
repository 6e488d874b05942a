"""Streams become datasets; what has a length stays as it is."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset

from hf_eff import select_dataset
from hf_eff.engines.spool import spooled
from hf_eff.errors import DataError
from hf_eff.testing.tiny import tiny_pool, tiny_tokenizer


def test_a_stream_is_read_once_in_order():
    pool = tiny_pool(8)
    rows = spooled(pool.to_iterable_dataset())
    assert isinstance(rows, Dataset)
    assert rows.to_list() == pool.to_list()


def test_what_has_a_length_is_not_copied():
    pool = tiny_pool(4)
    assert spooled(pool) is pool
    rows = [{"text": "a"}]
    assert spooled(rows) is rows


def test_a_limit_for_rows_of_known_length_is_refused():
    with pytest.raises(DataError, match=r"stream_rows=2 is for a stream, and the pool has a length"):
        spooled(tiny_pool(4), limit=2)


def test_an_endless_stream_needs_a_limit():
    endless = IterableDataset.from_generator(lambda: ({"text": str(i)} for i in itertools.count()))
    assert spooled(endless, limit=5)["text"][:] == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize(("limit", "message"), [(0, "must be at least 1, got 0"), (None, "ends before its first row")])
def test_nothing_to_read(limit, message):
    empty = IterableDataset.from_generator(lambda: iter([]))
    with pytest.raises(DataError, match=message):
        spooled(empty, limit=limit)


def test_the_files_go_with_the_process():
    code = (
        "from hf_eff.engines.spool import spooled; from hf_eff.testing.tiny import tiny_pool\n"
        "print(spooled(tiny_pool(4).to_iterable_dataset()).cache_files[0]['filename'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    path = Path(done.stdout.splitlines()[-1])
    assert path.suffix == ".arrow"
    assert not path.exists()


def test_a_stream_that_changed_is_read_anew(tmp_path):
    path = tmp_path / "rows.txt"
    texts = []
    for content in ("one", "two"):
        path.write_text(content)
        stream = IterableDataset.from_generator(lambda: ({"text": line} for line in path.read_text().split()))
        texts.append(spooled(stream)["text"][:])
    assert texts == [["one"], ["two"]]


def test_a_stream_gives_the_selection_of_its_rows():
    pool, tokenizer = tiny_pool(24), tiny_tokenizer()
    options = {"processing_class": tokenizer, "fraction": 0.25, "seed": 3}
    whole = select_dataset(pool, "random", **options)
    streamed = select_dataset(pool.to_iterable_dataset(), "random", **options)
    part = select_dataset(pool.to_iterable_dataset(), "random", stream_rows=8, **options)
    assert streamed.indices.tolist() == whole.indices.tolist()
    assert max(part.indices) < 8
    assert streamed.apply(pool).to_list() == whole.apply(pool).to_list()
