"""checkpointing: layers keep their inputs only and run forward again in the backward.

Idea
    Of each layer x -> f(x) keep x [tokens, h] alone. When the backward reaches the layer, compute f(x) once more,
    now keeping what it needs, and go on. With dropout the random state of the first time is put back, so that
    gradients are the same to the last bit.

Cost      L layers, T tokens, h hidden size, V vocabulary, a bytes per activation
    weights, gradients, optimizer   as without
    activations                     T (4 V + a h L), and one layer's own while it is recomputed
    step                            one more forward of the layers that a gradient passes: about a third on top

Use when   activations are what does not fit: long rows, LoRA, quantised bases.
Avoid when they fit, or the logits are most of what is left (chunked_loss).
Differs    from activation_checkpointing=True: that makes the embeddings' output require gradients, so that the backward
           and the recomputation run through frozen layers as well. Here they stop at the lowest trained parameter,
           as without checkpointing, and reentrant checkpointing does not exist.

Paper      Training Deep Nets with Sublinear Memory Cost (2016), arXiv:1604.06174
Code       torch.utils.checkpoint and the switches of transformers, called as libraries
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.memory import MemoryMethod
from hf_eff.contracts.spec import MethodConfig, MethodSpec, Paper, Traits, knob
from hf_eff.numerics.memory_terms import training_bytes
from hf_eff.numerics.planned_step import planned_step_flops

if TYPE_CHECKING:
    from torch import nn

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CheckpointingConfig(MethodConfig):
    """Options of ``memory="checkpointing"``."""

    every_n_layers: int = knob(
        1,
        "Checkpoint the first of every so many layers and keep the others whole.",
        low=1,
        unit="layers",
        paper="sqrt(L)",
    )


class Checkpointing(MemoryMethod):
    """Switches checkpointing on when training begins and off when it ends; nothing else of the run changes.

    Args:
        config: Options.
    """

    def __init__(self, config: CheckpointingConfig) -> None:
        self.config = config
        self._restore: Callable[[], None] | None = None

    def train_begin(self, model: nn.Module, global_step: int) -> None:
        """Set the switches of the layers.

        Raises:
            PlanError: The model cannot be checkpointed, or is so already in the reentrant way.
        """
        from hf_eff.engines.layer_checkpointing import checkpoint_layers, is_checkpointing

        self.train_end()
        if is_checkpointing(model):
            _logger.info(
                "activation_checkpointing=True checkpoints already; memory='checkpointing' (every_n_layers=%d) takes "
                "its place and spares frozen layers.",
                self.config.every_n_layers,
            )
        self._restore = checkpoint_layers(model, self.config.every_n_layers)

    def train_end(self) -> None:
        """Put the switches back as they were."""
        if self._restore is not None:
            self._restore()
        self._restore = None


def adapt(config: CheckpointingConfig, facts: Facts) -> Facts:
    """Facts of a run that checkpoints."""
    run = dataclasses.replace(facts.run, checkpointing=True, checkpoint_every=config.every_n_layers)
    return facts.replace(run=run)


def cost(config: CheckpointingConfig, facts: Facts) -> Cost:
    """Bytes with layer inputs in place of layers. FLOPs leave recomputation out, as ``step_flops`` does."""
    return Cost(step_flops=planned_step_flops(facts), bytes=training_bytes(adapt(config, facts)))


SPEC = MethodSpec(
    name="checkpointing",
    kind="memory",
    slot="activations.layers",
    summary="Layers keep their inputs only and run forward again in the backward.",
    config=CheckpointingConfig,
    build=Checkpointing,
    cost=cost,
    adapt=adapt,
    paper=Paper(title="Training Deep Nets with Sublinear Memory Cost", year=2016, arxiv="1604.06174"),
    traits=Traits(fsdp2=True, streaming=True),
)
