"""Chosen rows are found by content or id in any order, and selections of selections name their parents."""

import pickle
from collections import defaultdict, deque

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_eff import SelectionMismatchWarning, combine_selections, refresh_selection
from hf_eff.errors import ManifestError, OptionError
from hf_eff.manifest import MANIFEST, Selection, build_manifest, matching
from hf_eff.manifest.columns import HashColumn, TextColumn
from hf_eff.manifest.files import file_hash
from hf_eff.manifest.matching import ABSENT, TOO_FEW, RowFilter, changed_places, content_digest, found_positions
from hf_eff.numerics.row_hash import hash_of_hashes, row_hash, row_hashes

POOL = Dataset.from_list([{"uid": f"u{i}", "text": f"row {i}"} for i in range(12)])
HASHES = row_hashes(POOL)
CONTENT = st.integers(0, 3).map("{:032x}".format)


def chosen(rows, method="toy", ids=True, **changes):
    about = {"method": method, "seed": 0, "num_selected": len(rows)}
    data = {
        "num_rows": 12, "columns": ["text", "uid"], "digest": hash_of_hashes(HASHES),
        "preprocess": {"id_column": "uid"},
    }  # fmt: skip
    fields = {
        "row_hashes": [HASHES[i] for i in rows], "scores": np.array(rows) / 2, "weights": np.array(rows) + 1.0,
        "reasons": [f"{method} {i}" for i in rows], "row_ids": [f"u{i}" for i in rows] if ids else None,
    }  # fmt: skip
    return Selection(np.array(rows), build_manifest(data, about), **{**fields, **changes})


# -- columns


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(min_size=16, max_size=16), max_size=8))
def test_hashes_come_back_from_arrow_as_they_went(values):
    texts = [value.hex() for value in values]
    column = HashColumn.of(texts)
    assert column == texts
    assert column.arrow().to_pylist() == texts
    assert HashColumn.of(column.arrow()[1:]) == texts[1:]
    assert pickle.loads(pickle.dumps(column)) == column


def test_texts_come_back_and_can_be_picked():
    column = TextColumn.of(["a", "b", "a"])
    assert column == ["a", "b", "a"]
    assert column[1:] == ["b", "a"]
    assert column[np.array([2, 1])] == ["a", "b"]
    assert TextColumn.repeated("a", 3) == ["a"] * 3
    assert column != TextColumn.repeated("a", 3)
    assert column != ["a", "b"]


@pytest.mark.parametrize("bad", [["0" * 31], ["g" * 32], ["A" * 32], [None], [3], ["0" * 32, ""]])
def test_what_is_no_hash_is_refused(bad):
    with pytest.raises(ManifestError):
        HashColumn.of(bad)


# -- finding rows


@settings(max_examples=200, deadline=None)
@given(st.lists(CONTENT, max_size=7), st.lists(CONTENT, max_size=9))
def test_rows_are_found_as_one_by_one(wanted, held):
    places, expected = defaultdict(deque), []
    for place, value in enumerate(held):
        places[value].append(place)
    for value in wanted:
        place = ABSENT if value not in held else places[value].popleft() if places[value] else TOO_FEW
        expected.append(place)
    assert found_positions(HashColumn.of(wanted), HashColumn.of(held)).tolist() == expected


@pytest.mark.parametrize("block", [1, 5, 100])
def test_blocks_do_not_show(monkeypatch, block):
    monkeypatch.setattr(matching, "_BLOCK", block)
    assert content_digest(POOL, ["uid", "text"]) == hash_of_hashes(HASHES)
    wanted = HashColumn.of([HASHES[i] for i in (3, 0, 7)])
    assert changed_places(wanted, POOL, None, np.array([3, 1, 8])).tolist() == [1, 2]
    assert changed_places(wanted, POOL.to_list(), None, np.array([3, 0, 7])).tolist() == []


def test_a_stream_filter_tells_rows_whose_hashes_begin_alike():
    code = bytes.fromhex(row_hash({"a": 1}))
    others = np.frombuffer(b"".join(code[:8] + bytes([n] * 8) for n in (0, 255)) + code, dtype=np.uint8)
    assert RowFilter.of(HashColumn(others), ["a"])({"a": 1, "b": 2})
    assert not RowFilter.of(HashColumn(others.reshape(3, 16)[:2]), ["a"])({"a": 1})
    with pytest.raises(ManifestError, match=r"lacks the columns \['a'\]"):
        RowFilter.of(HashColumn(others), ["a"])({"b": 2})


# -- levels and policies


def test_fast_looks_at_names_and_numbers_only():
    selection, edited = chosen([3, 5]), POOL.map(lambda row: {"text": row["text"] + "!"})
    selection.verify(edited, "fast")
    with pytest.raises(ManifestError, match="2 of 2 chosen rows have another content than when selected: row 3, 5"):
        selection.verify(edited)
    with pytest.raises(ManifestError, match="the dataset has 11 rows"):
        selection.verify(POOL.select(range(11)), "fast")


