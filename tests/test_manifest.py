"""A selection survives a round trip, and every way to tamper with it is found and named."""

from __future__ import annotations

import copy
import json
import os
import pickle

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_dataset

from hf_eff.errors import ManifestError, OptionError
from hf_eff.manifest import MANIFEST, ROWS, Selection, build_manifest, describe_scores, files, read_manifest
from hf_eff.numerics.row_hash import hash_of_hashes, row_hashes

POOL = Dataset.from_list([{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(20)])
CHOSEN = [7, 3, 11, 0]


def selection_of(dataset=POOL, indices=CHOSEN, **fields):
    hashes = row_hashes(dataset)
    scores = np.linspace(0, 1, len(dataset))
    about = {"method": "toy", "seed": 5, "num_selected": len(indices), "params": {"fraction": 0.2}}
    data = {"num_rows": len(dataset), "columns": sorted(dataset.column_names), "digest": hash_of_hashes(hashes)}
    manifest = build_manifest(
        data, {**about, **fields.pop("about", {})}, scores=describe_scores(scores, higher_is_better=True)
    )
    defaults = {
        "row_hashes": [hashes[i] for i in indices],
        "scores": scores[indices],
        "weights": np.array([1.0, 2.0, 0.0, 0.5][: len(indices)]),
        "reasons": [f"because {i}" for i in indices],
    }
    return Selection(np.array(indices), manifest, **{**defaults, **fields})


@pytest.fixture
def saved(tmp_path):
    selection_of().save(tmp_path / "selection")
    return tmp_path / "selection"


def edit(folder, change, name=MANIFEST):
    """Change the manifest of a saved selection as an attacker with a text editor would."""
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))


# -- round trip


def test_round_trip_keeps_everything_but_all_scores(saved):
    before, after = selection_of(row_ids=None), Selection.load(saved)
    assert after.indices.tolist() == CHOSEN
    assert after.indices.dtype == np.int64
    np.testing.assert_array_equal(after.scores, before.scores)
    np.testing.assert_array_equal(after.weights, before.weights)
    assert (after.reasons, after.row_hashes, after.row_ids) == (before.reasons, before.row_hashes, None)
    assert after.digest == before.digest
    rest = {key: value for key, value in after.manifest.items() if key not in ("selection", "provenance")}
    assert rest == {key: before.manifest[key] for key in rest}
    assert sorted(path.name for path in saved.iterdir()) == [MANIFEST, ROWS]


def test_what_was_not_given_stays_absent(tmp_path):
    bare = selection_of(scores=None, weights=None, reasons=(), row_hashes=None, row_ids=["a", "b", "c", "d"])
    after = Selection.load(bare.save(tmp_path))
    assert (after.scores, after.weights, after.row_hashes) == (None, None, None)
    assert after.reasons == [""] * 4
    assert after.row_ids == ["a", "b", "c", "d"]


