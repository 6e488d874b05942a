"""A machine that shares selections over a Hub, through every fault that the Hub can have. Prints one JSON object.

``HF_ENDPOINT`` is the server of ``tests/local_hub.py``, which this process asks to misbehave.
"""

import json
import os
import sys
import tempfile
import urllib.request
import warnings
from pathlib import Path

import numpy as np
from datasets import Dataset, load_dataset

from hf_eff import Selection, load_selected
from hf_eff.cli import main
from hf_eff.errors import EffError
from hf_eff.manifest import build_manifest
from hf_eff.numerics.row_hash import hash_of_hashes, row_hashes
from hf_eff.selection import describe_dataset, make_pool
from hf_eff.testing.tiny import tiny_tokenizer

RESOLVE, ROWS = "(HEAD|GET) .*/resolve/", "(HEAD|GET) .*/resolve/.*parquet"


def control(do, *args, **options):
    body = json.dumps({"do": do, "args": args, "options": options}).encode()
    urllib.request.urlopen(urllib.request.Request(os.environ["HF_ENDPOINT"] + "/_control", body, method="POST")).read()


def made(name="first", rows=(3, 1, 2), count=20, **data):
    pool = Dataset.from_list([{"text": f"row {i}"} for i in range(count)])
    hashes = row_hashes(pool)
    about = {"method": "toy", "name": name, "seed": 0, "num_selected": len(rows)}
    facts = {"num_rows": count, "columns": ["text"], "digest": hash_of_hashes(hashes), **data}
    return Selection(
        np.array(rows), build_manifest(facts, about), [hashes[i] for i in rows], scores=np.arange(len(rows))
    )


def push_fails_once():
    control("fail", "POST .*/commit/")
    failed = caught(lambda: made().push_to_hub("alice/fails"))
    made().push_to_hub("alice/fails")
    return [failed, Selection.from_pretrained("alice/fails").digest == made().digest]


def server_error_once():
    made().push_to_hub("alice/busy")
    control("fail", RESOLVE, status=503)
    return Selection.from_pretrained("alice/busy").digest == made().digest


def late_answer_once():
    made().push_to_hub("alice/late")
    control("delay", "GET .*/resolve/.*parquet", seconds=3)
    return Selection.from_pretrained("alice/late").digest == made().digest


def conflict_once():
    made().push_to_hub("alice/shared")
    control("conflict")
    made("second", (5, 6)).push_to_hub("alice/shared")
    found = {name: len(Selection.from_pretrained("alice/shared", name)) for name in ("first", "second")}
    return [found, caught(lambda: Selection.from_pretrained("alice/shared"))]


def conflict_always():
    control("conflict", times=1000)
    return caught(lambda: made().push_to_hub("alice/contested"))


def connection_drops_once():
    made().push_to_hub("alice/drops")
    control("drop", "GET .*parquet")
    return Selection.from_pretrained("alice/drops").digest == made().digest


def damaged_mirror():
    made().push_to_hub("alice/short")
    control("shorten", ROWS)
    return caught(lambda: Selection.from_pretrained("alice/short"))


def flipped_once():
    made().push_to_hub("alice/flipped")
    control("corrupt", "GET .*parquet")
    return Selection.from_pretrained("alice/flipped").digest == made().digest


def flipped_always():
    made().push_to_hub("alice/rotten")
    control("corrupt", "GET .*parquet", times=1000)
    return caught(lambda: Selection.from_pretrained("alice/rotten"))


def unknown_revision():
    made().push_to_hub("alice/revised")
    return caught(lambda: Selection.from_pretrained("alice/revised", revision="v9"))


def another_revision_arrives():
    first = made().push_to_hub("alice/moved")
    made(rows=(7, 8, 9)).push_to_hub("alice/moved")
    control("misdirect", ROWS, to=first)
    return caught(lambda: Selection.from_pretrained("alice/moved"))


def revisions_are_kept():
    first = made().push_to_hub("alice/kept")
    made(rows=(7, 8, 9)).push_to_hub("alice/kept")
    return [Selection.from_pretrained(f"hub:alice/kept/first{at}").indices.tolist() for at in (f"@{first}", "")]


