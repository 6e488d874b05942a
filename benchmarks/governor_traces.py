"""Records the real training runs on which stopping policies are replayed: whole runs that nobody stops.

    python benchmarks/governor_traces.py [--folder governor_traces] [--only NAME ...] [--threads 2]

A Llama of 0.27M parameters learns bytes of Python's own documentation for 800 steps of 8 rows: at a constant learning
rate, at three times that rate, under a cosine (a stress: the end of the schedule lowers the loss for a second reason),
and on 64 rows alone (it over-fits). After every 8th step the loss of 96 held-out rows is read as a governor's probe,
and the mean loss of 128 other rows, which no governor sees, for the judgement. Each run is a governor log whose footer
has those means; probes are not charged, because they are many for the sake of the replay. ``hf-eff governor sim trace``
reads the logs; those in ``benchmarks/traces`` were recorded with --threads 1. The text changes with the version of
Python, which the header names. About a minute a run on an idle core.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEPS, BATCH, LENGTH, WARMUP = 800, 8, 64, 20
LOOK_EVERY = 8
PROBE_ROWS, TEST_ROWS = 96, 128
EMPTY = ("probe_spent", "overhead_spent", "phase", "offers", "drift", "data_phase")
"""Fields of a record that stand at their defaults here, which a reader fills in."""


@dataclass(frozen=True)
class Run:
    """A run to record; ``rows`` limits the training data."""

    rate: float
    rows: int | None = None
    cosine: bool = False

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 1."""
        rise = min(1.0, step / WARMUP)
        done = max(0.0, (step - WARMUP) / (STEPS - WARMUP))
        return self.rate * rise * (0.5 * (1.0 + math.cos(math.pi * done)) if self.cosine else 1.0)


RUNS = {
    "constant": Run(1e-3),
    "constant_fast": Run(3e-3),
    "cosine": Run(3e-3, cosine=True),
    "small_data": Run(3e-3, rows=64),
}


def main() -> None:
    """Record what is named, one file each."""
    import torch

    arguments = _parse()
    torch.set_num_threads(arguments.threads)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.only or RUNS:
        losses = record(RUNS[name], arguments.folder / f"{name}.jsonl", name)
        print(f"{name:<16}first {losses[0]:.3f}  least {min(losses):.3f}  last {losses[-1]:.3f}", flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("governor_traces"))
    parser.add_argument("--only", nargs="+", choices=list(RUNS), help="these runs only")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def _rows() -> tuple[list[dict[str, list[int]]], list[dict[str, list[int]]]]:
    """Rows of bytes, shuffled: training, and held out from other chapters."""
    from pydoc_data.topics import topics

    import numpy as np

    chapters = [topics[name] for name in sorted(topics)]
    order = np.random.default_rng(0).permutation(len(chapters)).tolist()
    held, kept = order[: len(order) // 4], order[len(order) // 4 :]
    return tuple(_cut("\n".join(chapters[index] for index in part)) for part in (kept, held))  # type: ignore[return-value]


def _cut(text: str) -> list[dict[str, list[int]]]:
    import numpy as np

    ids = [6 + byte for byte in text.encode()]  # the toy tokenizer's first six entries are special
    rows = [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH, LENGTH)]
    order = np.random.default_rng(1).permutation(len(rows)).tolist()
    return [{"input_ids": rows[index], "labels": rows[index]} for index in order]


def _collate(rows: Any) -> dict[str, Any]:
    import torch

    return {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}


def record(run: Run, path: Path, name: str) -> list[float]:
    """Train, and write the log; returns the means that the judgement rests on."""
    import torch

    from hf_eff.contracts.governor import Decision
    from hf_eff.contracts.memory import BatchShape
    from hf_eff.engines.facts import model_facts
    from hf_eff.engines.gain_probe import GainProbe
    from hf_eff.governor import GovernorLog
    from hf_eff.numerics.flops import training_flops
    from hf_eff.testing.tiny import tiny_model

    model = tiny_model(layers=3, width=96)
    train, held = _rows()
    train = train[: run.rows]
    probe = GainProbe(held[:PROBE_ROWS], _collate, is_causal_lm=True, num_examples=PROBE_ROWS)
    test = GainProbe(held[PROBE_ROWS : PROBE_ROWS + TEST_ROWS], _collate, is_causal_lm=True, num_examples=TEST_ROWS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.rate, weight_decay=0.0)
    look = _looker(run, training_flops(model_facts(model), BatchShape(rows=BATCH, length=LENGTH)))
    log, losses = GovernorLog(path), []
    log.start({"trace": name, "python": platform.python_version(), "train_rows": len(train), "steps": STEPS})
    model.train()
    for step, rows in enumerate(_batches(train), start=1):
        optimizer.param_groups[0]["lr"] = run.rate_at(step)
        loss = model(**_collate(rows), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % LOOK_EVERY == 0:
            log.append(look(step, float(loss.detach()), probe.read(model)), Decision("continue", "nobody stops it"))
            losses.append(_short(test.read(model).mean))
    log.finish({"test_loss": losses})
    _strip(path)
    return losses


def _batches(rows: list[Any]) -> Any:
    """STEPS batches, each pass in a new order.

    Yields:
        The rows of a batch.
    """
    import numpy as np

    generator, queue = np.random.default_rng(2), []
    for _ in range(STEPS):
        while len(queue) < BATCH:
            queue += generator.permutation(len(rows)).tolist()
        yield [rows[index] for index in queue[:BATCH]]
        del queue[:BATCH]


def _looker(run: Run, step_flops: float) -> Callable[..., Any]:
    from hf_eff.contracts.governor import ProbeReading, Telemetry

    def look(step: int, loss: float, reading: ProbeReading) -> Telemetry:
        return Telemetry(
            step=step,
            max_steps=STEPS,
            spent={"flops": step * step_flops, "steps": float(step)},
            limits={},
            compute=step * step_flops,
            compute_limit=STEPS * step_flops,
            loss=_short(loss),
            probe=ProbeReading(
                _short(reading.mean), _short(reading.paired_delta), _short(reading.paired_se), reading.num_examples
            ),
            learning_rate=_short(run.rate_at(step)),
            peak_learning_rate=_short(max(run.rate_at(each) for each in range(1, step + 1))),
            in_warmup=run.rate_at(step) > run.rate_at(step - 1),
        )

    return look


def _short(value: Any) -> Any:
    """Six digits, for small files; None stays."""
    return None if value is None else float(f"{value:.6g}")


def _strip(path: Path) -> None:
    """Take out what no two recordings share, so that the same machine writes the same file, and empty fields."""
    from hf_eff.files import write_text

    lines = []
    for record in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        record.pop("measured")
        if "telemetry" in record:
            record["telemetry"] = {key: value for key, value in record["telemetry"].items() if key not in EMPTY}
        lines.append(json.dumps(record, separators=(",", ":")) + "\n")
    write_text(path, "".join(lines))


if __name__ == "__main__":
    main()
