"""The trained weights of the best probe so far, kept in a file and put back when a run ends worse than it was."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from hf_eff.engines.ranks import Ranks
from hf_eff.errors import EffWarning
from hf_eff.files import replacing

FOLDER = "_best_weights"
"""transformers leaves names that start with ``_`` out of pushes."""


class BestWeights:
    """Weights at the lowest level of the probes, on the first process.

    Args:
        folder: The run's folder.
        names: Names of the parameters that the run trains.
        ranks: The processes of the run.

    Attributes:
        step: Optimizer step of the weights kept, or None before the first probe.
        level: Probed loss relative to the first probe, at that step.
    """

    def __init__(self, folder: Path, names: Collection[str], ranks: Ranks) -> None:
        self._folder, self._names, self._ranks = folder / FOLDER, frozenset(names), ranks
        self.step: int | None = None
        self.level: float | None = None

    def offer(self, level: float | None, step: int, model: nn.Module) -> bool:
        """Keep the present weights if the loss is lower than ever; a loss that is not finite is not.

        Returns:
            Whether they were kept.
        """
        if level is None or level != level or (self.level is not None and level >= self.level):
            return False
        earlier, self.step, self.level = self._path, step, level
        if self._ranks.is_first:
            kept = {name: each.detach().cpu().contiguous() for name, each in self._trained(model).items()}
            with replacing(self._path) as temporary:
                save_file(kept, temporary)
            if earlier != self._path:
                earlier.unlink(missing_ok=True)
        return True

    def restore(self, model: nn.Module) -> int | None:
        """Put the weights back.

        Returns:
            The step they are of; None where there are none, and the model is left as it is.
        """
        if self.step is None:
            return None
        if not self._ranks.broadcast(self._path.is_file()):
            warnings.warn(
                f"the weights of step {self.step}, the best so far, are not in {str(self._folder)!r} any more; the "
                "model keeps the last ones.",
                EffWarning,
                stacklevel=2,
            )
            return None
        kept = load_file(self._path) if self._ranks.is_first else {}
        with torch.no_grad():
            for name, parameter in self._trained(model).items():
                if name in kept:
                    parameter.copy_(kept[name])
                if self._ranks.active:
                    dist.broadcast(parameter.data, src=0)
        return self.step

    def remove(self) -> None:
        """Delete the file."""
        if self._ranks.is_first and self._folder.is_dir():
            for path in self._folder.glob("step-*.safetensors"):
                path.unlink(missing_ok=True)
            self._folder.rmdir()

    @property
    def _path(self) -> Path:
        return self._folder / f"step-{self.step}.safetensors"

    def _trained(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {name: each for name, each in model.named_parameters() if name in self._names}

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state; the weights stay in their file."""
        return {"step": self.step, "level": self.level}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self.step, self.level = state["step"], state["level"]
