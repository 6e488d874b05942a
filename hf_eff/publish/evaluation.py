"""Evaluation results of a run: into its report, and into the files from which the Hub shows them."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hf_eff.files import write_text
from hf_eff.hub import eval_results_yaml
from hf_eff.manifest.provenance import describe_dataset
from hf_eff.publish.bundle import EVAL_RESULTS

FILE = "hf_eff.yaml"
_NOT_RESULTS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "num_tokens")


def data_origins(train: Any, evaluation: Any) -> dict[str, Any]:
    """Where the datasets of a run come from, seen before a trainer prepares them.

    Returns:
        ``train`` and ``eval``: repository, revision, configuration and split of a Hub dataset, or None. Of several
        evaluation sets, ``eval`` maps the name of each.
    """
    if isinstance(evaluation, Mapping):
        return {"train": _origin(train), "eval": {str(name): _origin(rows) for name, rows in evaluation.items()}}
    return {"train": _origin(train), "eval": {"": _origin(evaluation)}}


def _origin(rows: Any) -> dict[str, Any] | None:
    if not hasattr(rows, "cache_files") or not hasattr(rows, "__len__"):
        return None
    unhashed: Any = SimpleNamespace(row_hash=None)
    about = describe_dataset(rows, unhashed)
    if about["repo_id"] is None:
        return None
    return {key: about[key] for key in ("repo_id", "revision", "config", "split", "num_rows")}


def evaluation_of(history: list[dict[str, Any]], origins: Mapping[str, Any]) -> dict[str, Any] | None:
    """The last value of each evaluation metric, and what it was measured on; None where nothing was evaluated.

    Args:
        history: ``trainer.state.log_history``.
        origins: Result of ``data_origins``.
    """
    metrics: dict[str, float] = {}
    step = None
    for entry in history:
        found = {key: value for key, value in entry.items() if _is_result(key, value)}
        if found:
            metrics.update(found)
            step = entry.get("step")
    return {"metrics": metrics, "step": step, "datasets": origins.get("eval", {})} if metrics else None


def _is_result(key: str, value: Any) -> bool:
    ours = key.startswith("eval_") and not key.endswith(_NOT_RESULTS)
    return ours and isinstance(value, (int, float)) and not isinstance(value, bool) and value - value == 0.0


def write_eval_results(folder: Path, evaluation: Mapping[str, Any] | None) -> Path | None:
    """Write ``.eval_results/hf_eff.yaml`` for the sets that are datasets of the Hub, which the format demands.

    Returns:
        The file, or None where there is nothing that the format can say.
    """
    entries = [] if evaluation is None else [entry for entry in _entries(evaluation) if entry is not None]
    if not entries:
        return None
    path = folder / EVAL_RESULTS / FILE
    write_text(path, eval_results_yaml(entries))
    return path


def _entries(evaluation: Mapping[str, Any]) -> list[dict[str, Any] | None]:
    now = dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds")
    return [_entry(metric, value, evaluation, now) for metric, value in sorted(evaluation["metrics"].items())]


def _entry(metric: str, value: float, evaluation: Mapping[str, Any], date: str) -> dict[str, Any] | None:
    name, what = _set_of(metric, evaluation["datasets"])
    origin = evaluation["datasets"].get(name)
    if origin is None:
        return None
    rows = f"{origin['num_rows']} rows of split {origin['split'] or 'train'}"
    return {
        "dataset_id": origin["repo_id"],
        "task_id": origin["config"] or "default",
        "value": value,
        "dataset_revision": origin["revision"],
        "date": date,
        "notes": f"{what} on {rows}, at step {evaluation['step']}, measured by the trainer",
    }


def _set_of(metric: str, datasets: Mapping[str, Any]) -> tuple[str, str]:
    """Name of the evaluation set and the metric's own name: ``eval_code_loss`` is ``loss`` on ``code``."""
    bare = metric.removeprefix("eval_")
    named = [name for name in datasets if name and bare.startswith(f"{name}_")]
    name = max(named, key=len, default="")
    return name, bare.removeprefix(f"{name}_") if name else bare
