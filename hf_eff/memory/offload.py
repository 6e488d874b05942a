"""offload: what layers keep for the backward waits in host memory instead of the accelerator's.

Idea
    Each tensor that a layer saves is copied to page-locked host memory as soon as it is saved, and back when the
    backward asks for it. Nothing is computed twice and nothing is rounded: the result is the same to the last bit.

Cost      A bytes of activations of the layers, V vocabulary, T tokens
    weights, gradients, optimizer   as without
    activations                     4 V T on the accelerator, one layer's own, and A in host memory
    step                            2 A bytes over the bus (PCIe 4: about 25 GB/s each way), partly beside the work

Use when   an accelerator is short of memory, the host is not, and recomputing (checkpointing) costs more than copying.
Avoid when there is no accelerator: host memory is all there is, and the plan refuses.
Differs    from torch's save_on_cpu: parameters are not copied, a tensor saved twice is copied once, small ones stay.

Paper      vDNN: Virtualized Deep Neural Networks for Scalable, Memory-Efficient Neural Network Design (2016),
           arXiv:1602.08124
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.memory import MemoryMethod
from hf_eff.contracts.spec import MethodConfig, MethodSpec, Paper, Traits, knob
from hf_eff.numerics.memory_terms import host_bytes, training_bytes
from hf_eff.numerics.planned_step import planned_step_flops

if TYPE_CHECKING:
    from torch import nn

    from hf_eff.engines.host_offload import HostStore


@dataclass(frozen=True, kw_only=True)
class OffloadConfig(MethodConfig):
    """Options of ``memory="offload"``."""

    min_bytes: int = knob(65536, "Smaller tensors stay on the accelerator.", low=0, unit="bytes")
    pinned: bool = knob(True, "Page-locked host memory: faster copies; the system cannot swap it out.")


class Offload(MemoryMethod):
    """Wraps the layers' forwards while training; on a CPU they save as always.

    Args:
        config: Options.
    """

    def __init__(self, config: OffloadConfig) -> None:
        self.config = config
        self.store: HostStore | None = None
        self._restore: Callable[[], None] | None = None

    def train_begin(self, model: nn.Module, global_step: int) -> None:
        """Wrap the layers.

        Raises:
            PlanError: The model has no repeated layers.
        """
        from hf_eff.engines.host_offload import HostStore, offload_layers

        self.train_end()
        device = next(model.parameters()).device.type
        if device != "cpu":
            self.store = HostStore(self.config.min_bytes, device, self.config.pinned)
            self._restore = offload_layers(model, self.store)

    def train_end(self) -> None:
        """Unwrap them."""
        if self._restore is not None:
            self._restore()
        self._restore = None

    def log_entries(self) -> Mapping[str, float]:
        """Bytes moved to the host since training began."""
        return {} if self.store is None else {"offloaded_bytes": float(self.store.moved_bytes)}


def adapt(config: OffloadConfig, facts: Facts) -> Facts:  # noqa: ARG001 - the signature every method shares
    """Facts of a run whose layers save to the host."""
    return facts.replace(run=dataclasses.replace(facts.run, offload=True))


def cost(config: OffloadConfig, facts: Facts) -> Cost:  # noqa: ARG001 - the signature every method shares
    """Bytes left on the accelerator, and those that wait in host memory."""
    moved = facts.replace(run=dataclasses.replace(facts.run, offload=True))
    return Cost(step_flops=planned_step_flops(facts), bytes=training_bytes(moved), host_bytes=host_bytes(moved))


SPEC = MethodSpec(
    name="offload",
    kind="memory",
    slot="activations.layers",
    summary="What layers keep for the backward waits in host memory instead of the accelerator's.",
    config=OffloadConfig,
    build=Offload,
    cost=cost,
    adapt=adapt,
    paper=Paper(
        title="vDNN: Virtualized Deep Neural Networks for Scalable, Memory-Efficient Neural Network Design",
        year=2016,
        arxiv="1602.08124",
    ),
    traits=Traits(streaming=True, needs_accelerator=True),
)