def test_plain_datasets_reads_the_rows_file(saved, tmp_path):
    rows = load_dataset("parquet", data_files=str(saved / ROWS), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["index"][:] == CHOSEN
    assert rows.column_names == ["index", "row_hash", "row_id", "score", "weight", "rank", "phase", "reason"]
    assert rows["rank"][:] == [0, 1, 2, 3]


def test_saving_twice_gives_the_same_bytes(tmp_path):
    selection = selection_of()
    first, second = selection.save(tmp_path / "a"), selection.save(tmp_path / "b")
    for name in (MANIFEST, ROWS):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_the_digest_sees_what_changes_training_and_nothing_else():
    base = selection_of().digest
    assert selection_of(reasons=["x"] * 4, scores=None, about={"name": "other"}).digest == base
    others = [
        selection_of(indices=[3, 7, 11, 0]),
        selection_of(weights=np.array([1.0, 2.0, 0.0, 0.25])),
        selection_of(weights=None),
        selection_of(about={"seed": 6}),
        selection_of(about={"params": {"fraction": 0.3}}),
        selection_of(about={"method": "other"}),
        selection_of(dataset=POOL.map(lambda row: {"prompt": row["prompt"] + "!"})),
    ]
    assert len({base, *(other.digest for other in others)}) == 8


# -- apply


def test_apply_takes_the_rows_in_order_of_preference():
    assert selection_of().apply(POOL)["prompt"][:] == [f"question {i}" for i in CHOSEN]


def test_apply_works_on_lists_as_a_map_style_dataset():
    rows = selection_of().apply([POOL[i] for i in range(20)])
    assert len(rows) == 4
    assert [row["prompt"] for row in rows] == [f"question {i}" for i in CHOSEN]
    assert rows[1:3][0]["prompt"] == "question 3"


def test_extra_columns_do_not_matter_but_missing_ones_do():
    selection = selection_of()
    assert len(selection.apply(POOL.add_column("row_id", list(range(20))))) == 4
    with pytest.raises(ManifestError, match=r"lacks the columns \['completion'\]"):
        selection.apply(POOL.remove_columns("completion"))


def test_one_edited_row_is_named():
    edited = POOL.map(lambda row, i: {"completion": "!" if i == 11 else row["completion"]}, with_indices=True)
    with pytest.raises(ManifestError, match=r"1 of 4 chosen rows have another content than when selected: row 11\."):
        selection_of().apply(edited)


def test_an_edit_outside_the_choice_is_found_by_full_verification_only():
    edited = POOL.map(lambda row, i: {"completion": "!" if i == 12 else row["completion"]}, with_indices=True)
    selection = selection_of()
    assert len(selection.apply(edited)) == 4
    selection.verify(POOL, level="full")
    with pytest.raises(ManifestError, match="other rows of the dataset have changed or moved"):
        selection.verify(edited, level="full")


def test_a_shuffled_copy_is_named_and_can_be_rematched():
    shuffled, selection = POOL.shuffle(seed=1), selection_of()
    with pytest.raises(ManifestError, match=r"in another order, as a shuffled copy would .* on_mismatch='rematch'"):
        selection.apply(shuffled)
    found = selection.apply(shuffled, on_mismatch="rematch")
    assert found["prompt"][:] == [f"question {i}" for i in CHOSEN]


def test_another_length_is_named_and_a_longer_copy_can_be_rematched():
    longer = Dataset.from_list([{"prompt": "new", "completion": "new"}, *POOL])
    with pytest.raises(ManifestError, match="the dataset has 21 rows; the selection was made from 20"):
        selection_of().apply(longer)
    found = selection_of().apply(longer, on_mismatch="rematch")
    assert found["prompt"][:] == [f"question {i}" for i in CHOSEN]
    with pytest.raises(ManifestError, match="1 of 4 chosen rows are not in the dataset; the first was row 11"):
        selection_of().apply(POOL.select(range(11)), on_mismatch="rematch")


def test_repeated_rows_are_each_taken_once():
    twice = Dataset.from_list([{"prompt": "same", "completion": "same"}] * 3 + [{"prompt": "x", "completion": "y"}])
    selection = selection_of(twice, [0, 2, 3], weights=None)
    turned = twice.select([3, 2, 1, 0])
    assert sorted(selection.locate(turned, on_mismatch="rematch").tolist()) == [0, 1, 2]
    with pytest.raises(ManifestError, match="fewer copies of a repeated row"):
        selection.apply(twice.select([0, 3]), on_mismatch="rematch")


def test_a_stream_is_matched_by_content_even_after_a_shuffle():
    stream = selection_of().apply(POOL.to_iterable_dataset(num_shards=4).shuffle(seed=3, buffer_size=20))
    assert sorted(row["prompt"] for row in stream) == sorted(f"question {i}" for i in CHOSEN)
    with pytest.raises(ManifestError, match="no row hashes"):
        selection_of(row_hashes=None).apply(POOL.to_iterable_dataset())


def test_unknown_policy_is_refused():
    with pytest.raises(OptionError, match=r"on_mismatch must be one of \['error', 'rematch', 'warn'\], got 'ignore'"):
        selection_of().apply(POOL, on_mismatch="ignore")
    with pytest.raises(OptionError, match=r"level must be one of \['fast', 'rows', 'full'\], got 'deep'"):
        selection_of().verify(POOL, "deep")


# -- tampering


def test_truncated_and_swapped_rows_are_found(saved, tmp_path):
    whole = (saved / ROWS).read_bytes()
    (saved / ROWS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ManifestError, match=r"train.parquet is missing, truncated or not the file .* \(SHA-256 differs\)"
    ):
        Selection.load(saved)
    selection_of(indices=[1, 2, 3, 4]).save(tmp_path / "other")
    (saved / ROWS).write_bytes((tmp_path / "other" / ROWS).read_bytes())
    with pytest.raises(ManifestError, match="SHA-256 differs"):
        Selection.load(saved)
    (saved / ROWS).unlink()
    with pytest.raises(ManifestError, match="is missing"):
        Selection.load(saved)


def with_table(folder, change):
    """Replace the rows and the manifest's hash of them: only the content can give it away."""
    table = pq.read_table(folder / ROWS)
    pq.write_table(change(table), folder / ROWS)
    digest = files.file_hash(folder / ROWS)
    edit(folder, lambda values: values["selection"].update(sha256=digest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.slice(0, 3), "has 3 rows; its manifest says 4"),
        (lambda t: t.drop_columns(["weight"]), "must have the columns"),
        (lambda t: t.append_column("code", t["reason"]), "must have the columns"),
        (lambda t: t.set_column(0, "index", [[7, 3, 11, 20]]), "index 20 is outside the dataset of 20 rows"),
        (lambda t: t.set_column(0, "index", [[7, -1, 11, 0]]), "index -1 is outside the dataset"),
        (lambda t: t.set_column(0, "index", [[7, 3, 7, 0]]), "indices repeat"),
        (lambda t: t.set_column(0, "index", [[7, None, 3, 0]]), "rows without an index"),
    ],
    ids=["short", "lost_column", "extra_column", "too_high", "negative", "repeated", "null"],
)
def test_rows_that_do_not_fit_are_refused_even_with_a_fresh_hash(saved, change, message):
    with_table(saved, change)
    with pytest.raises(ManifestError, match=message):
        Selection.load(saved)


