"""Selections over the real clients and a Hub of our own that fails in every way: nothing is lost, all is said."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.local_hub import READER, LocalHub

WORKER = Path(__file__).parent / "workers" / "hub_selections.py"


def parquet(texts):
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts}), buffer)
    return buffer.getvalue().to_pybytes()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What one process met, and the server afterwards."""
    texts = [f"text {i}" for i in range(20)]
    manifest = json.dumps({"format": "hf_eff.selection"}).encode()
    with LocalHub() as hub:
        old = hub.add("dataset", "alice/pool", {"data/train.parquet": parquet(texts)})
        new = hub.add("dataset", "alice/pool", {"data/train.parquet": parquet([*texts[:9], "edited", *texts[10:]])})
        hub.add("dataset", "alice/other", {"data/train.parquet": parquet(texts[:10])})
        hub.add("dataset", "alice/cut", {"data/train.parquet": parquet(texts)[:-40]})
        hub.add("dataset", "alice/huge", {"selections/a/manifest.json": manifest + b" " * 17 * 2**20})
        patience = {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}
        home = tmp_path_factory.mktemp("home")
        done = hub.command([WORKER, READER, old, new], home, timeout=240, **patience)
        results = json.loads(done.stdout.rpartition("RESULTS ")[2])
        assert hub.token not in done.stdout + done.stderr
        yield results, hub, (old, new), done


def test_a_push_that_fails_leaves_nothing_and_can_be_repeated(shared):
    (kind, text), intact = shared[0]["push_fails_once"]
    assert kind == "HubError"
    assert text.startswith("pushing to dataset 'alice/fails' failed: ")
    assert intact
    assert shared[1].history("dataset", "alice/fails") == ["Add selection first", "initial commit"]


@pytest.mark.parametrize("scene", ["server_error_once", "late_answer_once", "connection_drops_once", "flipped_once"])
def test_a_fault_that_passes_is_not_noticed(shared, scene):
    assert shared[0][scene] is True


def test_of_two_pushes_at_once_neither_undoes_the_other(shared):
    found, ambiguous = shared[0]["conflict_once"]
    assert found == {"first": 3, "second": 2}
    assert ambiguous[1] == "dataset 'alice/shared' holds the selections ['first', 'second']; pass name=."
    files = shared[1].files("dataset", "alice/shared")
    assert "other.txt" in files
    head = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert [config["config_name"] for config in head["configs"]] == ["first", "second"]


def test_a_repository_that_keeps_changing_is_named(shared):
    kind, text = shared[0]["conflict_always"]
    assert kind == "HubConflictError"
    assert text == "pushing to dataset 'alice/contested' failed: somebody else committed to it meanwhile; push again."


@pytest.mark.parametrize("scene", ["damaged_mirror", "flipped_always", "another_revision_arrives"])
def test_rows_that_are_not_those_of_the_manifest_are_refused(shared, scene):
    kind, text = shared[0][scene]
    assert kind == "ManifestError"
    assert "train.parquet is missing, truncated or not the file that manifest.json describes (SHA-256 differs)" in text


def test_revisions_are_told_apart(shared):
    kind, text = shared[0]["unknown_revision"]
    assert kind == "HubError"
    assert text.startswith("listing dataset 'alice/revised' failed: 404 Client Error")
    assert "Revision Not Found" in text
    assert shared[0]["revisions_are_kept"] == [[3, 1, 2], [7, 8, 9]]


def test_a_manifest_too_large_is_not_downloaded(shared):
    kind, text = shared[0]["too_large"]
    assert (kind, text) == (
        "ManifestError",
        "selections/a/manifest.json of dataset 'alice/huge' is larger than a manifest may be.",
    )
    assert not [line for line in shared[1].log if "alice/huge/resolve" in line]


def test_who_may_not_is_told_so_without_the_token(shared):
    for scene in ("nobody_reads_what_is_private", "reader_pushes"):
        kind, text = shared[0][scene]
        assert kind == "HubError"
        assert "nobodyknows" not in text
        assert READER not in text
    for kind, text in shared[0]["revoked_token"]:
        assert kind == "HubError"
        assert "401" in text


def test_what_differs_in_a_dataset_is_said_in_one_sentence(shared):
    found, (old, new) = shared[0]["rows_of_a_dataset"], shared[2]
    moved = f"the dataset is alice/pool at revision {new}; the selection was made at {old}"
    assert found["edited"] == [
        "ManifestError", f"{moved}, and 1 of 3 chosen rows have another content than when selected: row 9.",
    ]  # fmt: skip
    assert found["edited, fast"] == ["ManifestError", f"{moved}."]
    assert "in another order, as a shuffled copy would" in found["shuffled"][1]
    kind, text = found["truncated"]
    assert kind == "HubError"
    assert text.startswith("loading dataset 'alice/cut' failed: ")
    assert "arquet" in text


def test_chosen_rows_are_the_same_from_everywhere(shared):
    found, rows = shared[0]["rows_of_a_dataset"], ["text 4", "text 9", "text 2"]
    assert found["whole"] == found["rematched"] == rows
    assert found["stream"] == found["stream by id"] == sorted(rows)
    assert found["by number"][0] == ["text 4", "edited", "text 2"]
    assert found["by number"][1].endswith("row 9. Its rows are taken by number.")
    assert found["plain datasets"] == [4, 9, 2]


def test_commands(shared):
    codes = shared[0]["commands"]
    assert codes.pop("files") == ["manifest.json", "train.parquet"]
    assert codes == {
        "pull": 0, "verify": 0, "verify by id": 0, "verify another": 1, "intact": 0, "pull nothing": 2,
    }  # fmt: skip
    errors = shared[3].stderr
    assert (
        "hf-eff: the dataset is alice/other; the selection was made from alice/pool, and the dataset has 10 rows; the "
        "selection was made from 20.\n" in errors
    )
    assert "holds no selection 'four'" in errors


def test_rows_are_never_sent(shared):
    sent = b"".join(shared[1].files("dataset", "alice/of-pool").values())
    assert not any(f"text {i}".encode() in sent for i in range(20))
