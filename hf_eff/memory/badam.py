"""badam: AdamW on one block of layers at a time, so that gradients and Adam state exist for one block only.

Idea
    Split the layers into D blocks. For K optimizer steps freeze all but one block, train it with a fresh
    AdamW (m = v = 0), then move on; a cycle visits each block once, by default in random order:

        block(t) = order[floor(t / K) mod D],   order reshuffled each cycle from (seed, cycle)

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
Code       Ledzy/BAdam, Apache-2.0; compared by running it, see benchmarks/blockwise.py
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hf_eff.contracts.cost import Cost, Facts, ModelFacts, TrainableFacts
from hf_eff.contracts.memory import BatchShape, MemoryMethod, OptimizerContext
from hf_eff.contracts.spec import MethodConfig, MethodSpec, Paper, Traits, knob
from hf_eff.engines.block_schedule import BlockSchedule, recommended_interval
from hf_eff.errors import CheckpointError, OptionError, OutsideIntendedUseWarning, PlanError
from hf_eff.numerics.flops import training_flops
from hf_eff.numerics.memory_terms import training_bytes
from hf_eff.numerics.planned_step import planned_step_flops
from hf_eff.numerics.trainable_blocks import trainable_blocks

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hf_eff.engines.block_partition import Partition
    from hf_eff.engines.block_switch import BlockSwitch

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BAdamConfig(MethodConfig):
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
    layers_per_block: int = knob(1, "Consecutive layers that form one block.", low=1, unit="layers", paper="1")
    include_embedding: bool = knob(False, "Make the embeddings a block: large, and its backward spans all layers.")
    include_head: bool = knob(False, "Make the final norm and the output head a block.")
    always_active: tuple[str, ...] = knob(
        (), "Parameters or modules, by name, that train at every step: a new classification head, for instance."
    )
    state_policy: str = knob(
        "reset", "What happens to the Adam state of a block that is left.", choices=("reset", "keep"), paper="reset"
    )

    def __post_init__(self) -> None:
        """Read 'auto' and check what bounds cannot say.

        Raises:
            OptionError: ``start_block`` meets a random order.
        """
        if self.switch_every == "auto":  # type: ignore[comparison-overlap]
            object.__setattr__(self, "switch_every", None)
        super().__post_init__()
        if self.start_block is not None and self.mode == "random":
            raise OptionError(f"{self._address('start_block')} needs mode='ascending', 'descending' or 'fixed'.")

    def schedule(self, num_blocks: int, total_steps: int, seed: int) -> BlockSchedule:
        """The schedule of a run of ``total_steps`` optimizer steps (0: unknown) over ``num_blocks`` blocks."""
        steps = self.switch_every or recommended_interval(total_steps, num_blocks)
        return BlockSchedule(num_blocks, steps, self.mode, seed, self.start_block)


class BAdam(MemoryMethod):
    """Freezes all blocks but the scheduled one; the optimizer is the trainer's own, over all candidates.

    Args:
        config: Options.
    """

    def __init__(self, config: BAdamConfig) -> None:
        self.config = config
        self.schedule: BlockSchedule | None = None
        self.switch: BlockSwitch | None = None
        self._resume_hooks: Callable[[], None] | None = None
        self._trainable: dict[int, TrainableFacts] = {}

    def create_optimizer(self, context: OptimizerContext) -> torch.optim.Optimizer:
        """Find the blocks and make the optimizer, with every candidate trainable and in a group.

        Raises:
            PlanError: The model has no blocks, or the optimizer cannot restart per block.
        """
        from hf_eff.engines.block_partition import partition_layers
        from hf_eff.engines.block_switch import BlockSwitch, require_restartable
        from hf_eff.engines.master_weights import make_optimizer

        require_restartable(context.optimizer_class, context.optimizer_kwargs)
        partition = partition_layers(
            context.model,
            context.candidates,
            layers_per_block=self.config.layers_per_block,
            include_embedding=self.config.include_embedding,
            include_head=self.config.include_head,
            always_active=self.config.always_active,
        )
        self.schedule = self.config.schedule(len(partition.blocks), context.total_steps, context.seed)
        _check_schedule(self.schedule, context.total_steps)
        _report_frozen(context.model, partition)
        optimizer = make_optimizer(context)
        self.switch = BlockSwitch(context.model, optimizer, partition, keep_state=self.config.state_policy == "keep")
        self._trainable.clear()
        return optimizer

    def train_begin(self, model: nn.Module, global_step: int) -> None:
        """Keep the backward above the active block, also with activation checkpointing.

        Raises:
            PlanError: Activation checkpointing is reentrant.
        """
        from hf_eff.engines.block_switch import pause_input_gradients, require_non_reentrant

        if self.switch is not None:
            require_non_reentrant(self.switch.model)
            self._restore_hooks()
            self._resume_hooks = pause_input_gradients(self.switch.model)

    def step_begin(self, global_step: int) -> None:
        """Switch when the schedule says so."""
        if self.schedule is not None and self.switch is not None:
            self.switch.activate(self.schedule.block_at(global_step))

    def train_end(self) -> None:
        """Make every candidate trainable again and put the hooks back."""
        self._restore_hooks()
        if self.switch is not None:
            self.switch.release()

    def _restore_hooks(self) -> None:
        if self._resume_hooks is not None:
            self._resume_hooks()
        self._resume_hooks = None

    def step_flops(self, facts: ModelFacts, shapes: Sequence[BatchShape], global_step: int) -> float:
        """FLOPs with the block that is active in that step; the depth of the block decides the backward."""
        if self.schedule is None or self.switch is None:
            return super().step_flops(facts, shapes, global_step)
        from hf_eff.engines.facts import trainable_facts

        index = self.schedule.block_at(global_step)
        if index not in self._trainable:
            self._trainable[index] = trainable_facts(self.switch.model, self.switch.active_names(index))
        return sum(training_flops(facts, shape, self._trainable[index]) for shape in shapes)

    def state_dict(self) -> dict[str, Any]:
        """Schedule, partition and active block; Adam state and master copies are in the optimizer's state."""
        if self.schedule is None or self.switch is None:
            return {}
        return {
            "schedule": self.schedule.to_dict(),
            "partition": self.switch.partition.fingerprint,
            "active": self.switch.index,
        }

    def load_state_dict(self, state: Mapping[str, Any], global_step: int) -> None:
        """Activate the block that was active at the save, so that its optimizer state finds its owner.

        Raises:
            CheckpointError: The checkpoint has other blocks or another schedule.
        """
        if not state or self.schedule is None or self.switch is None:
            return
        if state["partition"] != self.switch.partition.fingerprint:
            raise CheckpointError(
                "the checkpoint was trained with other blocks; resume with the same model, trainable parameters, "
                "layers_per_block, include_embedding, include_head and always_active."
            )
        saved, planned = BlockSchedule(**state["schedule"]), self.schedule
        if self.config.switch_every is None:  # it follows the length of the run, which a resume may change
            planned = dataclasses.replace(planned, switch_every=saved.switch_every)
        if saved != planned:
            raise CheckpointError(f"the checkpoint was trained with {saved}, this run has {planned}; use its options.")
        self.schedule = saved
        if state["active"] is not None:
            self.switch.activate(state["active"])

    def log_entries(self) -> Mapping[str, float]:
        """Index of the active block."""
        index = None if self.switch is None else self.switch.index
        return {} if index is None else {"block": float(index)}


