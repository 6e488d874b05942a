"""Where a command's words go: people read both streams, machines read stdout alone."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def stdout_reserved(reserved: bool) -> Iterator[None]:
    """While reserved, whatever libraries print on stdout goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr) if reserved else contextlib.nullcontext():
        yield


def print_json(value: Any) -> None:
    """Print one JSON object; NaN and infinity are refused with ``ValueError``."""
    print(json.dumps(value, indent=2, allow_nan=False))