def test_weights_that_are_not_weights_are_refused():
    for bad in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ManifestError, match="weights must be finite and not negative"):
            selection_of(weights=np.array([1.0, bad, 1.0, 1.0]))
    with pytest.raises(ManifestError, match="3 scores do not fit 4 indices"):
        selection_of(scores=np.zeros(3))
    with pytest.raises(ManifestError, match="num_selected=3, but there are 4 rows"):
        selection_of(about={"num_selected": 3})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "manifest must be an object, got list"),
        ('{"format": NaN}', "NaN is not a JSON number"),
        ('{"a": 1, "a": 2}', "a key is repeated"),
        ("[" * 200_000, "is not valid JSON"),
        ("\udcff", "is not valid JSON"),
    ],
    ids=["cut", "list", "nan", "duplicate", "deep", "bytes"],
)
def test_bad_json_is_named(saved, text, message):
    (saved / MANIFEST).write_text(text, errors="surrogateescape")
    with pytest.raises(ManifestError, match=message):
        Selection.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(trust_remote_code=True), r"manifest has unknown keys \['trust_remote_code'\]"),
        (lambda m: m["dataset"].update(script="x.py"), r"manifest.dataset has unknown keys \['script'\]"),
        (lambda m: m["selection"].pop("seed"), r"manifest.selection lacks the keys \['seed'\]"),
        (lambda m: m["selection"].update(seed="5"), "manifest.selection.seed must be int, got '5'"),
        (lambda m: m["selection"].update(seed=True), "manifest.selection.seed must be int, got True"),
        (lambda m: m.update(dataset=3), "manifest.dataset must be an object"),
        (lambda m: m.update(format_version=2), "version 2; this release of hf_eff reads"),
        (lambda m: m.update(format="pickle"), "has format 'pickle'"),
        (lambda m: m["dataset"]["row_hash"].update(algo="md5"), "row_hash.algo is 'md5'; this release of hf_eff reads"),
        (lambda m: m["dataset"].update(columns=[["a"]]), r"manifest.dataset.columns\[0\] must be str, got list"),
    ],
    ids=["top", "nested", "lost", "text", "bool", "shape", "version", "format", "hash", "columns"],
)
def test_a_manifest_outside_the_schema_is_refused_by_key(saved, change, message):
    edit(saved, change)
    with pytest.raises(ManifestError, match=message):
        Selection.load(saved)


