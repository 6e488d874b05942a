"""top_layers: full fine-tuning of the last k layers; the backward ends there and nothing below is kept.

Idea
    Freeze the embeddings and all layers but the last k. A gradient then has no reason to go further down: layers
    below run forward as in inference, keep nothing, and are never differentiated.

Cost      P_k parameters of the last k of L layers, A_l activations of one layer
    weights      as without
    gradients    w P_k bytes
    optimizer    s P_k bytes (s = 8 for AdamW)
    activations  k A_l and the loss, instead of L A_l
    step         the whole forward, and k / L of the backward

Use when   the task is near what the model knows, or memory allows exactly this much.
Avoid when new tokens or new knowledge have to get in: badam moves every layer at the same cost per step.
Differs    from freezing by hand: layers are found in the module tree, tied heads are refused with the reason, and the
           plan knows what is saved.

Paper      none
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_eff.contracts.cost import Cost, Facts, TrainableFacts
from hf_eff.contracts.memory import MemoryMethod
from hf_eff.contracts.spec import MethodConfig, MethodSpec, Traits, knob
from hf_eff.errors import PlanError
from hf_eff.numerics.flops import everything_trains
from hf_eff.numerics.memory_terms import training_bytes
from hf_eff.numerics.planned_step import planned_step_flops

if TYPE_CHECKING:
    from torch import nn

_TIED = (
    "memory='top_layers' with include_head=True would train the embeddings as well, because the output head shares "
    "their weight, and the backward would run through every layer; leave include_head=False or untie them."
)


@dataclass(frozen=True, kw_only=True)
class TopLayersConfig(MethodConfig):
    """Options of ``memory="top_layers"``."""

    layers: int = knob(4, "Train the last layers, this many.", low=1, unit="layers")
    include_norm: bool = knob(True, "Train the norm after the last layer too.")
    include_head: bool = knob(False, "Train the output head too; needed for a new classification head.")


class TopLayers(MemoryMethod):
    """Freezes everything below before the trainer is built; the rest is plain training.

    Args:
        config: Options.
    """

    def __init__(self, config: TopLayersConfig) -> None:
        self.config = config

    def prepare_model(self, model: nn.Module, seed: int) -> nn.Module:
        """Freeze what is not among the last layers. Parameters that are frozen already stay frozen.

        Raises:
            PlanError: The model has no layers, nothing in the last ones may train, or the head is tied.
        """
        from hf_eff.engines.top_of_model import parameters_of_top

        names = parameters_of_top(
            model, self.config.layers, include_norm=self.config.include_norm, include_head=self.config.include_head
        )
        kept = {name for name, parameter in model.named_parameters() if parameter.requires_grad and name in names.all}
        if names.tied and self.config.include_head:
            raise PlanError(_TIED)
        if not kept:
            raise PlanError(
                f"memory='top_layers' finds nothing trainable in the last {self.config.layers} layers of "
                f"{type(model).__name__}; raise layers, or unfreeze them before."
            )
        for name, parameter in model.named_parameters():
            if name not in kept:
                parameter.requires_grad_(False)
        return model


def adapt(config: TopLayersConfig, facts: Facts) -> Facts:
    """Facts of the model with the layers below frozen.

    Raises:
        PlanError: The model has no layers, or the head is tied and shall train.
    """
    model = facts.model
    if not model.blocks:
        raise PlanError(f"{model.architecture} has no layers to choose the last ones of; use memory='full'.")
    if config.include_head and model.tied_embeddings:
        raise PlanError(_TIED)
    before = model.trainable or everything_trains(model)
    first = max(0, len(model.blocks) - config.layers)
    entries = tuple(size if index >= first else 0 for index, size in enumerate(before.block_matmul_params))
    params = sum(_trained_params(facts, index, size) for index, size in enumerate(entries) if size)
    head = before.head_matmul_params if config.include_head else 0
    whole = any(size and not _is_part(facts, index, size) for index, size in enumerate(entries))
    norm = model.hidden_size if config.include_norm and whole else 0
    top = TrainableFacts(
        params=params + head + norm,
        lowest_block=next((index for index, size in enumerate(entries) if size), len(entries)),
        block_matmul_params=entries,
        head_matmul_params=head,
    )
    return facts.replace(model=dataclasses.replace(model, trainable=top))


def _is_part(facts: Facts, index: int, entries: int) -> bool:
    """Whether only some of a layer's matrices train, as with adapters."""
    block = facts.model.blocks[index]
    return entries < block.matmul_params + block.cross_matmul_params


def _trained_params(facts: Facts, index: int, entries: int) -> int:
    """Norms and biases of a layer train where all of its matrices do."""
    return entries if _is_part(facts, index, entries) else facts.model.blocks[index].params


def cost(config: TopLayersConfig, facts: Facts) -> Cost:
    """Bytes and FLOPs of training the last layers."""
    adapted = adapt(config, facts)
    return Cost(step_flops=planned_step_flops(adapted), bytes=training_bytes(adapted))


SPEC = MethodSpec(
    name="top_layers",
    kind="memory",
    slot="weights",
    summary="Full fine-tuning of the last k layers; the backward ends there and nothing below is kept.",
    config=TopLayersConfig,
    build=TopLayers,
    cost=cost,
    adapt=adapt,
    traits=Traits(fsdp2=True, baseline=True, needs_blocks=True, streaming=True),
    tiny={"layers": 1},
)
