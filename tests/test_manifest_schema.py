"""Manifests are somebody else's text: whatever is in them, the answer is a selection or one clear error."""

import copy
import json
import math
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_eff import manifest as manifest_module
from hf_eff.errors import ManifestError
from hf_eff.manifest import MANIFEST, ROWS, Selection, build_manifest, describe_scores, files, read_manifest
from hf_eff.manifest.card import dataset_card
from hf_eff.manifest.schema import JSON_SCHEMA

SCHEMA_FILE = Path(manifest_module.__file__).parent / "selection.v1.schema.json"
try:
    from jsonschema import Draft4Validator

    VALIDATOR = Draft4Validator(JSON_SCHEMA)
except ImportError:  # an outside judge, where there is one
    VALIDATOR = None
HASHES = ["00ff" * 8, "0123" * 8, "89ab" * 8]


def selection():
    scores = describe_scores(np.arange(9.0), higher_is_better=True)
    data = {"num_rows": 9, "repo_id": "user/pool", "revision": "a" * 40, "columns": ["text"], "digest": "ab" * 16}
    about = {"method": "toy", "seed": 1, "num_selected": 3, "params": {"fraction": 0.3, "nested": {"a": [1, 2]}}}
    return Selection(np.array([4, 0, 8]), build_manifest(data, about, scores=scores), HASHES, scores=np.arange(3))


WHOLE = copy.deepcopy(dict(selection().manifest))


def test_the_published_schema_is_the_one_that_is_checked():
    assert json.loads(SCHEMA_FILE.read_text()) == JSON_SCHEMA