def too_large():
    return caught(lambda: Selection.from_pretrained("alice/huge"))


def nobody_reads_what_is_private():
    made().push_to_hub("alice/private")
    return caught(lambda: Selection.from_pretrained("alice/private", token="hf_nobodyknowsthistoken"))


def reader_pushes():
    return caught(lambda: made().push_to_hub("alice/readonly", token=sys.argv[1]))


def rows_of_a_dataset():
    """What is wrong with a dataset, in one sentence each; the selection knows revision one of ``alice/pool``."""
    old, new = sys.argv[2:4]
    pool = load_dataset("alice/pool", split="train", revision=old)
    facts = describe_dataset(pool, make_pool(pool, processing_class=tiny_tokenizer()))
    hashes, rows = row_hashes(pool), [4, 9, 2]
    about = {"method": "toy", "seed": 0, "num_selected": 3}
    selection = Selection(np.array(rows), build_manifest(facts, about), [hashes[i] for i in rows])
    selection.push_to_hub("alice/of-pool", "three")
    edited = load_dataset("alice/pool", split="train", revision=new)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        by_number = load_selected(edited, "alice/of-pool", on_mismatch="warn")["text"][:]
    stream = load_dataset("alice/pool", split="train", revision=old, streaming=True).shuffle(seed=1, buffer_size=20)
    return {
        "whole": load_selected(None, "hub:alice/of-pool/three", level="full")["text"][:],
        "stream": sorted(row["text"] for row in selection.apply(stream)),
        "stream by id": sorted(row["text"] for row in load_selected(None, "alice/of-pool", streaming=True)),
        "edited": caught(lambda: selection.apply(edited)),
        "edited, fast": caught(lambda: selection.verify(edited, "fast")),
        "shuffled": caught(lambda: selection.apply(pool.shuffle(seed=0))),
        "rematched": load_selected(pool.shuffle(seed=0), selection, on_mismatch="rematch")["text"][:],
        "by number": [by_number, str(warned[-1].message)],
        "truncated": caught(lambda: load_selected("alice/cut", selection)),
        "plain datasets": load_dataset("alice/of-pool", "three", split="train")["index"][:],
    }


def commands():
    with tempfile.TemporaryDirectory() as folder:
        place = str(Path(folder) / "pulled")
        return {
            "pull": main(["pull", "alice/of-pool", "--output_dir", place]),
            "verify": main(["verify", place, "--level", "full", "--json"]),
            "verify by id": main(["verify", "hub:alice/of-pool/three"]),
            "verify another": main(["verify", place, "--dataset", "alice/other"]),
            "intact": main(["verify", place, "--no_dataset"]),
            "pull nothing": main(["pull", "alice/of-pool", "--name", "four", "--output_dir", place]),
            "files": sorted(path.name for path in Path(place).iterdir()),
        }


def revoked_token():
    made().push_to_hub("alice/revoked")
    control("revoke", os.environ["HF_TOKEN"])
    return [
        caught(lambda: made("second").push_to_hub("alice/revoked")),
        caught(lambda: Selection.from_pretrained("alice/revoked", revision="main")),
    ]


def caught(action):
    """Kind and text of an error of ours; any other error ends the process."""
    try:
        return ["nothing", repr(action())]
    except EffError as error:
        return [type(error).__name__, str(error)]


SCENES = (
    push_fails_once, server_error_once, late_answer_once, conflict_once, conflict_always, connection_drops_once,
    damaged_mirror, flipped_once, flipped_always, unknown_revision, another_revision_arrives, revisions_are_kept,
    too_large, nobody_reads_what_is_private, reader_pushes, rows_of_a_dataset, commands, revoked_token,
)  # fmt: skip

if __name__ == "__main__":
    results = {}
    for scene in SCENES:
        control("heal")
        sys.stdout.flush()
        results[scene.__name__] = scene()
        sys.stderr.write(f"done: {scene.__name__}\n")
    sys.stdout.write(f"RESULTS {json.dumps(results)}\n")
