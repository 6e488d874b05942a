"""What the methods that train block by block share: options, lifecycle, resume, and cost.

A method adds which blocks there are (its layout) and when each trains (its schedule); the rest is here.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hf_eff.contracts.cost import Cost, Facts, ModelFacts, TrainableFacts
from hf_eff.contracts.memory import BatchShape, MemoryMethod, OptimizerContext
from hf_eff.contracts.spec import MethodConfig, knob
from hf_eff.engines.block_schedule import BlockSchedule, block_list
from hf_eff.errors import CheckpointError, OutsideIntendedUseWarning, PlanError
from hf_eff.numerics.flops import training_flops
from hf_eff.numerics.memory_terms import host_bytes, training_bytes
from hf_eff.numerics.planned_step import planned_step_flops
from hf_eff.numerics.trainable_blocks import BlockLayout, always_trains, expected_draws, joined, trainable_blocks

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hf_eff.engines.block_partition import Partition
    from hf_eff.engines.block_switch import BlockSwitch

_logger = logging.getLogger(__name__)
_POLICIES = ("reset", "keep", "offload", "disk")
_FLOAT_BYTES = 4.0


@dataclass(frozen=True, kw_only=True)
class BlockwiseConfig(MethodConfig):
    """Options that every blockwise method has."""

    always_active: tuple[str, ...] = knob(
        (), "Parameters or modules, by name, that train at every step: a new classification head, for instance."
    )
    state_policy: Literal["reset", "keep", "offload", "disk"] = knob(
        "reset",
        "Optimizer state of a block that is left: dropped; kept; kept in host memory (on a CPU the same as "
        "'keep'); or kept in files of a private temporary folder.",
        choices=_POLICIES,
    )
    master_weights: bool = knob(
        True,
        "Keep an fp32 copy of 16-bit weights while their block trains; False saves its 4 bytes per parameter "
        "and rounds bf16 weights stochastically instead.",
    )

    def layout(self) -> BlockLayout:
        """What the blocks are."""
        raise NotImplementedError

    def schedule(self, num_blocks: int, total_steps: int, seed: int) -> BlockSchedule:
        """When each block trains, in a run of ``total_steps`` optimizer steps (0: unknown)."""
        raise NotImplementedError

    @property
    def schedule_is_open(self) -> bool:
        """Whether the length of the run decided K; a resumed run then keeps the K it began with."""
        return False


class Blockwise(MemoryMethod):
    """Freezes all blocks but the scheduled ones; the optimizer is the trainer's own, over all candidates.

    Args:
        config: Options.
    """

    name: str
    """What the user typed."""

    def __init__(self, config: Any) -> None:
        self.config: BlockwiseConfig = config
        self.schedule: BlockSchedule | None = None
        self.switch: BlockSwitch | None = None
        self._resume_hooks: Callable[[], None] | None = None
        self._trainable: dict[tuple[int, ...], TrainableFacts] = {}

    def create_optimizer(self, context: OptimizerContext) -> torch.optim.Optimizer:
        """Find the blocks and make the optimizer, with every candidate trainable and in a group.

        Raises:
            PlanError: The model has no blocks, or the optimizer cannot restart per block.
        """
        from hf_eff.engines.block_partition import partition_model
        from hf_eff.engines.block_switch import BlockSwitch, require_restartable
        from hf_eff.engines.master_weights import make_optimizer

        require_restartable(context.optimizer_class, context.optimizer_kwargs)
        partition = partition_model(context.model, context.candidates, self.config.layout())
        schedule = self.config.schedule(len(partition.blocks), context.total_steps, context.seed)
        _require_blocks(schedule)
        _warn_of_unvisited(self.name, schedule, context.total_steps)
        _report_frozen(self.name, context.model, partition)
        optimizer = make_optimizer(context, master_weights=self.config.master_weights)
        self.switch = BlockSwitch(context.model, optimizer, partition, self.config.state_policy)
        self.schedule = schedule
        self._trainable.clear()
        return optimizer

    def train_begin(self, model: nn.Module, global_step: int) -> None:
        """Keep the backward above the active blocks, also with activation checkpointing.

        Raises:
            PlanError: Activation checkpointing is reentrant.
        """
        from hf_eff.engines.block_switch import pause_input_gradients, require_non_reentrant

        if self.switch is not None:
            require_non_reentrant(self.switch.model)
            self._restore_hooks()
            self._resume_hooks = pause_input_gradients(self.switch.model)
            self.switch.settle()

    def step_begin(self, global_step: int) -> None:
        """Switch when the schedule says so."""
        if self.schedule is not None and self.switch is not None:
            self.switch.activate(self.schedule.active_at(global_step))

    def train_end(self) -> None:
        """Make every candidate trainable again, put the hooks back, remove files."""
        self._restore_hooks()
        if self.switch is not None:
            self.switch.release()

    def _restore_hooks(self) -> None:
        if self._resume_hooks is not None:
            self._resume_hooks()
        self._resume_hooks = None

    def step_flops(self, facts: ModelFacts, shapes: Sequence[BatchShape], global_step: int) -> float:
        """FLOPs with the blocks that are active in that step; the depth of the lowest decides the backward."""
        if self.schedule is None or self.switch is None:
            return super().step_flops(facts, shapes, global_step)
        from hf_eff.engines.facts import trainable_facts

        active = self.schedule.active_at(global_step)
        if active not in self._trainable:
            self._trainable[active] = trainable_facts(self.switch.model, self.switch.active_names(active))
        return sum(training_flops(facts, shape, self._trainable[active]) for shape in shapes)

    def state_dict(self) -> dict[str, Any]:
        """Schedule, partition, active blocks, and state that the optimizer does not hold because it was moved away."""
        if self.schedule is None or self.switch is None:
            return {}
        return {
            "schedule": self.schedule.to_dict(),
            "partition": self.switch.partition.fingerprint,
            "active": None if self.switch.active is None else list(self.switch.active),
            "held": self.switch.resting_with_state(),
            **self.switch.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], global_step: int) -> None:
        """Activate the blocks that were active at the save, so that their optimizer state finds its owner.

        Raises:
            CheckpointError: The checkpoint has other blocks or another schedule.
        """
        if not state or self.schedule is None or self.switch is None:
            return
        if state["partition"] != self.switch.partition.fingerprint:
            raise CheckpointError(
                "the checkpoint was trained with other blocks; resume with the same model, trainable parameters and "
                f"options of memory={self.name!r}."
            )
        saved, planned = BlockSchedule(**state["schedule"]), self.schedule
        if self.config.schedule_is_open:
            planned = dataclasses.replace(planned, switch_every=saved.switch_every)
        if saved != planned:
            raise CheckpointError(f"the checkpoint was trained with {saved}, this run has {planned}; use its options.")
        self.schedule = saved
        if state["active"] is not None:
            self.switch.activate(tuple(state["active"]))
        self.switch.expect(state.get("held", ()))
        self.switch.load_state_dict({key: value for key, value in state.items() if key not in _OWN_STATE})

    def log_entries(self) -> Mapping[str, float]:
        """Index of the active block, the lowest where there are several."""
        active = None if self.switch is None else self.switch.active
        return {"block": float(active[0])} if active else {}


_OWN_STATE = ("schedule", "partition", "active", "held")


def _require_blocks(schedule: BlockSchedule) -> None:
    blocks = schedule.num_blocks
    if schedule.start is not None and schedule.start >= blocks:
        raise PlanError(f"start_block={schedule.start} does not exist; there are {blocks} blocks, from 0.")
    if schedule.num_active > blocks:
        raise PlanError(f"active_layers={schedule.num_active} is more than the {blocks} layers there are.")


def _require_whole_state(config: BlockwiseConfig, facts: Facts) -> None:
    moves = config.state_policy == "disk" or (config.state_policy == "offload" and facts.hardware.device != "cpu")
    if moves and facts.hardware.backend == "fsdp2":
        raise PlanError(
            f"state_policy={config.state_policy!r} moves whole tensors, and FSDP2 shards them over processes; set "
            "state_policy='keep' or 'reset'."
        )


def _warn_of_unvisited(name: str, schedule: BlockSchedule, total_steps: int) -> None:
    blocks, cycle = schedule.num_blocks, schedule.cycle_steps
    if schedule.mode == "fixed" or total_steps <= 0:
        return
    visited, drawn = schedule.visited(total_steps), schedule.mode == "sample"
    if len(visited) == blocks and (drawn or total_steps >= cycle):
        return
    never = sorted(set(range(blocks)) - visited)
    left = f"{block_list(never)} never train{'s' if len(never) == 1 else ''}" if never else "the last one is cut short"
    fits = f"set switch_every to at most {max(1, total_steps // blocks)}"
    remedy = "a smaller switch_every or more active_layers reach more" if drawn else fits
    remedy = f"; {remedy}" if drawn or schedule.switch_every > 1 else ""
    warnings.warn(
        OutsideIntendedUseWarning(
            f"memory={name!r} visits {len(visited)} of {blocks} blocks in {total_steps} steps; {left}. "
            f"One cycle takes {cycle} steps{remedy}."
        ),
        stacklevel=3,
    )


def _report_frozen(name: str, model: nn.Module, partition: Partition) -> None:
    """Say what never trains; louder where a task head may be among it."""
    if not partition.frozen:
        return
    ask = getattr(model, "get_output_embeddings", None)
    level = logging.INFO if callable(ask) and ask() is not None else logging.WARNING
    frozen = ", ".join(partition.frozen)
    _logger.log(level, "memory=%r never trains %s (see always_active, include_head)", name, frozen)


# -- cost -----------------------------------------------------------------------------------------------------------


def blockwise_cost(config: BlockwiseConfig, facts: Facts) -> Cost:
    """Peak bytes of the costliest step, and FLOPs averaged over the blocks that a run visits.

    Raises:
        PlanError: The model has no layers.
    """
    layout = config.layout()
    parts, always = trainable_blocks(facts.model, layout), always_trains(facts.model, layout)
    if not parts:
        raise PlanError(f"{facts.model.architecture} has no layers to train block by block; use memory='lora'.")
    constant = [always] if always is not None else []
    schedule = config.schedule(len(parts), max(0, facts.run.max_steps), seed=0)
    _require_blocks(schedule)
    _require_whole_state(config, facts)
    weighted = _visits(schedule, parts, facts.run.max_steps)
    flops = sum(weight * planned_step_flops(facts, joined([part, *constant])) for weight, part in weighted)
    costs = [_memory(config, facts, [*active, *constant], parts) for active in _heaviest(schedule, parts)]
    return dataclasses.replace(
        max(costs, key=lambda cost: cost.peak_bytes), step_flops=flops / sum(weight for weight, _ in weighted)
    )


def _visits(
    schedule: BlockSchedule, parts: Sequence[TrainableFacts], max_steps: int
) -> list[tuple[int, TrainableFacts]]:
    """Parts that train in turn, with weights that are proportional to their steps."""
    if schedule.mode == "sample":
        return expected_draws(parts, schedule.num_active)
    # The seed of a random order is not among the facts: the mean over a cycle is its expectation.
    is_cut = 0 < max_steps < schedule.cycle_steps and schedule.mode not in ("random", "shuffled")
    steps = range(max_steps) if is_cut else range(0, schedule.cycle_steps, schedule.switch_every)
    counts = Counter(index for step in steps for index in schedule.active_at(step))
    return [(count, parts[index]) for index, count in counts.items()]


def _heaviest(schedule: BlockSchedule, parts: Sequence[TrainableFacts]) -> list[Sequence[TrainableFacts]]:
    """Sets of blocks among which the one that takes most memory is: every block, or the lowest and the largest."""
    if schedule.num_active == 1:
        return [[part] for part in parts]
    largest = sorted(parts, key=lambda part: -part.params)
    return [parts[: schedule.num_active], largest[: schedule.num_active]]


def _memory(
    config: BlockwiseConfig, facts: Facts, active: Sequence[TrainableFacts], blocks: Sequence[TrainableFacts]
) -> Cost:
    """Bytes while ``active`` trains, with the state of all ``blocks`` where the policy puts it."""
    on_host = config.state_policy == "offload" and facts.hardware.device != "cpu"
    stays = config.state_policy in ("keep", "offload") and not on_host
    away, always = _state_bytes(config, facts, blocks), [part for part in active if part not in blocks]
    held = away + _state_bytes(config, facts, always) if stays else _state_bytes(config, facts, active)
    whole = joined(active)
    return Cost(
        bytes=training_bytes(facts, whole, optimizer_bytes=held, master_weights=config.master_weights),
        host_bytes=host_bytes(facts, whole) + (away if on_host else 0.0),
        disk_bytes=away if config.state_policy == "disk" else 0.0,
    )


def _state_bytes(config: BlockwiseConfig, facts: Facts, parts: Sequence[TrainableFacts]) -> float:
    """State of parts. That of 16-bit weights is kept in fp32, with a copy of the weights or without."""
    if not parts:
        return 0.0
    whole = joined(parts)
    rounds = not config.master_weights and facts.model.param_bytes < _FLOAT_BYTES
    copies = _FLOAT_BYTES * whole.params if rounds else 0.0
    return training_bytes(facts, whole, master_weights=True)["optimizer"] - copies
