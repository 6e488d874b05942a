"""full: every parameter trains with the optimizer that ``optim`` names; nothing is changed.

Idea
    The baseline that other memory methods are measured against. No hook is taken, so the run is the
    parent trainer's, bit for bit.

Cost      P parameters, w bytes per weight, s bytes of optimizer state per parameter (8 for AdamW)
    weights    w P bytes
    gradients  w P bytes
    optimizer  s P bytes
    step       forward and full backward, about 6 P FLOPs per token

Use when   weights, gradients and optimizer state fit beside the activations.
Avoid when they do not: 16 bytes per parameter in fp32 with AdamW, before activations.
Differs    from nothing: it is plain fine-tuning.

Paper      none
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.memory import MemoryMethod
from hf_eff.contracts.spec import MethodConfig, MethodSpec, Traits
from hf_eff.numerics.memory_terms import training_bytes
from hf_eff.numerics.planned_step import planned_step_flops


@dataclass(frozen=True, kw_only=True)
class FullConfig(MethodConfig):
    """Options of ``memory="full"``: none."""


class Full(MemoryMethod):
    """Plain training.

    Args:
        config: Options.
    """

    def __init__(self, config: FullConfig) -> None:
        self.config = config


def cost(config: FullConfig, facts: Facts) -> Cost:  # noqa: ARG001 - the signature every method shares
    """Bytes and FLOPs of training what is trainable in ``facts.model``."""
    return Cost(step_flops=planned_step_flops(facts), bytes=training_bytes(facts))


SPEC = MethodSpec(
    name="full",
    kind="memory",
    slot="weights",
    summary="Every parameter trains with the optimizer that optim names; nothing is changed.",
    config=FullConfig,
    build=Full,
    cost=cost,
    traits=Traits(baseline=True, fsdp2=True, streaming=True),
)
