"""How selection scales: time and memory at three sizes, and the power of the pool's size with which they grow.

    python benchmarks/selection.py [--only NAME] [--small] [--threads 2]

Every size runs in a process of its own on random numbers of the shape that the method sees. An exponent near 1 is
linear in the pool, near 2 quadratic. The largest sizes are

    s2l                 1,000,000 trajectories of 8 losses, 100 clusters, order of 10 % of the rows
    bids                200,000 rows x 200 targets, 5 % chosen
    facility_location   200,000 vectors of 384 numbers, 64 neighbours, 5 % chosen (neighbour search included)
    qless               1,000,000 rows of 1,024 signs against 10 targets, packed on disk; bytes beside the formula
    projection          32 gradients of 1,000,000 entries, to 1,024 and 4,096 numbers: sparse beside dense signs

``--small`` divides all of them by ten. About four minutes on two idle cores, at most 2 GiB.
"""

from __future__ import annotations

import argparse
import itertools
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

MEBIBYTE = 2**20
LARGEST = {"s2l": 1_000_000, "bids": 200_000, "facility_location": 200_000, "qless": 1_000_000}
DIVISORS = (4, 2, 1)


def main() -> None:
    """Measure, and print a table."""
    arguments = _parse()
    if arguments.size:
        print(json.dumps(_measured(arguments.only, arguments.size, arguments.threads)))
        return
    wanted = [arguments.only] if arguments.only else [*LARGEST, "projection"]
    for name in wanted:
        if name == "projection":
            _print_projection(_spawn("projection", 100_000 if arguments.small else 1_000_000, arguments))
            continue
        largest = LARGEST[name] // (10 if arguments.small else 1)
        rows = [_spawn(name, largest // divisor, arguments) for divisor in DIVISORS]
        _print_growth(name, rows)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*LARGEST, "projection"])
    parser.add_argument("--small", action="store_true", help="a tenth of every size")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def _spawn(name: str, size: int, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--only", name, "--size", str(size), "--threads", str(arguments.threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    answer = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(answer.splitlines()[-1])
    return found


def _print_growth(name: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{name:<20}{'rows':>12}{'seconds':>10}{'CPU s':>10}{'peak MiB':>10}{'exponent':>10}  facts")
    previous: dict[str, Any] | None = None
    for row in rows:
        power = "" if previous is None else f"{_exponent(previous, row):.2f}"
        facts = ", ".join(f"{key} {value:.4g}" for key, value in row["facts"].items())
        spent = f"{row['seconds']:>10.1f}{row['cpu']:>10.1f}{row['peak']:>10.0f}"
        print(f"{'':<20}{row['size']:>12,}{spent}{power:>10}  {facts}")
        previous = row


def _exponent(less: dict[str, Any], more: dict[str, Any]) -> float:
    """Power of the size with which CPU time grows."""
    return math.log(more["cpu"] / less["cpu"]) / math.log(more["size"] / less["size"])


def _print_projection(row: dict[str, Any]) -> None:
    facts = row["facts"]
    print(f"\nprojection of {row['size']:,} entries")
    for key, value in facts.items():
        print(f"  {key:<32}{value:.4g}")


# -- inside a process --------------------------------------------------------------------------------------------------


def _measured(name: str, size: int, threads: int) -> dict[str, Any]:
    import torch

    from hf_eff.hardware.probe import PeakMemory

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        run = RUNS[name](size, Path(folder))
        window = PeakMemory().start()
        wall, cpu = time.perf_counter(), time.process_time()
        facts = run()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        window.stop()
        return {"size": size, "seconds": wall, "cpu": cpu, "peak": window.peak() / MEBIBYTE, "facts": facts}


def _s2l(size: int, _: Path) -> Callable[[], dict[str, float]]:
    import numpy as np
    import torch

    from hf_eff.numerics.trajectory_clusters import choose_by_trajectory

    generator = np.random.default_rng(0)
    centres = generator.exponential(size=(200, 8)).astype(np.float32)
    losses = centres[generator.integers(200, size=size)] + 0.1 * generator.standard_normal((size, 8), dtype=np.float32)

    def run() -> dict[str, float]:
        chosen = choose_by_trajectory(losses, None, size // 10, torch.Generator().manual_seed(0), clusters=100)
        return {"chosen": len(set(chosen.tolist()))}

    return run


def _bids(size: int, _: Path) -> Callable[[], dict[str, float]]:
    import numpy as np

    from hf_eff.numerics.balanced_influence import balanced_order, standardise

    influence = np.random.default_rng(0).standard_normal((size, 200), dtype=np.float32)

    def run() -> dict[str, float]:
        rows, targets = balanced_order(standardise(influence), size // 20)
        return {"chosen": len(set(rows.tolist())), "targets served": len(set(targets.tolist()))}

    return run


def _facility_location(size: int, _: Path) -> Callable[[], dict[str, float]]:
    import numpy as np
    import torch

    from hf_eff.numerics.facility_location import SparseSimilarity, covered_value, facility_location
    from hf_eff.numerics.nearest import nearest_neighbours

    generator = np.random.default_rng(0)
    centres = generator.standard_normal((size // 200, 384), dtype=np.float32)
    vectors = centres[generator.integers(len(centres), size=size)]
    vectors += 0.7 * generator.standard_normal((size, 384), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    def run() -> dict[str, float]:
        start = time.perf_counter()
        found = nearest_neighbours(vectors, 64, generator=torch.Generator().manual_seed(0))
        middle = time.perf_counter()
        similarity = SparseSimilarity.of(*found)
        chosen = [row for row, _ in itertools.islice(facility_location(similarity), size // 20)]
        end = time.perf_counter()
        drawn = np.random.default_rng(1).choice(size, size=len(chosen), replace=False).tolist()
        return {
            "neighbours s": middle - start,
            "recall": _recall(vectors, found[0]),
            "choosing s": end - middle,
            "value over random": covered_value(similarity, chosen) / covered_value(similarity, drawn),
        }

    return run


def _recall(vectors: Any, neighbours: Any) -> float:
    """Share of the true neighbours of 200 rows that were found."""
    import numpy as np

    some = np.random.default_rng(2).integers(len(vectors), size=200)
    cosines = vectors[some] @ vectors.T
    cosines[np.arange(len(some)), some] = -np.inf
    true = np.argpartition(-cosines, neighbours.shape[1], axis=1)[:, : neighbours.shape[1]]
    shared = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(true, neighbours[some], strict=True)]
    return float(np.mean(shared)) / neighbours.shape[1]


def _qless(size: int, folder: Path) -> Callable[[], dict[str, float]]:
    import numpy as np
    import torch

    from hf_eff.engines.datastore import FeatureStore
    from hf_eff.engines.influence import Influence

    width, step = 1024, 8192
    store = FeatureStore.open(folder / "pool", rows=size, width=width, dtype="int1", header={})
    generator = torch.Generator().manual_seed(0)
    for start in range(0, size, step):
        rows = np.arange(start, min(start + step, size))
        store.write(rows, torch.randn(len(rows), width, generator=generator))
    queries = torch.nn.functional.normalize(torch.randn(10, width, generator=generator), dim=1)
    found = sum(path.stat().st_size for path in (folder / "pool").glob("*.bin"))

    def run() -> dict[str, float]:
        scores, _ = Influence().scores([store], [queries], [1.0])
        return {
            "rows scored": float(np.isfinite(scores).sum()),
            "bytes / formula": found / (size * math.ceil(width / 8) + 4 * size),
        }

    return run


def _projection(size: int, _: Path) -> Callable[[], dict[str, float]]:
    import torch

    from hf_eff.numerics.projection import RademacherProjector
    from hf_eff.numerics.sparse_projection import SparseProjector

    rows = 32
    gradients = torch.randn(rows, size, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(gradients, dim=1)
    exact = unit @ unit.T
    off = ~torch.eye(rows, dtype=torch.bool)

    def measure(projector: Any) -> tuple[float, float]:
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            short = projector.project(iter([(0, gradients)]), rows)
            seconds.append(time.perf_counter() - start)
        short = torch.nn.functional.normalize(short, dim=1)
        return min(seconds), (short @ short.T - exact)[off].square().mean().sqrt().item()

    def run() -> dict[str, float]:
        facts = {}
        for dims in (1024, 4096):
            dense, dense_error = measure(RademacherProjector((size,), dims))
            sparse, sparse_error = measure(SparseProjector((size,), dims))
            facts |= {
                f"{dims}: dense seconds": dense,
                f"{dims}: sparse seconds": sparse,
                f"{dims}: dense / sparse": dense / sparse,
                f"{dims}: dense rms cosine error": dense_error,
                f"{dims}: sparse rms cosine error": sparse_error,
                f"{dims}: law 1 / sqrt(dims)": 1 / math.sqrt(dims),
            }
        return facts

    return run


RUNS = {
    "s2l": _s2l,
    "bids": _bids,
    "facility_location": _facility_location,
    "qless": _qless,
    "projection": _projection,
}

if __name__ == "__main__":
    main()