def test_warn_takes_rows_by_number_and_says_what_differs():
    edited = POOL.map(lambda row, i: {"text": "!" if i == 5 else row["text"]}, with_indices=True)
    with pytest.warns(SelectionMismatchWarning, match=r"row 5\. Its rows are taken by number\."):
        found = chosen([3, 5]).apply(edited, on_mismatch="warn")
    assert found["text"][:] == ["row 3", "!"]
    with pytest.raises(ManifestError, match="the dataset has 5 rows"):
        chosen([3, 5]).apply(POOL.select(range(5)), on_mismatch="warn")


def test_ids_come_before_content():
    selection = chosen([3, 5], row_hashes=None)
    shuffled = POOL.shuffle(seed=1).select(range(11))
    assert chosen([3, 5]).apply(POOL.select([5, 4, 3]), on_mismatch="rematch")["uid"][:] == ["u3", "u5"]
    assert selection.apply(POOL.select([5, 4, 3]), on_mismatch="rematch")["uid"][:] == ["u3", "u5"]
    with pytest.raises(ManifestError, match="1 of 2 chosen rows are not in the dataset: id 'u5'"):
        chosen([3, 5]).apply(POOL.select([3, 4]), on_mismatch="rematch")
    edited = shuffled.map(lambda row: {"text": row["text"] + "!"})
    with pytest.raises(ManifestError, match="have another content than when selected: id 'u"):
        chosen(sorted(int(uid[1:]) for uid in shuffled["uid"][:2])).apply(edited, on_mismatch="rematch")
    with pytest.raises(ManifestError, match="the ids in column 'uid' of the dataset repeat"):
        chosen([3]).apply(Dataset.from_list([*POOL, POOL[0]]), on_mismatch="rematch")


def test_without_hashes_and_ids_nothing_is_found_elsewhere():
    with pytest.raises(ManifestError, match="neither row hashes nor ids"):
        chosen([3], ids=False, row_hashes=None).apply(POOL.select(range(9)), on_mismatch="rematch")


# -- lineage


def test_selections_combine_as_sets_and_name_their_parents(tmp_path):
    one, two = chosen([3, 5, 1], "a"), chosen([7, 1, 2], "b")
    union = combine_selections(one, two)
    assert union.indices.tolist() == [3, 5, 1, 7, 2]
    assert union.reasons == ["a 3", "a 5", "a 1", "b 7", "b 2"]
    assert union.row_ids == ["u3", "u5", "u1", "u7", "u2"]
    assert union.weights.tolist() == [4, 6, 2, 8, 3]
    assert union.scores is None
    assert combine_selections(one, chosen([7], "a")).scores.tolist() == [1.5, 2.5, 0.5, 3.5]
    assert combine_selections(one, two, operation="intersection").indices.tolist() == [1]
    assert combine_selections(one, two, operation="difference").indices.tolist() == [3, 5]
    saved = file_hash(two.save(tmp_path / "two") / MANIFEST)
    assert union.manifest["provenance"]["parents"] == [one.identity, saved]
    loaded = Selection.load(union.save(tmp_path / "union"))
    assert loaded.apply(POOL)["uid"][:] == ["u3", "u5", "u1", "u7", "u2"]
    assert loaded.identity == file_hash(tmp_path / "union" / MANIFEST) == union.identity


def test_what_does_not_combine_is_named():
    other = chosen([1])
    foreign = chosen([1])
    foreign.manifest["dataset"]["digest"] = "0" * 32
    with pytest.raises(ManifestError, match="of different datasets: digest is"):
        combine_selections(other, foreign)
    with pytest.raises(ManifestError, match="the intersection of these selections has no rows"):
        combine_selections(other, chosen([2]), operation="intersection")
    with pytest.raises(OptionError, match=r"operation must be one of \['union'"):
        combine_selections(other, chosen([2]), operation="xor")


def test_a_refresh_names_what_it_replaces_and_when(tmp_path):
    first = chosen([3, 5])
    second = refresh_selection(first, chosen([1, 2]), 100)
    third = refresh_selection(second, chosen([8]), 250)
    assert third.manifest["selection"]["phases"] == [
        {"phase": 0, "from_step": 0, "to_step": 100},
        {"phase": 1, "from_step": 100, "to_step": 250},
        {"phase": 2, "from_step": 250, "to_step": None},
    ]
    assert third.manifest["provenance"]["parents"] == [second.identity]
    rows = Dataset.from_parquet(
        str(third.save(tmp_path / "third") / "train.parquet"), cache_dir=str(tmp_path / "cache")
    )
    assert rows["phase"][:] == [2]
    with pytest.raises(OptionError, match="lies before the phase that it ends"):
        refresh_selection(second, chosen([8]), 50)
