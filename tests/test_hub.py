"""The Hub module without a Hub: one commit, read back; clear errors; tokens nowhere."""

from __future__ import annotations

import hashlib
import logging
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

from hf_eff import hub
from hf_eff.hub import HubError, fetch_split, pull_folder, push_folder

TOKEN = "hf_" + "aB3" * 11


def git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Server:
    """Keeps what a commit sends and answers as the client's own classes do."""

    def __init__(self, *, damage=None, error=None):
        self.calls, self.files, self.damage, self.error = [], {}, damage, error

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", repo_id, options))
        if self.error:
            raise self.error

    def repo_info(self, repo_id, repo_type):
        return SimpleNamespace(sha="p" * 40)

    def create_commit(self, repo_id, operations, **options):
        self.calls.append(("create_commit", repo_id, options))
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()
        if self.damage:
            self.files[self.damage] = b"something else"
        return SimpleNamespace(oid="c" * 40)

    def get_paths_info(self, repo_id, paths, repo_type, revision):
        assert revision == "c" * 40
        found = []
        for name in paths:
            content = self.files[name]
            large = name.endswith(".parquet")
            lfs = SimpleNamespace(sha256=hashlib.sha256(content).hexdigest()) if large else None
            found.append(SimpleNamespace(path=name, blob_id="pointer" if large else git_hash(content), lfs=lfs))
        return found


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "folder"
    (root / "selections" / "a").mkdir(parents=True)
    (root / "README.md").write_text("hello")
    (root / "selections" / "a" / "train.parquet").write_bytes(b"rows" * 1000)
    (root / ".cache").mkdir()
    (root / ".cache" / "secret").write_text("no")
    (root / "link").symlink_to(tmp_path)
    (tmp_path / "outside").write_text("no")
    (root / "linked").symlink_to(tmp_path / "outside")
    return root


def use(monkeypatch, server):
    tokens = []
    monkeypatch.setattr(hub, "_api", lambda token: tokens.append(token) or server)
    return tokens


def test_a_folder_travels_in_one_commit_on_top_of_the_one_that_was_read(monkeypatch, folder):
    server = Server()
    tokens = use(monkeypatch, server)
    assert push_folder(folder, "user/repo", "dataset", "Add a", TOKEN) == "c" * 40
    assert server.files == {"README.md": b"hello", "selections/a/train.parquet": b"rows" * 1000}
    (created, commit) = server.calls
    assert created == ("create_repo", "user/repo", {"repo_type": "dataset", "private": True, "exist_ok": True})
    assert commit[2] == {"commit_message": "Add a", "repo_type": "dataset", "parent_commit": "p" * 40}
    assert tokens == [TOKEN]


@pytest.mark.parametrize("damage", ["README.md", "selections/a/train.parquet"], ids=["git", "lfs"])
def test_what_arrived_is_compared_with_what_was_sent(monkeypatch, folder, damage):
    use(monkeypatch, Server(damage=damage))
    with pytest.raises(HubError, match=rf"does not hold what was sent after commit c+: \['{damage}'\]"):
        push_folder(folder, "user/repo", "dataset", "Add a")


def test_an_empty_folder_is_refused_before_anything_is_created(monkeypatch, tmp_path):
    server = Server()
    use(monkeypatch, server)
    with pytest.raises(HubError, match="holds no files to push"):
        push_folder(tmp_path, "user/repo", "dataset", "Add a")
    assert not server.calls


def refusal(message):
    request = SimpleNamespace(headers={"authorization": f"Bearer {TOKEN}"})
    return HfHubHTTPError(message, response=SimpleNamespace(headers={}, request=request))


@pytest.mark.parametrize(
    "error",
    [
        refusal(f"403 Forbidden for Bearer {TOKEN}"),
        OSError(f"proxy https://me:{TOKEN}@proxy refused"),
        HTTPError("no route"),
        HFValidationError("Repo id must be in the form 'name'"),
    ],
    ids=["http", "os", "network", "validation"],
)
def test_client_errors_become_one_sentence_without_the_token(monkeypatch, folder, caplog, capfd, error):
    use(monkeypatch, Server(error=error))
    with caplog.at_level(logging.DEBUG), pytest.raises(HubError) as caught:
        push_folder(folder, "user/repo", "model", "Add a", TOKEN)
    assert str(caught.value).startswith("pushing to model 'user/repo' failed: ")
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    output = "".join(capfd.readouterr()) + caplog.text + str(caught.value) + repr(caught.value)
    assert TOKEN not in output


def test_offline_is_said_plainly(monkeypatch, folder):
    use(monkeypatch, Server(error=OfflineModeIsEnabled("offline")))
    with pytest.raises(HubError, match="needs the network, but HF_HUB_OFFLINE is set; unset it or use local files"):
        push_folder(folder, "user/repo", "dataset", "Add a")


def test_the_real_client_offline(folder, tmp_path):
    # tests/conftest.py sets HF_HUB_OFFLINE before anything is imported.
    with pytest.raises(HubError, match="pushing to dataset 'user/repo' needs the network"):
        push_folder(folder, "user/repo", "dataset", "Add a", TOKEN)
    with pytest.raises(HubError, match="fetching dataset 'user/never-cached' failed"):
        pull_folder("user/never-cached", tmp_path / "pulled", token=TOKEN)
    with pytest.raises(HubError, match="loading dataset 'user/never-cached' failed"):
        fetch_split("user/never-cached", config=None, split=None, revision=None, token=TOKEN)
    with pytest.raises(HubError, match="looking for dataset 'user/repo' needs the network"):
        hub.exists("user/repo", "dataset")
    assert not (tmp_path / "pulled").exists()


def test_pulled_files_are_plain_copies_of_the_cache(monkeypatch, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    (snapshot / "selections" / "a").mkdir(parents=True)
    (snapshot / "selections" / "b").mkdir(parents=True)
    for name in ("selections/a/manifest.json", "selections/b/manifest.json", "README.md"):
        (blobs / name.replace("/", "-")).write_text(name)
        (snapshot / name).symlink_to(blobs / name.replace("/", "-"))
    asked = []

    def download(repo_id, **options):
        asked.append((repo_id, options))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    target = pull_folder("user/repo", tmp_path / "out", patterns=["selections/a/*"], revision="v1", token=TOKEN)
    assert [path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()] == [
        "selections/a/manifest.json"
    ]
    assert not (target / "selections/a/manifest.json").is_symlink()
    assert asked == [
        (
            "user/repo",
            {
                "repo_type": "dataset",
                "revision": "v1",
                "allow_patterns": ["selections/a/*"],
                "token": TOKEN,
                "force_download": False,
            },
        )
    ]


def test_a_local_folder_of_data_needs_no_network(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert fetch_split(str(tmp_path), config=None, split=None, revision=None)["text"][:] == ["a", "b"]
