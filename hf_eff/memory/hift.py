"""hift: AdamW on one group of layers a step, each group with an Adam state of its own that waits on the host.

Idea
    Split embedding, layers and head into k groups of m. Step t updates one group, the next step the next
    one; a sweep of k steps updates everything once:

        group(t) = order[t mod k],     eta(t) = schedule(k floor(t / k))

    Every group keeps its own m, v and step count from visit to visit, so that k = 1 is AdamW. The learning
    rate rests inside a sweep, so that all groups of one sweep take equally large steps.

Cost      P parameters, P_g parameters of the largest group, w bytes a weight
    weights    w P
    gradients  w P_g
    optimizer  8 P_g on the device (12 P_g with the fp32 copy of 16-bit weights), and 8 P (12 P) on the host.
               On a CPU both are one memory: gradients and activations are saved, state is not, unless
               state_policy="disk" puts it into files.
    step       the forward, then the backward from the loss down to the group; moving 2 x 8 P_g bytes

Use when   all parameters shall move from the first steps on, embedding and head included, and an
           accelerator's memory is short while the host's is not.
Avoid when on a CPU for the sake of optimizer state (use badam), or on a slow bus: the state moves each step.
Differs    from the official code: switches once per optimizer step, not once per micro-batch; the schedule
           runs over the whole length of the run (there it is built for all steps and moved once a sweep, so
           that a decay hardly begins); a last smaller group does not shift the sweeps; no DeepSpeed, no MPI.
           As there, the head's group holds the final norm; a tensor shared by embedding and head trains with
           the embedding.

Paper      HiFT: A Hierarchical Full Parameter Fine-Tuning Strategy (2024), arXiv:2401.15207
Code       misonsky/HiFT, Apache-2.0; does not import with transformers 5, so compared with a plain loop
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.spec import MethodSpec, Paper, Traits, knob
from hf_eff.engines.block_schedule import BlockSchedule, Mode
from hf_eff.engines.blockwise import Blockwise, BlockwiseConfig, blockwise_cost
from hf_eff.numerics.trainable_blocks import BlockLayout, Place

_MODES: dict[str, Mode] = {"bottom2up": "ascending", "top2down": "descending", "random": "shuffled"}


@dataclass(frozen=True, kw_only=True)
class HiFTConfig(BlockwiseConfig):
    """Options of ``memory="hift"``."""

    order: Literal["bottom2up", "top2down", "random"] = knob(
        "bottom2up",
        "Order of the groups in every sweep; 'random' is shuffled once.",
        choices=tuple(_MODES),
        paper="all three",
    )
    layers_per_group: int = knob(
        1,
        "Consecutive layers m that form a group; embedding and head count as a layer each, and the last group "
        "may hold fewer.",
        low=1,
        unit="layers",
        paper="1",
    )
    include_embedding: bool = knob(True, "Train the embeddings.", paper="yes")
    include_head: bool = knob(True, "Train the final norm and the output head.", paper="yes")
    lr_clock: Literal["sweep", "step"] = knob(
        "sweep", "When the learning-rate schedule moves: once a sweep, or at every step.", choices=("sweep", "step")
    )
    state_policy: Literal["reset", "keep", "offload", "disk"] = knob(
        "offload",
        "Where a group's Adam state waits: dropped; kept beside the others; in host memory (on a CPU the same "
        "as 'keep'); or in files of a private temporary folder.",
        choices=("reset", "keep", "offload", "disk"),
        paper="offload",
    )

    def layout(self) -> BlockLayout:
        """Groups of m units, where embedding and head are units like the layers."""
        embedding: Place = "block" if self.include_embedding else "frozen"
        head: Place = "block" if self.include_head else "frozen"
        return BlockLayout(
            layers_per_block=self.layers_per_group,
            group_outside=True,
            embedding=embedding,
            norm=head,
            head=head,
            always_active=self.always_active,
        )

    def schedule(self, num_blocks: int, total_steps: int, seed: int) -> BlockSchedule:
        """One step a group."""
        return BlockSchedule(num_blocks, 1, _MODES[self.order], seed)


class HiFT(Blockwise):
    """Blockwise training that changes the group at every step and keeps what each has learnt.

    Args:
        config: Options.
    """

    name = "hift"
    config: HiFTConfig

    def schedule_every(self) -> int:
        """A sweep: as many steps as there are groups."""
        if self.schedule is None or self.config.lr_clock == "step":
            return 1
        return self.schedule.cycle_steps


def cost(config: HiFTConfig, facts: Facts) -> Cost:
    """Peak bytes of the costliest group, what waits elsewhere, and FLOPs averaged over a sweep."""
    return blockwise_cost(config, facts)


SPEC = MethodSpec(
    name="hift",
    kind="memory",
    slot="update",
    summary="AdamW on one group of layers a step, each group with an Adam state of its own that waits on the host.",
    config=HiFTConfig,
    build=HiFT,
    cost=cost,
    paper=Paper(
        title="HiFT: A Hierarchical Full Parameter Fine-Tuning Strategy",
        year=2024,
        arxiv="2401.15207",
    ),
    traits=Traits(fsdp2=True, needs_blocks=True, freezes_parameters=True, streaming=True),
)
