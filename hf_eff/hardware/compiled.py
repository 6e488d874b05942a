"""C files that are compiled when they are first needed, for the processor that runs them."""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

FLAGS = ("-std=c11", "-O3", "-march=native", "-fPIC", "-fopenmp")
EXACT = ("-fno-math-errno", "-fno-strict-aliasing", "-ffp-contract=off")
_TIMEOUT = 60  # seconds


def load_c(source: Path) -> ctypes.CDLL | None:
    """Compile a C file and load it; its parallel loops run on the OpenMP threads of torch, imported before.

    The compiler is ``$CC`` or ``cc``. The library lies in a temporary folder that is gone when it has been loaded:
    compiling takes less than a second, and a kept file might be of another processor or another user.

    Args:
        source: The C file.

    Returns:
        The library, or None where there is no compiler, no OpenMP in common with torch, or no folder to load from.
    """
    compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or ""]
    try:
        with tempfile.TemporaryDirectory(prefix="hf_eff-") as name:
            made, library = Path(name) / "made.o", Path(name) / "made.so"
            _run([*compiler, *FLAGS, *EXACT, "-c", str(source), "-o", str(made)])
            # Not linked with an OpenMP library: torch's, whose symbols are global, is found, and no second pool made.
            _run([*compiler, "-shared", str(made), "-o", str(library)])
            return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError) as error:
        logger.info("%s is not compiled, torch does its work more slowly: %s", source.name, error)
        return None


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT)  # noqa: S603 - the user's compiler
