"""For every check at least one method that is broken in exactly the way the check must notice."""

from __future__ import annotations

from collections.abc import Mapping

from hf_eff.contracts.spec import MethodSpec
from hf_eff.testing.mutants import deciding, declared, selecting, training

MUTANTS: Mapping[str, tuple[MethodSpec, ...]] = {
    "check_resume_training": (*selecting.RESUME, *training.RESUME, *deciding.RESUME),
    **declared.MUTANTS,
    **selecting.MUTANTS,
    **training.MUTANTS,
    **deciding.MUTANTS,
}
"""Check name to the SPECs it must reject."""
