"""A real model and real data for slow tests; both come out of installed packages, not the network."""

from __future__ import annotations

from hf_eff.cli.embedded import FAMILIES, load_smollm2, reasoning_pool, reasoning_target

__all__ = ["FAMILIES", "load_smollm2", "reasoning_pool", "reasoning_target"]