def leaves(value, path=()):
    """Paths of every value inside a manifest."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, item in inner for found in leaves(item, (*path, key)))]


PLACES = [place for place in leaves(WHOLE) if place]
ODD = [
    None, True, False, 0, 1, -1, 7, 1.0, -0.5, 1e999, float("nan"), 10**30, "", "x", "../x", "/etc/passwd", "a\nb",
    "| |", "\x00", "\ud800", "é" * 500, "0" * 64, "f" * 32, "f" * 31, [], {}, [1], ["a"], [None], [[1]], {"a": 1},
    {"": {"b": [{}]}}, {"phase": 0, "from_step": 0, "to_step": 1}, [{"phase": -1, "from_step": 0, "to_step": None}],
]  # fmt: skip


def mutated(seed):
    """A manifest with one to three values set, lost or added somewhere."""
    values, draw = copy.deepcopy(WHOLE), random.Random(seed)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        place, kind, value = (
            draw.choice(PLACES),
            draw.choice(["set", "set", "drop", "add"]),
            copy.deepcopy(draw.choice(ODD)),
        )
        owner = values
        try:
            for key in place[:-1]:
                owner = owner[key]
            if kind == "drop":
                del owner[place[-1]]
            elif kind == "add" and isinstance(owner, dict):
                owner[f"{place[-1]}2"] = value
            else:
                owner[place[-1]] = value
        except (KeyError, IndexError, TypeError):
            continue
    return values


def fits(validator, values):
    """Whether the schema and what it cannot say allow the values; ``read_manifest`` should agree."""
    numbers = [leaf for leaf in scalars_of(values) if isinstance(leaf, (int, float)) and not isinstance(leaf, bool)]
    if any("\ud800" in leaf for leaf in scalars_of(values) if isinstance(leaf, str)):
        return False
    if any(not math.isfinite(n) if isinstance(n, float) else abs(n) > 2**63 - 1 for n in numbers):
        return False
    if not validator.is_valid(values):
        return False
    histogram = values["scores"]["hist"]
    return len(histogram["edges"]) == (len(histogram["counts"]) + 1 if histogram["counts"] else 0)


def scalars_of(value):
    inner = [*value.values(), *value] if isinstance(value, dict) else value if isinstance(value, list) else None
    return [value] if inner is None else [scalar for item in inner for scalar in scalars_of(item)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("fuzz") / "selection"
    selection().save(place)
    return place


@settings(max_examples=1200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**64))
def test_any_manifest_is_read_and_shown_or_refused_by_name(folder, seed):
    outside, values = sorted(folder.parent.iterdir()), mutated(seed)
    if isinstance(values.get("selection"), dict) and seed % 2:
        values["selection"] |= {"file": ROWS, "sha256": files.file_hash(folder / ROWS)}
    before = (folder / MANIFEST).read_bytes()
    # ASCII, so that a lone surrogate travels as an escape; NaN becomes a number without end, which JSON can say.
    (folder / MANIFEST).write_text(json.dumps(values).replace("NaN", "1e999").replace("Infinity", "1e999"))
    try:
        accepted = outcome(lambda: read_manifest(folder / MANIFEST)) is None
        if VALIDATOR is not None:
            assert accepted == fits(VALIDATOR, json.loads((folder / MANIFEST).read_text()))
        if outcome(lambda: Selection.load(folder)) is None:
            assert accepted
            show_and_save(Selection.load(folder), folder)
    finally:
        (folder / MANIFEST).write_bytes(before)
    assert sorted(folder.parent.iterdir()) == outside


def outcome(action):
    """None, or the error of a manifest; any other error ends the test."""
    try:
        action()
    except ManifestError as error:
        return str(error)[:1999] or "nothing said"
    return None


def show_and_save(found, folder):
    assert repr(found)
    assert len(found.digest) == 32
    assert dataset_card({"one": found.manifest}).count("\n---\n") == 1
    found.save(folder / "again")
    assert Selection.load(folder / "again").digest == found.digest


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**31), st.integers(1, 255), st.sampled_from([MANIFEST, ROWS]), st.booleans())
def test_any_damaged_byte_is_found(folder, place, flip, name, is_cut):
    before = (folder / name).read_bytes()
    damaged = bytearray(before)
    place %= len(damaged)
    damaged[place] ^= flip
    (folder / name).write_bytes(damaged[:place] if is_cut else damaged)
    try:
        if name == ROWS:
            with pytest.raises(ManifestError):
                Selection.load(folder)
            return
        outcome(lambda: Selection.load(folder))
    finally:
        (folder / name).write_bytes(before)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_rows_file_with_a_fresh_hash_is_read_or_refused(folder, data):
    """A rows file that its author made on purpose, with a manifest that agrees."""
    kept = {name: (folder / name).read_bytes() for name in (MANIFEST, ROWS)}
    table = pq.read_table(folder / ROWS)
    name = data.draw(st.sampled_from(table.column_names))
    options = {
        "index": st.integers(-(2**63), 2**63 - 1), "rank": st.integers(-(2**31), 2**31 - 1),
        "phase": st.integers(-(2**31), 2**31 - 1), "score": st.floats(width=32), "weight": st.floats(width=32),
    }  # fmt: skip
    value = st.one_of(
        st.none(), options.get(name, st.one_of(st.text("0af", min_size=32, max_size=32), st.text(max_size=9)))
    )
    place = table.column_names.index(name)
    column = data.draw(st.lists(value, min_size=3, max_size=3))
    try:
        changed = table.set_column(place, table.schema.field(name), pa.array(column, table.schema.field(name).type))
        pq.write_table(changed, folder / ROWS)
        values = json.loads(kept[MANIFEST])
        values["selection"]["sha256"] = files.file_hash(folder / ROWS)
        (folder / MANIFEST).write_text(json.dumps(values))
        if outcome(lambda: Selection.load(folder)) is None:
            found = Selection.load(folder)
            assert len(found) == len(found.reasons) == 3
            assert len(found.apply([{"text": str(i)} for i in range(9)], level="fast")) == 3
    finally:
        for file, content in kept.items():
            (folder / file).write_bytes(content)


def with_texts(folder, name, text):
    """The folder with one text, as often as there are rows, in a column."""
    table = pq.read_table(folder / ROWS)
    place = table.column_names.index(name)
    pq.write_table(table.set_column(place, name, pa.array([text] * 3, pa.string())), folder / ROWS)
    values = json.loads((folder / MANIFEST).read_text())
    values["selection"]["sha256"] = files.file_hash(folder / ROWS)
    (folder / MANIFEST).write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("reason", "x" * 2000, "has a reason of 2000 bytes; 1024 are allowed"),
        ("row_id", "x" * 2000, "has a row_id of 2000 bytes; 1024 are allowed"),
        ("row_hash", "f" * 33, "has a row_hash of 33 bytes; 32 are allowed"),
        ("row_hash", "F" * 32, "a row hash must be 32 hexadecimal digits"),
        ("row_hash", "f" * 31, "a row hash must be 32 hexadecimal digits"),
    ],
)
def test_texts_that_are_too_long_or_no_hash_are_refused(tmp_path, name, text, message):
    selection().save(tmp_path)
    with_texts(tmp_path, name, text)
    with pytest.raises(ManifestError, match=message):
        Selection.load(tmp_path)


def test_a_rows_file_larger_than_its_rows_may_be_is_not_read(tmp_path, monkeypatch):
    selection().save(tmp_path)
    monkeypatch.setattr(files, "rows_limit", lambda count: 100 * count)
    with pytest.raises(ManifestError, match="is larger than 3 rows may be"):
        Selection.load(tmp_path)


def test_a_number_without_end_is_refused(tmp_path):
    selection().save(tmp_path)
    text = (tmp_path / MANIFEST).read_text()
    (tmp_path / MANIFEST).write_text(text.replace('"fraction": 0.3', '"fraction": 1e999'))
    with pytest.raises(ManifestError, match=r"manifest.selection.params.fraction is inf, which is not a JSON number"):
        Selection.load(tmp_path)


# -- the card


def test_the_card_shows_what_the_manifest_says():
    card = dataset_card({"first": WHOLE}, "user/selections")
    assert "| first | user/pool | toy | 3 of 9 | 0 | 0 | 0.0s | 1 | aaaaaaaaaaaa |" in card
    assert 'load_selected(dataset, "user/selections", name="first")' in card
    assert 'selection="hub:user/selections/first"' in card
    assert card.count(" |###") == 9
    assert "keep the licence and the home of the dataset" in card


def test_nothing_in_a_manifest_changes_the_cards_head_or_table():
    hostile = copy.deepcopy(WHOLE)
    hostile["dataset"] |= {"repo_id": "user/x\n- configs: []"}
    hostile["selection"] |= {"method": "a | b\n---\n[x](javascript:y) <script>"}
    card = dataset_card({"1e3": hostile})
    head = yaml.safe_load(card.split("---")[1])
    assert head == {
        "tags": ["hf_eff", "selection-manifest"],
        "configs": [{"config_name": "1e3", "data_files": [{"split": "train", "path": "selections/1e3/train.parquet"}]}],
    }
    row = next(line for line in card.splitlines() if line.startswith("| 1e3"))
    assert row.count("|") == 10
    assert "<script>" not in card


def test_text_that_no_file_can_hold_is_refused(tmp_path):
    selection().save(tmp_path)
    text = (tmp_path / MANIFEST).read_text()
    for before, after in (('"toy"', '"\\ud800"'), ('"nested"', '"\\ud800"')):
        (tmp_path / MANIFEST).write_text(text.replace(before, after))
        with pytest.raises(ManifestError, match="holds text that is not Unicode"):
            Selection.load(tmp_path)
