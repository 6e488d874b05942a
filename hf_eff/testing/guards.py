"""Watching what a method does to the world: random state, files, sockets, printed lines."""

from __future__ import annotations

import contextlib
import io
import os
import random
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from hf_eff.testing.check import CheckFailedError, expect


@contextlib.contextmanager
def random_state_untouched() -> Iterator[None]:
    """Fail when Python's, NumPy's or torch's global generator moved.

    Raises:
        CheckFailedError: A global generator is not as it was.
    """
    before = _random_states()
    yield
    moved = [name for name, state in _random_states().items() if state != before[name]]
    expect(not moved, f"the global random state of {moved} changed; draw from the generator that is passed in.")


def _random_states() -> dict[str, Any]:
    legacy: Any = np.random.get_state()  # noqa: NPY002 - reading the global state is the point
    return {
        "random": random.getstate(),
        "numpy": (legacy[0], legacy[1].tobytes(), *legacy[2:]),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }


@contextlib.contextmanager
def no_network() -> Iterator[None]:
    """Fail at the first attempt to connect."""

    def refuse(_door: socket.socket, address: object) -> None:
        raise CheckFailedError(f"a method opened a connection to {address!r}; only hf_eff.hub may use the network.")

    with mock.patch.object(socket.socket, "connect", refuse):
        yield


@contextlib.contextmanager
def nothing_printed() -> Iterator[None]:
    """Fail when something was printed to standard output.

    Raises:
        CheckFailedError: There is output.
    """
    with contextlib.redirect_stdout(io.StringIO()) as captured:
        yield
    expect(not captured.getvalue(), f"the method printed {captured.getvalue()[:80]!r}; use logging or the progress.")


class _WriteLog:
    """Paths opened for writing or made while active; one audit hook, because hooks cannot be removed."""

    def __init__(self) -> None:
        self.active = False
        self.paths: list[str] = []
        self._installed = False

    def start(self) -> None:
        if not self._installed:
            sys.addaudithook(self._hear)
            self._installed = True
        self.paths, self.active = [], True

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.active and event in ("open", "os.mkdir", "os.rename", "os.remove") and _writes(event, arguments):
            self.paths.append(os.path.realpath(os.fsdecode(arguments[1 if event == "os.rename" else 0])))


def _writes(event: str, arguments: tuple[Any, ...]) -> bool:
    path = arguments[0]
    if not isinstance(path, (str, bytes, os.PathLike)):
        return False
    if event != "open":
        return True
    mode, flags = arguments[1], arguments[2]
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return bool(int(flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


_LOG = _WriteLog()


@contextlib.contextmanager
def writes_only_under(folder: Path) -> Iterator[None]:
    """Fail when a file outside ``folder`` was written; byte code caches and devices do not count.

    Raises:
        CheckFailedError: A path outside was opened for writing, made, moved or removed.
    """
    _LOG.start()
    try:
        yield
    finally:
        _LOG.active = False
    allowed = os.path.realpath(folder)
    outside = [path for path in _LOG.paths if not _allowed(path, allowed)]
    expect(not outside, f"the method wrote outside its folder: {outside[:3]}; use store_dir.")


def _allowed(path: str, folder: str) -> bool:
    return path.startswith(("/dev/", "/proc/")) or "__pycache__" in path or Path(path).is_relative_to(folder)