@pytest.mark.parametrize("name", ["../train.parquet", "/etc/passwd", "a/b.parquet", "..", "", "c:x", "a\\b"])
def test_paths_that_leave_the_folder_are_refused(saved, name):
    edit(saved, lambda values: values["selection"].update(file=name))
    with pytest.raises(ManifestError, match="must be a plain file name in the same folder"):
        Selection.load(saved)


def test_links_are_not_followed(saved, tmp_path):
    for name in (ROWS, MANIFEST):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
        (saved / name).unlink()
        (saved / name).symlink_to(tmp_path / name)
        with pytest.raises(ManifestError, match=r"plain file name|is not a manifest file"):
            Selection.load(saved)


def test_a_manifest_too_large_is_not_read(saved, monkeypatch):
    monkeypatch.setattr(files, "MAX_MANIFEST_BYTES", 100)
    with pytest.raises(ManifestError, match="larger than a manifest may be"):
        read_manifest(saved / MANIFEST)


def test_a_folder_without_a_manifest_is_named(tmp_path):
    with pytest.raises(ManifestError, match=r"holds no manifest\.json"):
        Selection.load(tmp_path)


def test_a_pickle_under_our_names_is_not_executed(saved, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    for name in (MANIFEST, ROWS):
        content = (saved / name).read_bytes()
        (saved / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(ManifestError):
            Selection.load(saved)
        (saved / name).write_bytes(content)
    assert not (tmp_path / "executed").exists()


# -- writing


def test_nan_never_reaches_a_manifest(tmp_path):
    selection = selection_of(about={"notes": {"gain": float("nan")}})
    with pytest.raises(ManifestError, match="cannot be written as JSON"):
        selection.save(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["write_table", "write_text", "first_replace", "second_replace"])
def test_a_failure_in_the_middle_leaves_a_whole_selection(saved, monkeypatch, stage):
    old, new = Selection.load(saved), selection_of(indices=[1, 2, 4, 5])
    calls, real = [], os.replace

    def fail(*args, **kwargs):
        raise OSError("disk is full")

    def replace(source, target):
        calls.append(target)
        if len(calls) == (1 if stage == "first_replace" else 2):
            raise OSError("killed")
        real(source, target)

    with monkeypatch.context() as patch:
        if stage == "write_table":
            patch.setattr(files.pq, "write_table", fail)
        elif stage == "write_text":
            patch.setattr(files.Path, "write_text", fail)
        else:
            patch.setattr(files.os, "replace", replace)
        with pytest.raises(OSError, match=r"disk is full|killed"):
            new.save(saved)
    # Before the first rename the old selection stands; after it, the new one does. Never a mixture.
    expected = new if stage == "second_replace" else old
    assert Selection.load(saved).digest == expected.digest
    new.save(saved)
    assert Selection.load(saved).digest == new.digest
    assert sorted(path.name for path in saved.iterdir()) == [MANIFEST, ROWS]


def test_a_first_save_that_failed_is_no_selection(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        selection_of().save(tmp_path)
    with pytest.raises(ManifestError, match="is missing"):
        Selection.load(tmp_path)


def test_scores_are_described_without_nan():
    described = describe_scores(np.array([1.0, np.nan, 3.0, np.inf]), higher_is_better=False)
    assert (described["nan"], described["min"], described["max"], described["mean"]) == (2, 1.0, 3.0, 2.0)
    assert sum(described["hist"]["counts"]) == 2
    assert describe_scores(None, higher_is_better=True) == {"higher_is_better": True, "nan": 0}


def test_the_manifest_is_not_shared_with_the_saved_copy(tmp_path):
    selection = selection_of()
    before = copy.deepcopy(dict(selection.manifest))
    selection.save(tmp_path)
    assert selection.manifest == before


def test_the_module_loads_no_deep_learning_library():
    import subprocess
    import sys

    code = "import sys, hf_eff.manifest; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
