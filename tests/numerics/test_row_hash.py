"""Content hashes: equal for equal content wherever it comes from, different for any edit."""

from __future__ import annotations

import datetime as dt
import decimal
import hashlib
import json
import time

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value

from hf_eff.errors import DataError
from hf_eff.numerics.row_hash import hash_of_hashes, row_hash, row_hashes

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f'Grüße {i} \U0001f600 "quoted"\n'},
            {"role": "assistant", "content": "ok"},
        ],
        "score": [0.1 + 0.2, 1e-7, 1e22, -0.0, float(i)][i % 5],
        "count": i,
        "flag": i % 2 == 0,
        "note": None if i % 3 else "x",
    }
    for i in range(25)
]


def literal(row):
    text = json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@pytest.fixture
def copies(tmp_path):
    dataset = Dataset.from_list(ROWS)
    dataset.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    cache = str(tmp_path / "cache")
    return [
        dataset,
        ROWS,
        Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=cache),
        Dataset.from_json(str(tmp_path / "rows.jsonl"), cache_dir=cache),
        dataset.with_format("numpy"),
        dataset.with_transform(lambda batch: {"messages": batch["messages"]}),
        dataset.select_columns(list(reversed(dataset.column_names))),
    ]


def test_a_row_has_one_hash_wherever_it_comes_from(copies):
    expected = [literal(row) for row in ROWS]
    for copy in copies:
        assert row_hashes(copy) == expected
    assert [row_hash(row) for row in ROWS] == expected


def test_any_edit_changes_one_hash():
    before = row_hashes(Dataset.from_list(ROWS))
    for change in ({"count": 8}, {"flag": False}, {"note": ""}, {"score": 0.30000000000000004 + 1e-16}):
        edited = [dict(row) for row in ROWS]
        key, value = next(iter(change.items()))
        assert edited[6][key] != value
        edited[6][key] = value
        after = row_hashes(Dataset.from_list(edited))
        assert [i for i in range(25) if before[i] != after[i]] == [6]


def test_only_declared_columns_count():
    rows = Dataset.from_list(ROWS)
    numbered = rows.add_column("row_id", list(range(25)))
    assert row_hashes(numbered) != row_hashes(rows)
    assert row_hashes(numbered, rows.column_names) == row_hashes(rows)
    assert [row_hash(row, ["count"]) for row in ROWS] == row_hashes(numbered, ["count"])


def test_dates_bytes_decimals_and_arrays_have_a_canonical_form():
    moment = dt.datetime(2026, 11, 21, 10, 30, tzinfo=dt.timezone.utc)
    assert row_hash({"a": moment}) == literal({"a": "2026-11-21T10:30:00+00:00"})
    assert row_hash({"a": moment.date()}) == literal({"a": "2026-11-21"})
    assert row_hash({"a": dt.timedelta(seconds=90)}) == literal({"a": 90.0})
    assert row_hash({"a": decimal.Decimal("1.50")}) == literal({"a": "1.50"})
    assert row_hash({"a": b"abc"}) == literal({"a": {"sha256": hashlib.sha256(b"abc").hexdigest()}})
    assert row_hash({"a": np.arange(3), "b": np.float64(0.5)}) == literal({"a": [0, 1, 2], "b": 0.5})
    assert row_hash({"a": "\ud800"}) != row_hash({"a": "\ud801"})


def test_images_and_unknown_types_are_refused_by_name():
    features = Features({"id": Value("int64"), "picture": Image(decode=False)})
    dataset = Dataset.from_list([{"id": 1, "picture": {"bytes": b"x", "path": None}}], features=features)
    with pytest.raises(DataError, match="column 'picture' holds Image"):
        row_hashes(dataset)
    assert len(row_hashes(dataset, ["id"])) == 1
    nested = Dataset.from_list(
        [{"pages": [{"bytes": b"x", "path": None}]}], features=Features({"pages": [Image(decode=False)]})
    )
    with pytest.raises(DataError, match="column 'pages'"):
        row_hashes(nested)
    with pytest.raises(DataError, match="a value of type object has no canonical form"):
        row_hash({"a": object()})


def test_the_digest_depends_on_order_and_content():
    hashes = row_hashes(ROWS)
    assert hash_of_hashes(hashes) == hash_of_hashes(list(hashes))
    assert len({hash_of_hashes(h) for h in (hashes, hashes[::-1], hashes[1:], [])}) == 4


def test_hashing_is_fast_enough_for_large_pools():
    rows = Dataset.from_list([{"prompt": f"What is {i}?" * 10, "completion": f" {i}" * 10} for i in range(20_000)])
    started = time.process_time()
    row_hashes(rows)
    assert time.process_time() - started < 5.0