def _check_schedule(schedule: BlockSchedule, total_steps: int) -> None:
    blocks, cycle = schedule.num_blocks, schedule.num_blocks * schedule.switch_every
    if schedule.start is not None and schedule.start >= blocks:
        raise PlanError(f"start_block={schedule.start} does not exist; there are {blocks} blocks, from 0.")
    if schedule.mode != "fixed" and 0 < total_steps < cycle:
        visited = -(-total_steps // schedule.switch_every)
        left = "the others stay as they are" if visited < blocks else "the last one is cut short"
        warnings.warn(
            OutsideIntendedUseWarning(
                f"memory='badam' visits {visited} of {blocks} blocks in {total_steps} steps; {left}. "
                f"One cycle takes {cycle} steps; set switch_every to at most {max(1, total_steps // blocks)}."
            ),
            stacklevel=3,
        )


def _report_frozen(model: nn.Module, partition: Partition) -> None:
    """Say what never trains; louder where a task head may be among it."""
    if not partition.frozen:
        return
    ask = getattr(model, "get_output_embeddings", None)
    level = logging.INFO if callable(ask) and ask() is not None else logging.WARNING
    _logger.log(level, "memory='badam' never trains %s (see always_active, include_head)", ", ".join(partition.frozen))


def cost(config: BAdamConfig, facts: Facts) -> Cost:
    """Peak bytes of the costliest block, and FLOPs averaged over the blocks that the run visits.

    What ``always_active`` names is not among the facts and is left out.
    """
    parts = trainable_blocks(
        facts.model,
        layers_per_block=config.layers_per_block,
        include_embedding=config.include_embedding,
        include_head=config.include_head,
    )
    if not parts:
        raise PlanError(f"{facts.model.architecture} has no layers to train block by block; use memory='lora'.")
    schedule = config.schedule(len(parts), max(0, facts.run.max_steps), seed=0)
    cycle = schedule.num_blocks * schedule.switch_every
    # The seed of a random order is not among the facts: the mean over a cycle is its expectation.
    steps = facts.run.max_steps if 0 < facts.run.max_steps < cycle and config.mode != "random" else cycle
    flops = [planned_step_flops(facts, part) for part in parts]
    return Cost(
        step_flops=sum(flops[schedule.block_at(step)] for step in range(steps)) / steps,
        bytes=max((_bytes(facts, part) for part in parts), key=lambda terms: sum(terms.values())),
    )


def _bytes(facts: Facts, part: TrainableFacts) -> dict[str, float]:
    terms = training_bytes(facts, part)
    master = 4.0 * part.params if facts.model.param_bytes < 4 else 0.0
    return {**terms, "optimizer": terms["optimizer"] + master}


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
    traits=Traits(deterministic=False, needs_blocks=True, freezes_parameters=True, streaming=True),
    tiny={"switch_every": 2},
)
