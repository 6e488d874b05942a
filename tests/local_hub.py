"""A Hub on this machine, for tests: repositories, commits, large files, refs, collections, and faults to inject.

Driven by the real clients (huggingface_hub, datasets, transformers, peft). Those read ``HF_ENDPOINT`` when they are
imported, so they run in processes of their own:

    from tests.local_hub import LocalHub        # python -m pytest puts the repository root on the path

    with LocalHub() as hub:
        hub.add("dataset", "alice/pool", {"train.jsonl": b'{"text": "a"}\\n'})      # seed: a commit without a client
        done = hub.python("from hf_eff.hub import push_folder; print(push_folder(...))", home=tmp_path / "home")
        done = hub.command(["-m", "hf_eff.cli", "pull", "alice/sel"], home=tmp_path / "home")    # check=False: no raise
        assert hub.files("dataset", "alice/pool")["train.jsonl"] == b"..."          # newest commit, or revision="v1"
        hub.log                                                                      # "METHOD /path -> status" lines

``home`` is the client's HF_HOME, hence its cache: another home is another machine. The user is ``alice`` (token
``hub.token``), who writes; ``BOB`` is the token of ``bob``, who writes only to ``bob/...``; ``READER`` reads as alice.
``token=None`` is nobody. More environment variables: ``python(..., HF_HUB_OFFLINE="1")``.

Faults match a regular expression against ``"METHOD /path"`` and strike ``times`` requests (default 1, ``ALWAYS``):

    hub.fail("POST .*/commit/", status=500)        an answer with this status
    hub.delay("GET .*/resolve/", seconds=3)        an answer later than the client waits (HF_HUB_DOWNLOAD_TIMEOUT="1")
    hub.drop("GET .*parquet")                      the connection closes halfway through the body
    hub.shorten("(HEAD|GET) .*parquet")            half of the file, with lengths that agree: a damaged mirror
    hub.corrupt("GET .*parquet")                   one byte differs
    hub.conflict("POST .*/commit/")                somebody else commits just before: 412 where a parent is named
    hub.misdirect("(HEAD|GET) .*/resolve/", to="v1")   files of another revision than was asked for
    hub.revoke(hub.token)                          401 from now on
    hub.heal()                                     no more faults

A client may inject its own: ``POST /_control`` with JSON such as ``{"do": "fail", "args": ["POST .*/commit/"]}``.

Run as a program, it serves until it is stopped: ``python tests/local_hub.py``, which prints the address.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

ROOT = Path(__file__).resolve().parents[1]
ALICE, READER, BOB = ("hf_" + name * 5 for name in ("Alice1", "Reader", "BobBob"))
ALWAYS = 10**9
_LARGE = (".parquet", ".safetensors", ".bin", ".arrow", ".png", ".npz", ".gz", ".zst")
_FAULTS = ("fail", "delay", "drop", "shorten", "corrupt", "conflict", "misdirect", "revoke", "heal")
_TYPES = ("model", "dataset", "space")
_API = re.compile(r"/api/(model|dataset|space)s/([^/]+/[^/]+)(?:/(.*))?")
_FILE = re.compile(r"/(?:(dataset|space)s/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_LFS = re.compile(r"/(?:(dataset|space)s/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch")


class Refusal(Exception):
    """An answer that is an error; ``code`` is what the client reads as X-Error-Code."""

    def __init__(self, status, message, code=None, **headers):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


@dataclass(frozen=True)
class Entry:
    """One file of a commit."""

    content: str  # sha256: name of the blob
    size: int
    git: str  # sha1 of the blob, or of the pointer
    large: bool

    def described(self, path):
        facts = {"type": "file", "path": path, "size": self.size, "oid": self.git}
        return {**facts, "lfs": {"oid": self.content, "size": self.size, "pointerSize": 134}} if self.large else facts


@dataclass(frozen=True)
class Commit:
    oid: str
    files: dict
    title: str
    author: str
    parent: str | None


@dataclass
class Repo:
    kind: str
    name: str
    private: bool = False
    commits: dict = field(default_factory=dict)
    branches: dict = field(default_factory=dict)
    tags: dict = field(default_factory=dict)

    def commit(self, files, title, author, branch="main"):
        parent = self.branches.get(branch)
        text = json.dumps(
            [self.kind, self.name, title, parent, {k: v.content for k, v in files.items()}, len(self.commits)]
        )
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid] = Commit(oid, dict(files), title, author, parent)
        self.branches[branch] = oid
        return oid

    def at(self, revision):
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]


@dataclass
class Fault:
    pattern: re.Pattern
    kind: str
    times: int
    value: object = None


class LocalHub:
    """The server and all it holds. See the head of this file."""

    def __init__(self):
        self.token = ALICE
        self.tokens = {ALICE: "alice", READER: "alice", BOB: "bob"}
        self.readers, self.revoked = {READER}, set()
        self.repos, self.collections, self.faults, self.log = {}, {}, [], []
        self.lock = threading.RLock()
        self._folder = tempfile.TemporaryDirectory(prefix="local_hub_")
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._folder.cleanup()

    # -- clients

    def environment(self, home, token=ALICE, **more):
        """Variables of a process whose clients talk to this server and keep their cache in ``home``."""
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()
        }
        given = {} if token is None else {"HF_TOKEN": token}
        flags = dict.fromkeys(("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_UPDATE_CHECK"), "1")
        quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        path = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))
        ours = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        return {**kept, **given, **flags, **quiet, **ours, "TOKENIZERS_PARALLELISM": "false", **more}

    def command(self, words, home, token=ALICE, *, check=True, timeout=120, cwd=None, **more):
        """Run Python with these words; output as text. ``check`` raises with stderr where it fails."""
        environment = self.environment(home, token, **more)
        options = {"capture_output": True, "text": True, "timeout": timeout, "cwd": cwd or ROOT}
        done = subprocess.run([sys.executable, *map(str, words)], env=environment, check=False, **options)
        if check and done.returncode:
            raise AssertionError(f"client failed ({done.returncode}):\n{done.stdout}\n{done.stderr}")
        return done

    def python(self, code, home, token=ALICE, **options):
        """Run Python code, see ``command``."""
        return self.command(["-c", code], home, token, **options)

    # -- content

    def add(self, kind, name, files, *, title="seed", private=False, branch="main"):
        """Commit files (path -> bytes) on top of what is there; returns the commit."""
        with self.lock:
            repo = self.repos.get((kind, name)) or self.create(kind, name, private=private)
            held = dict(repo.commits[repo.branches[branch]].files)
            held |= {path: self.entry(path, self.keep(content)) for path, content in files.items()}
            return repo.commit(held, title, name.split("/")[0], branch)

    def create(self, kind, name, *, private=False):
        repo = self.repos[kind, name] = Repo(kind, name, private)
        attributes = b"*.parquet filter=lfs diff=lfs merge=lfs -text\n"
        repo.commit({".gitattributes": self.entry(".gitattributes", self.keep(attributes))}, "initial commit", "hub")
        return repo

    def files(self, kind, name, revision="main"):
        """Content by path of a revision."""
        return {path: self.read(entry.content) for path, entry in self.repos[kind, name].at(revision).files.items()}

    def history(self, kind, name, revision="main"):
        """Titles, newest first."""
        return [commit.title for commit in self.ancestors(self.repos[kind, name], revision)]

    @staticmethod
    def ancestors(repo, revision):
        commit, found = repo.at(revision), []
        while commit:
            found.append(commit)
            commit = repo.commits.get(commit.parent)
        return found

    def keep(self, content):
        name = hashlib.sha256(content).hexdigest()
        (self.blob(name)).write_bytes(content)
        return name

    def blob(self, name):
        return Path(self._folder.name) / name

    def read(self, name):
        return self.blob(name).read_bytes()

    def entry(self, path, blob, *, large=None):
        size = self.blob(blob).stat().st_size
        large = path.endswith(_LARGE) or size > 10 * 2**20 if large is None else large
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{blob}\nsize {size}\n".encode()
        text = pointer if large else self.read(blob)
        return Entry(blob, size, hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest(), large)

    # -- faults

    def fail(self, pattern, status=500, times=1):
        self._inject(pattern, "fail", times, status)

    def delay(self, pattern, seconds, times=1):
        self._inject(pattern, "delay", times, seconds)

    def drop(self, pattern, times=1):
        self._inject(pattern, "drop", times)

    def shorten(self, pattern, times=ALWAYS):
        self._inject(pattern, "shorten", times)

    def corrupt(self, pattern, times=1):
        self._inject(pattern, "corrupt", times)

    def conflict(self, pattern="POST .*/commit/", times=1):
        self._inject(pattern, "conflict", times)

    def misdirect(self, pattern, to, times=ALWAYS):
        self._inject(pattern, "misdirect", times, to)

    def revoke(self, token):
        self.revoked.add(token)

    def heal(self):
        """Forget every fault and revocation."""
        self.faults.clear()
        self.revoked.clear()

    def _inject(self, pattern, kind, times, value=None):
        self.faults.append(Fault(re.compile(pattern), kind, times, value))

    def strike(self, line):
        """Faults by kind that meet this request, each counted."""
        with self.lock:
            met = [fault for fault in self.faults if fault.times > 0 and fault.pattern.search(line)]
            for fault in met:
                fault.times -= 1
        return {fault.kind: fault.value for fault in met}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    hub: LocalHub

    def log_message(self, *_):
        pass

    def do_any(self):
        self.url = urlsplit(self.path)
        self.faults = self.hub.strike(f"{self.command} {self.url.path}")
        body = self.body()
        try:
            if "delay" in self.faults:
                time.sleep(self.faults["delay"])
            if "fail" in self.faults:
                raise Refusal(self.faults["fail"], "injected fault")
            self.user = self.authenticated()
            with self.hub.lock if self.command != "GET" else contextlib.nullcontext():
                self.route(unquote(self.url.path) if "/resolve/" not in self.url.path else self.url.path, body)
        except Refusal as refusal:
            self.answer({"error": str(refusal)}, refusal.status, refusal.code, **refusal.headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_any

    def body(self):
        """The request's body; an uploaded file goes to disk and its hash is returned."""
        length = int(self.headers.get("Content-Length") or 0)
        if not self.url.path.startswith("/_upload/"):
            return self.rfile.read(length)
        digest, wanted = hashlib.sha256(), self.url.path.rsplit("/", 1)[1]
        with tempfile.NamedTemporaryFile(dir=self.hub._folder.name, delete=False) as file:
            while length > 0 and (block := self.rfile.read(min(length, 2**20))):
                file.write(block)
                digest.update(block)
                length -= len(block)
        if digest.hexdigest() == wanted:
            Path(file.name).replace(self.hub.blob(wanted))
        return digest.hexdigest().encode()

    def authenticated(self):
        found = (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip()
        self.used = found or None
        if not found:
            return None
        if found in self.hub.revoked or found not in self.hub.tokens:
            message = "Invalid credentials in Authorization header"
            raise Refusal(401, message, **{"X-Error-Message": message})
        return self.hub.tokens[found]

    def answer(self, value, status=200, code=None, **headers):
        content = json.dumps(value).encode()
        if code:
            headers |= {"X-Error-Code": code, "X-Error-Message": value["error"]}
        self.send(status, {"Content-Type": "application/json", "Content-Length": len(content), **headers}, content)

    def send(self, status, headers, content=b""):
        self.hub.log.append(f"{self.command} {self.path} -> {status}")
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # -- routes

    def route(self, path, body):
        if found := _FILE.fullmatch(path):
            return self.file(found[1] or "model", *(unquote(part) for part in found.groups()[1:]))
        if found := _LFS.fullmatch(path):
            return self.lfs(self.writable(found[1] or "model", found[2]), json.loads(body))
        if found := _API.fullmatch(self.url.path):
            return self.repository(found[1], found[2], *self.rest(found[3]), body)
        if path.startswith("/_upload/"):
            if body.decode() != path.rsplit("/", 1)[1]:
                raise Refusal(400, "uploaded content has another hash")
            return self.send(200, {"Content-Length": 0})
        if path.startswith("/_verify/"):
            return self.answer({})
        if path == "/_control":
            return self.control(json.loads(body))
        if path.startswith("/api/collections"):
            return self.collection(path.removeprefix("/api/collections").strip("/"), body)
        return self.account(path, body)

    def control(self, asked):
        if asked["do"] not in (
            "fail",
            "delay",
            "drop",
            "shorten",
            "corrupt",
            "conflict",
            "misdirect",
            "revoke",
            "heal",
        ):
            raise Refusal(400, "no such fault")
        getattr(self.hub, asked["do"])(*asked.get("args", ()), **asked.get("options", {}))
        return self.answer({})

    @staticmethod
    def rest(text):
        """Action, revision and path of ``tree/<quoted revision>/<path>``."""
        action, _, more = (text or "").partition("/")
        revision, _, path = more.partition("/")
        return action, unquote(revision), unquote(path)

    def account(self, path, body):
        if path == "/api/whoami-v2":
            if self.user is None:
                raise Refusal(401, "no token")
            role = "read" if self.used in self.hub.readers else "write"
            token = {"accessToken": {"displayName": "test", "role": role}}
            return self.answer({"type": "user", "id": self.user, "name": self.user, "orgs": [], "auth": token})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/repos/delete":
            asked = json.loads(body)
            kind, name = asked.get("type") or "model", self.full_name(asked)
            del self.hub.repos[kind, self.writable(kind, name).name]
            return self.answer({})
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if path in {f"/api/{kind}s" for kind in _TYPES}:
            return self.search(path[5:-1])
        raise Refusal(404, f"no such page: {path}")

    def create(self, asked):
        kind, name = asked.get("type") or "model", self.full_name(asked)
        url = f"{self.hub.endpoint}/{'' if kind == 'model' else kind + 's/'}{name}"
        if (kind, name) in self.hub.repos:
            return self.answer({"error": "You already created this repo", "url": url}, 409)
        self.allow_writing(name)
        self.hub.create(kind, name, private=bool(asked.get("private")) or asked.get("visibility") == "private")
        return self.answer({"url": url, "name": name, "id": name})

    def full_name(self, asked):
        return f"{asked.get('organization') or self.user}/{asked['name']}"

    def validate(self, content):
        try:
            values = yaml.safe_load(content.split("---")[1]) if content.startswith("---") else {}
            errors = [] if isinstance(values or {}, dict) else [{"message": "metadata must be a mapping"}]
        except (yaml.YAMLError, IndexError) as error:
            errors = [{"message": str(error)}]
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def search(self, kind):
        asked = parse_qs(self.url.query)
        tags, author, words = asked.get("filter", []), asked.get("author", [None])[0], asked.get("search", [""])[0]
        found = []
        for (held, name), repo in sorted(self.hub.repos.items()):
            if held != kind or (author and not name.startswith(author + "/")) or words not in name:
                continue
            facts = self.facts(repo, repo.at("main"))
            if (not repo.private or self.user == name.split("/")[0]) and set(tags) <= set(facts["tags"]):
                found.append(facts)
        self.answer(found)

    # -- one repository

    def readable(self, kind, name):
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and self.user != name.split("/")[0]):
            raise Refusal(401 if self.user is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, kind, name):
        repo = self.readable(kind, name)
        self.allow_writing(name)
        return repo

    def allow_writing(self, name):
        if self.user is None:
            raise Refusal(401, "no token", "RepoNotFound")
        if self.user != name.split("/")[0] or self.used in self.hub.readers:
            message = f"you do not have the rights to write to {name}"
            raise Refusal(403, message, **{"X-Error-Message": message})

    def repository(self, kind, name, action, revision, path, body):
        writes = action in ("preupload", "commit", "branch", "tag", "settings")
        repo = self.writable(kind, name) if writes else self.readable(kind, name)
        if action in ("", "revision"):
            return self.answer(self.facts(repo, repo.at(revision or "main")))
        if action == "auth-check":
            return self.answer({})
        if action not in ("preupload", "commit", "branch", "tag", "tree", "paths-info", "refs", "commits"):
            raise Refusal(404, f"no such action: {action}")
        return getattr(self, action.replace("-", "_"))(repo, revision, path, body)

    def facts(self, repo, commit):
        card = self.card(commit)
        sources = [{"rfilename": path, "size": e.size, "blobId": e.git} for path, e in sorted(commit.files.items())]
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return {
            "_id": hashlib.md5(repo.name.encode()).hexdigest()[:24],
            "id": repo.name, "sha": commit.oid, "private": repo.private, "tags": list(card.get("tags") or ()),
            "author": repo.name.split("/")[0], "siblings": sources, "cardData": card, "createdAt": now,
            "lastModified": now, "downloads": 0, "likes": 0, "gated": False, "disabled": False,
            **({"modelId": repo.name} if repo.kind == "model" else {}),
        }  # fmt: skip

    def card(self, commit):
        if "README.md" not in commit.files:
            return {}
        text = self.hub.read(commit.files["README.md"].content).decode()
        return (yaml.safe_load(text.split("---")[1]) or {}) if text.startswith("---") else {}

    def preupload(self, repo, revision, path, body):
        held, answers = repo.at(revision).files, []
        for file in json.loads(body)["files"]:
            name = file["path"]
            large = name.endswith(_LARGE) or file["size"] > 10 * 2**20
            there = held.get(name)
            oid = there and (there.content if there.large else there.git)
            answers.append(
                {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}
            )
        self.answer({"files": answers})

    def lfs(self, repo, asked):
        objects = []
        for wanted in asked["objects"]:
            oid = wanted["oid"]
            href = {
                "upload": {"href": f"{self.hub.endpoint}/_upload/{oid}"},
                "verify": {"href": f"{self.hub.endpoint}/_verify/{oid}"},
            }
            objects.append(wanted if self.hub.blob(oid).is_file() else {**wanted, "actions": href})
        self.answer({"transfer": "basic", "objects": objects})

    def commit(self, repo, revision, path, body):
        if "conflict" in self.faults:
            held = repo.at(revision).files
            other = self.hub.entry("other.txt", self.hub.keep(f"somebody else {len(repo.commits)}".encode()))
            repo.commit({**held, "other.txt": other}, "somebody else's commit", "hub", revision)
        head, files, title = repo.at(revision).oid, dict(repo.at(revision).files), ""
        for line in map(json.loads, body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, head):
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                content = (
                    base64.b64decode(value["content"])
                    if value.get("encoding") == "base64"
                    else value["content"].encode()
                )
                files[value["path"]] = self.hub.entry(value["path"], self.hub.keep(content), large=False)
            elif key == "lfsFile":
                if not self.hub.blob(value["oid"]).is_file():
                    raise Refusal(400, f"{value['path']} was not uploaded")
                files[value["path"]] = self.hub.entry(value["path"], value["oid"], large=True)
            elif key in ("deletedFile", "deletedFolder"):
                gone = value["path"]
                files = {
                    name: e for name, e in files.items() if name != gone and not name.startswith(gone.rstrip("/") + "/")
                }
        oid = repo.commit(files, title, self.user, revision)
        self.answer(
            {
                "success": True,
                "commitOid": oid,
                "commitUrl": f"{self.hub.endpoint}/{repo.name}/commit/{oid}",
                "hookOutput": "",
            }
        )

    def branch(self, repo, revision, path, body):
        name = "/".join(filter(None, [revision, path]))
        if self.command == "DELETE":
            del repo.branches[name]
        elif name in repo.branches:
            raise Refusal(409, f"Reference already exists: {name}")
        else:
            repo.branches[name] = repo.at((json.loads(body or b"{}") or {}).get("startingPoint") or "main").oid
        self.answer({})

    def tag(self, repo, revision, path, body):
        if self.command == "DELETE":
            del repo.tags[revision]
            return self.answer({})
        name = json.loads(body)["tag"]
        if name in repo.tags:
            raise Refusal(409, f"Tag already exists: {name}")
        repo.tags[name] = repo.at(revision).oid
        return self.answer({})

    def tree(self, repo, revision, path, body):
        commit = repo.at(revision)
        prefix = path.rstrip("/") + "/" if path else ""
        recursive = parse_qs(self.url.query).get("recursive", ["false"])[0].lower() in ("true", "1")
        found, folders = [], {}
        for name, entry in sorted(commit.files.items()):
            if not name.startswith(prefix):
                continue
            parts = name[len(prefix) :].split("/")
            for depth in range(1, len(parts)) if recursive else range(1, min(2, len(parts))):
                folder = prefix + "/".join(parts[:depth])
                folders[folder] = {
                    "type": "directory",
                    "path": folder,
                    "size": 0,
                    "oid": hashlib.sha1(folder.encode()).hexdigest(),
                }
            if recursive or len(parts) == 1:
                found.append(entry.described(name))
        if path and not found and not folders:
            raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound")
        self.answer([*folders.values(), *found])

    def paths_info(self, repo, revision, path, body):
        text = body.decode()
        paths = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
        commit, found = repo.at(revision), []
        for name in paths:
            if name in commit.files:
                found.append(commit.files[name].described(name))
            elif any(held.startswith(name.rstrip("/") + "/") for held in commit.files):
                found.append(
                    {"type": "directory", "path": name, "size": 0, "oid": hashlib.sha1(name.encode()).hexdigest()}
                )
        self.answer(found)

    def refs(self, repo, revision, path, body):
        def named(refs, folder):
            return [{"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": oid} for name, oid in refs.items()]

        self.answer(
            {
                "branches": named(repo.branches, "heads"),
                "tags": named(repo.tags, "tags"),
                "converts": [],
                "pullRequests": [],
            }
        )

    def commits(self, repo, revision, path, body):
        date = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self.answer([
            {"id": c.oid, "title": c.title, "message": "", "date": date, "authors": [{"user": c.author}]}
            for c in self.hub.ancestors(repo, revision)
        ])  # fmt: skip

    # -- files

    def file(self, kind, name, revision, path):
        repo = self.readable(kind, name)
        asked, commit = repo.at(revision), repo.at(self.faults.get("misdirect", revision))
        if path not in commit.files:
            raise Refusal(404, f"{path} does not exist", "EntryNotFound", **{"X-Repo-Commit": asked.oid})
        entry = commit.files[path]
        size = entry.size // 2 if "shorten" in self.faults else entry.size
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{entry.git}"', "Accept-Ranges": "bytes"}
        if entry.large:
            headers |= {"X-Linked-Etag": f'"{entry.content}"', "X-Linked-Size": size}
        start, end, status = 0, size, 200
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end, status = int(found[1]), min(size, int(found[2] or size - 1) + 1), 206
            if start >= size:
                raise Refusal(416, "range", **{"Content-Range": f"bytes */{size}"})
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        headers |= {
            "Content-Length": end - start,
            "Content-Disposition": f"inline; filename={quote(path.rsplit('/')[-1])}",
        }
        self.send(status, headers)
        if self.command == "GET":
            self.stream(entry, start, end)

    def stream(self, entry, start, end):
        middle, last = (start + end) // 2, end
        if "drop" in self.faults:
            last = middle
        with self.hub.blob(entry.content).open("rb") as blob:
            blob.seek(start)
            while start < last:
                block = bytearray(blob.read(min(2**20, last - start)))
                if "corrupt" in self.faults and start <= middle < start + len(block):
                    block[middle - start] ^= 0x55
                self.wfile.write(block)
                start += len(block)
        if "drop" in self.faults:
            self.wfile.flush()
            self.close_connection = True

    # -- collections

    def collection(self, rest, body):
        held = self.hub.collections
        slug, _, more = rest.partition("/items")
        if self.command == "GET" and not slug:
            owner = parse_qs(self.url.query).get("owner", [None])[0]
            return self.answer([found for found in held.values() if owner in (None, found["owner"]["name"])])
        if self.command == "GET":
            if slug not in held:
                raise Refusal(404, f"no collection {slug}")
            return self.answer(held[slug])
        if self.user is None or self.used in self.hub.readers:
            raise Refusal(401, "no token")
        asked = json.loads(body or b"{}")
        if not slug:
            return self.answer(*self.new_collection(asked))
        items = held[slug]["items"]
        if self.command == "DELETE":
            held.pop(slug) if not more else items.remove(next(i for i in items if i["_id"] == more.strip("/")))
            return self.answer({})
        item = asked["item"]
        if any((i["id"], i["type"]) == (item["id"], item["type"]) for i in items):
            raise Refusal(409, "already in the collection")
        note = {"note": {"text": asked["note"]}} if asked.get("note") else {}
        items.append({"_id": f"item{len(items)}", "position": len(items), **item, **note})
        return self.answer(held[slug])

    def new_collection(self, asked):
        slug = f"{asked['namespace']}/{re.sub(r'[^a-z0-9]+', '-', asked['title'].lower())}-{len(asked['title']):024x}"
        if slug in self.hub.collections:
            return {"error": "exists", "slug": slug}, 409
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        owner = {"name": asked["namespace"], "type": "user"}
        self.hub.collections[slug] = {
            "slug": slug, "title": asked["title"], "owner": owner, "items": [], "lastUpdated": now, "position": 0,
            "private": bool(asked.get("private")), "theme": "green", "upvotes": 0,
            "description": asked.get("description"),
        }  # fmt: skip
        return self.hub.collections[slug], 200


if __name__ == "__main__":
    with LocalHub() as served:
        sys.stdout.write(served.endpoint + "\n")
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
