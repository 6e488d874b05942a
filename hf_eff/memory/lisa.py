"""lisa: AdamW on embedding, head and a few layers at a time, drawn anew every K steps.

Idea
    Embedding, final norm and output head train at every step. Of the L layers between them, gamma are
    drawn uniformly and without replacement every K steps; the others are frozen:

        layers(t) = sample of gamma out of L,   from (seed, floor(t / K))

    The paper's importance weights come down to probability 1 for embedding and head and gamma / L for a
    layer. A layer that is drawn twice in a row keeps its Adam state; one that is frozen loses it.

Cost      P_o parameters outside the layers, P_l of a layer, w bytes a weight
    weights    w P
    gradients  w (P_o + gamma P_l)
    optimizer  8 (P_o + gamma P_l), and 4 (P_o + gamma P_l) for the fp32 copy of 16-bit weights
    step       the forward and, because the embedding trains, input gradients of every layer; weight
               gradients of gamma layers. Without include_embedding the backward ends at the lowest drawn layer

Use when   the vocabulary changes (embedding and head always train) or layers shall train together, not alone.
Avoid when memory decides: embedding and head are most of what trains (70 % at 8B parameters), so that LoRA
           or badam take less; include_embedding=False and include_head=False leave them out.
Differs    from the official code (LMFlow) and its copies: state of re-frozen layers is dropped (there it stays
           and grows to that of full AdamW); layers are drawn at step 0, K, 2 K, ... (there at 0 and 1); draws
           are keyed by (seed, step), not by NumPy's global state, so that a resumed run and every rank
           draw alike; layers that are frozen at the start are in the optimizer all the same.

Paper      LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning (2024),
           arXiv:2403.17919
Code       OptimalScale/LMFlow, Apache-2.0; compared with plain loops
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.spec import MethodSpec, Paper, Traits, knob
from hf_eff.engines.block_schedule import BlockSchedule
from hf_eff.engines.blockwise import Blockwise, BlockwiseConfig, blockwise_cost
from hf_eff.numerics.trainable_blocks import BlockLayout, Place


@dataclass(frozen=True, kw_only=True)
class LISAConfig(BlockwiseConfig):
    """Options of ``memory="lisa"``."""

    active_layers: int = knob(2, "Layers gamma that train at a time.", low=1, unit="layers", paper="code default 2")
    switch_every: int = knob(20, "Optimizer steps K between draws.", low=1, unit="steps", paper="code default 20")
    include_embedding: bool = knob(
        True, "Train the embeddings at every step; without them the backward ends at the lowest drawn layer."
    )
    include_norm: bool = knob(True, "Train the final norm, and a pooler, at every step.")
    include_head: bool = knob(
        True, "Train the output head at every step; a head tied to the embeddings trains if either is asked for."
    )

    def layout(self) -> BlockLayout:
        """One block a layer; what lies outside the layers always trains, or never."""

        def place(included: bool) -> Place:
            return "always" if included else "frozen"

        return BlockLayout(
            embedding=place(self.include_embedding),
            norm=place(self.include_norm),
            head=place(self.include_head),
            always_active=self.always_active,
        )

    def schedule(self, num_blocks: int, total_steps: int, seed: int) -> BlockSchedule:
        """A new draw every K steps."""
        return BlockSchedule(num_blocks, self.switch_every, "sample", seed, num_active=self.active_layers)


class LISA(Blockwise):
    """Blockwise training of several random layers beside everything that is no layer.

    Args:
        config: Options.
    """

    name = "lisa"


def cost(config: LISAConfig, facts: Facts) -> Cost:
    """Peak bytes of the costliest draw, and FLOPs averaged over all draws."""
    return blockwise_cost(config, facts)


SPEC = MethodSpec(
    name="lisa",
    kind="memory",
    slot="update",
    summary="AdamW on embedding, head and a few layers at a time, drawn anew every K steps.",
    config=LISAConfig,
    build=LISA,
    cost=cost,
    paper=Paper(
        title="LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning",
        year=2024,
        arxiv="2403.17919",
    ),
    traits=Traits(fsdp2=True, deterministic=False, needs_blocks=True, freezes_parameters=True, streaming=True),
    tiny={"active_layers": 1, "switch_every": 2},
)
