"""badam: AdamW on one block of layers at a time, so that gradients and Adam state exist for one block only.

Idea
    Split the layers into D blocks. For K optimizer steps freeze all but one block, train it with a fresh
    AdamW (m = v = 0), then move on; a cycle visits each block once, by default in random order:

        block(t) = order[floor(t / K) mod D],   order reshuffled each cycle from (seed, cycle)

    A block is a layer, or several, or a part of one: its attention or feed-forward, a single matrix, or
    what the user names.

Cost      P parameters, P_b parameters of the block, L layers, b the block's lowest layer
    weights    w P bytes (w = 2 or 4)
    gradients  w P_b bytes
    optimizer  8 P_b bytes, and 4 P_b for the fp32 master copy of a 16-bit block
    step       the forward, then the backward from the loss down to layer b only: about half of AdamW's
               backward on average

Use when   all weights shall move and full AdamW does not fit; runs of at least D x K steps.
Avoid when the run is shorter than one cycle (blocks that are never visited stay as they were), or when the
           embedding must learn new tokens (it is not trained by default).
Differs    from the official code (badam 1.4): the first block gets K steps, not K - 1; weight decay follows
           the trainer's two groups; a run resumes exactly; random orders come from a private generator;
           a block that follows itself keeps its Adam state; fp32 weights get no second copy.

Paper      BAdam: A Memory Efficient Full Parameter Optimization Method for Large Language Models (2024),
           arXiv:2404.02827
Code       Ledzy/BAdam, Apache-2.0; compared by running it, see benchmarks/memory.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.spec import MethodSpec, Paper, Traits, knob
from hf_eff.engines.block_schedule import BlockSchedule, recommended_interval
from hf_eff.engines.blockwise import Blockwise, BlockwiseConfig, blockwise_cost
from hf_eff.errors import OptionError
from hf_eff.numerics.trainable_blocks import BlockLayout


@dataclass(frozen=True, kw_only=True)
class BAdamConfig(BlockwiseConfig):
    """Options of ``memory="badam"``."""

    switch_every: int | None = knob(
        None,
        "Optimizer steps K per block; None (or 'auto') is round(steps / blocks) kept within 50 to 100.",
        low=1,
        unit="steps",
        paper="clip(n / (B D), 50, 100); code default 50",
    )
    mode: Literal["random", "ascending", "descending", "fixed"] = knob(
        "random",
        "Order of the blocks; 'random' is reshuffled each cycle.",
        choices=("random", "ascending", "descending", "fixed"),
        paper="random reshuffling; code default descending",
    )
    start_block: int | None = knob(None, "First block of the other modes (0 is the lowest).", low=0)
    granularity: Literal["layer", "attn_mlp", "matrix"] = knob(
        "layer",
        "What a block is: a layer; its attention (with the norms) and its feed-forward in turn; or one matrix "
        "with its bias or adapters.",
        choices=("layer", "attn_mlp", "matrix"),
        paper="layer",
    )
    layers_per_block: int = knob(1, "Consecutive layers that form one block.", low=1, unit="layers", paper="1")
    blocks: tuple[str, ...] = knob(
        (), "The blocks by name instead, in order: each one a few modules or parameters joined by '+'."
    )
    include_embedding: bool = knob(False, "Make the embeddings a block: large, and its backward spans all layers.")
    include_head: bool = knob(False, "Make the final norm and the output head a block.")

    def __post_init__(self) -> None:
        """Read 'auto' and check what bounds cannot say.

        Raises:
            OptionError: Options contradict each other.
        """
        if self.switch_every == "auto":  # type: ignore[comparison-overlap]
            object.__setattr__(self, "switch_every", None)
        super().__post_init__()
        if self.start_block is not None and self.mode == "random":
            raise OptionError(f"{self._address('start_block')} needs mode='ascending', 'descending' or 'fixed'.")
        if self.layers_per_block > 1 and self.granularity != "layer":
            raise OptionError(
                f"{self._address('layers_per_block')} joins whole layers, and granularity={self.granularity!r} cuts "
                "them; set one of the two."
            )
        cut = self.layers_per_block > 1 or self.granularity != "layer" or self.include_embedding or self.include_head
        if self.blocks and cut:
            raise OptionError(
                f"{self._address('blocks')} names the blocks one by one; leave granularity, layers_per_block, "
                "include_embedding and include_head at their defaults and name those parts, too."
            )

    def layout(self) -> BlockLayout:
        """One block for each unit of the chosen size; embedding and head frozen unless asked for."""
        head: Literal["block", "frozen"] = "block" if self.include_head else "frozen"
        return BlockLayout(
            granularity=self.granularity,
            layers_per_block=self.layers_per_block,
            embedding="block" if self.include_embedding else "frozen",
            head=head,
            norm=head,
            custom=self.blocks,
            always_active=self.always_active,
        )

    def schedule(self, num_blocks: int, total_steps: int, seed: int) -> BlockSchedule:
        """K steps a block, in the chosen order."""
        steps = self.switch_every or recommended_interval(total_steps, num_blocks)
        return BlockSchedule(num_blocks, steps, self.mode, seed, self.start_block)

    @property
    def schedule_is_open(self) -> bool:
        """K follows the length of the run where it is not given."""
        return self.switch_every is None


class BAdam(Blockwise):
    """Blockwise training that starts each visit afresh.

    Args:
        config: Options.
    """

    name = "badam"


def cost(config: BAdamConfig, facts: Facts) -> Cost:
    """Peak bytes of the costliest block, and FLOPs averaged over the blocks that the run visits."""
    return blockwise_cost(config, facts)


SPEC = MethodSpec(
    name="badam",
    kind="memory",
    slot="update",
    summary="AdamW on one block of layers at a time, so that gradients and Adam state exist for one block only.",
    config=BAdamConfig,
    build=BAdam,
    cost=cost,
    paper=Paper(
        title="BAdam: A Memory Efficient Full Parameter Optimization Method for Large Language Models",
        year=2024,
        arxiv="2404.02827",
    ),
    traits=Traits(fsdp2=True, deterministic=False, needs_blocks=True, freezes_parameters=True, streaming=True),
    tiny={"switch_every": 2},
)
