"""A published selection in place of selecting: the same rows, its own record, and a lineage where rows moved."""

import warnings

import numpy as np
import pytest

from hf_eff import hub, select_dataset
from hf_eff.errors import ManifestError, OptionError
from hf_eff.manifest import SelectionMismatchWarning
from hf_eff.options import EffOptions, resolve_options
from hf_eff.registry import register_method, unregister_method
from hf_eff.selection import Selection, load_selected
from hf_eff.stages import published
from hf_eff.stages.published import Address, published_spec, read_published
from hf_eff.testing.tiny import tiny_pool, tiny_tokenizer

POOL = tiny_pool(24)


@pytest.fixture
def address(tmp_path):
    """Folder of a selection of six rows, usable as the name of a method."""
    folder = str(tmp_path / "chosen")
    select(POOL, "random", num_examples=6, output_dir=folder)
    register_method(published_spec(folder))
    yield folder
    unregister_method("selection", folder)


def select(pool, method, **options):
    return select_dataset(pool, method, processing_class=tiny_tokenizer(), **options)


def test_the_published_selection_is_the_result_itself(address):
    origin, found = Selection.load(address), select(POOL, address)
    assert found.digest == origin.digest
    assert found.identity == origin.identity
    assert found.apply(POOL)["prompt"][:] == origin.apply(POOL)["prompt"][:]
    assert found.manifest["selection"]["method"] == "random"


def test_another_dataset_is_refused_and_a_shuffled_one_followed_on_request(address):
    shuffled, origin = POOL.shuffle(seed=2), Selection.load(address)
    with pytest.raises(ManifestError, match="in another order, as a shuffled copy would"):
        select(shuffled, address)
    found = select(shuffled, address, on_mismatch="rematch")
    assert found.apply(shuffled)["prompt"][:] == origin.apply(POOL)["prompt"][:]
    assert found.manifest["provenance"]["parents"] == [origin.identity]
    assert found.manifest["selection"]["params"]["on_mismatch"] == "rematch"
    assert found.digest != origin.digest
    with pytest.warns(SelectionMismatchWarning, match="taken by number"):
        by_number = select(shuffled, address, on_mismatch="warn")
    assert by_number.indices.tolist() == origin.indices.tolist()
    by_number.verify(shuffled, "full")


def test_rows_that_an_earlier_stage_dropped_are_named(address):
    origin = Selection.load(address)
    kept = select(POOL, address, pipeline=[{"length": {"num_examples": len(POOL)}}])
    assert kept.indices.tolist() == origin.indices.tolist()
    assert kept.manifest["provenance"]["parents"] == [origin.identity]
    with pytest.raises(ManifestError, match=r"of 6 chosen rows are not in the pool, where rows may have been dropped"):
        select(POOL, address, pipeline=[{"length": {"num_examples": 3}}])
    edited = POOL.map(lambda row: {"prompt": row["prompt"] + "!"})
    with pytest.raises(ManifestError, match="6 of 6 chosen rows have another content"):
        select(edited, address, pipeline=[{"length": {"num_examples": len(POOL)}}])


def test_the_plan_knows_how_many_rows_there_will_be(address):
    resolved = resolve_options(EffOptions(selection=address))
    assert resolved.selects
    assert resolved.selection[0].config.size == {"kind": "num_examples", "value": 6}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hub:user/repo", Address("user/repo")),
        ("hub:user/repo/name", Address("user/repo", "name")),
        ("hub:user/repo@v1", Address("user/repo", None, "v1")),
        ("hub:user/repo/less-5pct@refs/pr/1", Address("user/repo", "less-5pct", "refs/pr/1")),
    ],
)
def test_addresses_are_read(text, expected):
    assert Address.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    ["hub:", "hub:repo", "user/repo", "hub:a/b/c/d", "hub:../x", "hub:a/../b", "hub:a/b/.x", "hub:a b/c", "/nowhere"],
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(OptionError, match="is no folder and no address"):
        published_spec(text)


def test_folders_of_runs_and_of_repositories_are_found_into(tmp_path, address):
    origin = Selection.load(address)
    origin.save(tmp_path / "run" / "selection")
    for name in ("one", "two"):
        origin.save(tmp_path / "repo" / "selections" / name)
    assert Selection.from_pretrained(tmp_path / "run").digest == origin.digest
    assert Selection.from_pretrained(tmp_path / "repo", "two").digest == origin.digest
    with pytest.raises(ManifestError, match=r"repo holds the selections \['one', 'two'\]; pass name="):
        Selection.from_pretrained(tmp_path / "repo")
    with pytest.raises(ManifestError, match="repo holds no selection 'three'"):
        Selection.from_pretrained(tmp_path / "repo", "three")
    assert len(load_selected(POOL, tmp_path / "run", level="full")) == 6


def test_rows_too_many_for_their_manifest_are_not_downloaded(monkeypatch, tmp_path, address):
    asked = []

    def pull(repo_id, folder, *, patterns, **place):
        asked.extend(patterns)
        Selection.load(address).save(
            folder / "selections" / "a" if not isinstance(folder, str) else f"{folder}/selections/a"
        )
        return folder if not isinstance(folder, str) else published.Path(folder)

    monkeypatch.setattr(hub, "is_offline", lambda: False)
    monkeypatch.setattr(hub, "pull_folder", pull)
    monkeypatch.setattr(hub, "list_files", lambda *args, **options: {"selections/a/train.parquet": 2**40})
    with pytest.raises(ManifestError, match=r"selections/a/train.parquet is larger than 6 rows may be"):
        read_published(Selection, Address("user/repo"))
    assert set(asked) == {"selections/*/manifest.json", "selections/a/manifest.json"}


def test_scores_and_weights_travel(tmp_path):
    made = select(POOL, "length", num_examples=5)
    weighted = Selection(**{**{name: getattr(made, name) for name in ("indices", "manifest", "row_hashes", "scores")},
                            "weights": np.arange(5) + 1.0})  # fmt: skip
    weighted.save(tmp_path / "w")
    register_method(published_spec(str(tmp_path / "w")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = select(POOL.shuffle(seed=1), str(tmp_path / "w"), on_mismatch="rematch")
    unregister_method("selection", str(tmp_path / "w"))
    assert found.weights.tolist() == [1, 2, 3, 4, 5]
    assert found.scores.tolist() == weighted.scores.tolist()
