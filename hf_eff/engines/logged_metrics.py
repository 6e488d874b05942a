"""What TRL's trainers count and collect at every call of ``compute_loss``, and how to undo it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


def metrics_snapshot(trainer: Any) -> Callable[[], None]:
    """Note a trainer's collected metrics and token count; the returned function puts them back as they were."""
    metrics = getattr(trainer, "_metrics", None)
    tokens = getattr(trainer, "_total_train_tokens", None)
    kept = {mode: {key: list(values) for key, values in entries.items()} for mode, entries in (metrics or {}).items()}

    def restore() -> None:
        for mode, entries in (metrics or {}).items():
            entries.clear()
            entries.update({key: list(values) for key, values in kept.get(mode, {}).items()})
        if tokens is not None:
            trainer._total_train_tokens = tokens  # noqa: SLF001

    return restore


@contextlib.contextmanager
def metrics_kept(trainer: Any) -> Iterator[None]:
    """Inside, nothing that a trainer counts or collects lasts."""
    restore = metrics_snapshot(trainer)
    try:
        yield
    finally:
        restore()
