"""How a manifest scales: written, pushed, pulled and verified at three sizes, with time, memory and growth.

    python benchmarks/manifest.py [--sizes 2500000,5000000,10000000]

Every row of a dataset of that many short rows is chosen, in random order: the largest manifest there is for it. The Hub
is the server of ``tests/local_hub.py`` in a process of its own, so that its memory does not count; every size has a
process and a cache of its own. ``hash`` reads and hashes the whole dataset, ``verify`` hashes the chosen rows in the
order of the file and compares; ``rematch`` finds them by content in a shuffled copy. Growth is the power of the size
with which seconds and memory grow between two sizes; near 1 is linear, near 2 quadratic.

The largest size takes about 4 GiB of disk.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MEBIBYTE = 2**20


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="2500000,5000000,10000000", help="rows, ascending, joined by commas")
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.size:
        print(json.dumps(measured(arguments.size)))
        return
    previous: dict[str, Any] | None = None
    for size in map(int, arguments.sizes.split(",")):
        found = spawned(size)
        show(found, previous)
        previous = found


def spawned(size: int) -> dict[str, Any]:
    """Facts of one size, from a process with a server and a cache of its own."""
    server = subprocess.Popen([sys.executable, str(ROOT / "tests" / "local_hub.py")], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        endpoint = server.stdout.readline().strip()
        with tempfile.TemporaryDirectory() as home:
            environment = {
                **{name: value for name, value in os.environ.items() if "proxy" not in name.lower()},
                "HF_ENDPOINT": endpoint,
                "HF_HOME": home,
                "HF_TOKEN": "hf_" + "Alice1" * 5,
                "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            }
            command = [sys.executable, __file__, "--size", str(size)]
            answer = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
            facts: dict[str, Any] = json.loads(answer.splitlines()[-1])
            return facts
    finally:
        server.terminate()
        server.wait()


def show(found: dict[str, Any], previous: dict[str, Any] | None) -> None:
    print(f"\n{found['rows']:,} rows, {found['bytes'] / MEBIBYTE:,.0f} MiB to send")
    print(f"{'':<10}{'seconds':>10}{'CPU s':>10}{'peak MiB':>10}{'added MiB':>11}{'time ^':>8}{'memory ^':>10}")
    for name, step in found["steps"].items():
        before = previous["steps"][name] if previous else None
        ratio = math.log(found["rows"] / previous["rows"]) if previous else math.nan
        powers = ["", ""]
        if before is not None:
            powers = [
                f"{math.log(max(step[key], 1e-3) / max(before[key], 1e-3)) / ratio:.2f}" for key in ("cpu", "added")
            ]
        print(
            f"{name:<10}{step['seconds']:>10.1f}{step['cpu']:>10.1f}{step['peak']:>10.0f}{step['added']:>11.0f}"
            f"{powers[0]:>8}{powers[1]:>10}"
        )


# -- inside a process --------------------------------------------------------------------------------------------------


def measured(size: int) -> dict[str, Any]:
    from hf_eff.selection import Selection

    steps: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        dataset = written_dataset(size, Path(folder))
        sent, digest = published(dataset, Path(folder), steps)
        pulled = timed(steps, "pull", lambda: Selection.from_pretrained("alice/large"))
        timed(steps, "verify", lambda: pulled.verify(dataset))
        assert pulled.digest == digest
        turned = dataset.select(range(size - 1, -1, -1))
        found = timed(steps, "rematch", lambda: pulled.locate(turned, on_mismatch="rematch"))
        assert (found == size - 1 - pulled.indices).all()
    return {"rows": size, "bytes": sent, "steps": steps}


def published(dataset: Any, folder: Path, steps: dict[str, dict[str, float]]) -> tuple[int, str]:
    """Bytes and digest of a selection of every row, written and pushed."""
    import numpy as np

    from hf_eff.manifest import build_manifest
    from hf_eff.manifest.columns import HashColumn, TextColumn
    from hf_eff.manifest.matching import content
    from hf_eff.selection import Selection

    size = len(dataset)
    hashes = timed(steps, "hash", lambda: content(dataset, ["text"]))
    order = np.random.default_rng(0).permutation(size)
    about = {"method": "toy", "name": "all", "seed": 0, "num_selected": size}
    made = Selection(
        order,
        build_manifest({"num_rows": size, "columns": ["text"]}, about),
        HashColumn(hashes.codes[order]),
        scores=np.random.default_rng(1).standard_normal(size, dtype=np.float32),
        reasons=TextColumn.repeated("score", size),
    )
    place = timed(steps, "write", lambda: made.save(folder / "saved"))
    timed(steps, "push", lambda: made.push_to_hub("alice/large"))
    return sum(path.stat().st_size for path in place.iterdir()), made.digest


def timed(steps: dict[str, dict[str, float]], name: str, action: Callable[[], Any]) -> Any:
    from hf_eff.hardware.probe import PeakMemory

    window = PeakMemory().start()
    before, wall, cpu = resident(), time.perf_counter(), time.process_time()
    result = action()
    seconds, spent = time.perf_counter() - wall, time.process_time() - cpu
    window.stop()
    peak = window.peak()
    steps[name] = {
        "seconds": seconds, "cpu": spent, "peak": peak / MEBIBYTE, "added": max(0.0, peak - before) / MEBIBYTE,
    }  # fmt: skip
    return result


def resident() -> float:
    import psutil

    return float(psutil.Process().memory_info().rss)


def written_dataset(size: int, folder: Path) -> Any:
    """Short distinct rows on disk, as ``datasets`` maps them into memory."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    from datasets import Dataset

    schema, path = pa.schema([("text", pa.string())]), folder / "rows.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for start in range(0, size, 10_000):
            numbers = pa.array(np.arange(start, min(start + 10_000, size))).cast(pa.string())
            texts = pc.binary_join_element_wise("What follows from fact number", numbers, "?", " ")
            writer.write_batch(pa.record_batch([texts.cast(pa.string())], schema=schema))
    return Dataset.from_file(str(path))


if __name__ == "__main__":
    main()
