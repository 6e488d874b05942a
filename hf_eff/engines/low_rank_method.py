"""What GaLore and APOLLO share as memory methods: a low-rank optimizer, stepped after the backward or inside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from hf_eff.contracts.cost import Cost, Facts, ModelFacts
from hf_eff.contracts.memory import BatchShape, MemoryMethod, OptimizerContext, StepContext
from hf_eff.errors import PlanError
from hf_eff.numerics.flops import everything_trains
from hf_eff.numerics.layer_shapes import largest_tensor, projected_shapes
from hf_eff.numerics.memory_terms import training_bytes
from hf_eff.numerics.subspace_shapes import Projection, projected_side, state_entries

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hf_eff.engines.backward_update import BackwardUpdate
    from hf_eff.engines.low_rank_optimizer import LowRankOptimizer

STATE_BYTES = 4.0
ADAM_BYTES = 8.0


class LowRankMethod(MemoryMethod):
    """Makes the optimizer and, layerwise, runs it inside the backward.

    Args:
        make: Builds the optimizer.
        layerwise: Update each parameter as soon as its gradient is complete, and free that.
    """

    def __init__(self, make: Callable[[OptimizerContext], LowRankOptimizer], *, layerwise: bool) -> None:
        self._make = make
        self._layerwise = layerwise
        self.optimizer: LowRankOptimizer | None = None
        self.backward: BackwardUpdate | None = None

    def create_optimizer(self, context: OptimizerContext) -> torch.optim.Optimizer:
        """The low-rank optimizer over all candidates.

        Raises:
            PlanError: There is nothing to project, or clipping meets updates inside the backward.
        """
        self.optimizer = self._make(context)
        if self._layerwise:
            from hf_eff.engines.backward_update import BackwardUpdate

            self.backward = BackwardUpdate(self.optimizer)
        return self.optimizer

    def train_begin(self, model: nn.Module, global_step: int) -> None:
        """Register the hooks of a layerwise run on the parameters as they are now."""
        if self.backward is not None:
            self.backward.attach()

    def step_begin(self, global_step: int) -> None:
        """Name the random bits of this step."""
        if self.optimizer is not None:
            self.optimizer.clock = global_step

    def training_step(self, context: StepContext) -> torch.Tensor:
        """The stock step, with the updates inside its backward in a layerwise run."""
        return super().training_step(context) if self.backward is None else self.backward.run(context)

    def grad_norm(self) -> float | None:
        """Layerwise: the norm of all gradients, taken one by one; else None."""
        return None if self.backward is None else self.backward.norm

    def train_end(self) -> None:
        """Remove the hooks."""
        if self.backward is not None:
            self.backward.detach()

    def step_flops(self, facts: ModelFacts, shapes: Sequence[BatchShape], global_step: int) -> float:
        """Forward, backward and the projections."""
        projections = 0.0 if self.optimizer is None else self.optimizer.flops(global_step)
        return super().step_flops(facts, shapes, global_step) + projections

    def log_entries(self) -> Mapping[str, float]:
        """Layerwise: updates left out because their gradient was not finite."""
        return {} if self.backward is None else {"skipped_updates": float(self.backward.skipped)}


def require_usable(facts: Facts, address: str, *, layerwise: bool) -> None:
    """Refuse facts of a run that the method cannot work on.

    Raises:
        PlanError: Adapters train, or a layerwise run meets clipping, accumulation, loss scaling or DDP.
    """
    if facts.model.is_peft:
        raise PlanError(
            f"{address} projects whole weight matrices, and adapters have few dimensions already; train them with "
            "memory='lora' alone."
        )
    if not layerwise:
        return
    run, advice = facts.run, "or layerwise=False"
    problems = (
        (run.max_grad_norm > 0, f"cannot clip by max_grad_norm={run.max_grad_norm:g}; set max_grad_norm=0"),
        (run.accumulation > 1, "cannot accumulate gradients; set gradient_accumulation_steps=1"),
        (run.fp16, "does not work with fp16 loss scaling; use bf16=True"),
        (facts.hardware.backend == "ddp", "does not average gradients over processes; use one process"),
    )
    for applies, sentence in problems:
        if applies:
            raise PlanError(f"{address} with layerwise=True updates inside the backward and {sentence}, {advice}.")


def low_rank_cost(
    facts: Facts,
    *,
    rank: int,
    projection: Projection,
    target_modules: Sequence[str],
    stores_basis: bool,
    layerwise: bool,
    step_flops: Callable[[tuple[int, int]], float],
) -> Cost:
    """Bytes of moments in the subspace for the layers' matrices and of plain AdamW for the rest.

    Args:
        facts: Model, run and pool.
        rank: Dimensions that are kept.
        projection: Which side is replaced.
        target_modules: Modules whose weights are projected; empty for every linear one in the layers.
        stores_basis: Whether the projection is kept, or drawn again.
        layerwise: Whether gradients are freed one by one.
        step_flops: Mean FLOPs a step for the projections of one matrix.
    """
    from hf_eff.numerics.planned_step import planned_step_flops

    model = facts.model
    part = model.trainable or everything_trains(model)
    shapes = projected_shapes(model, part, target_modules)
    if not shapes:
        raise PlanError(f"{model.architecture} has no layers whose matrices could be projected; use memory='full'.")
    projected = sum(rows * columns for rows, columns in shapes)
    kept = sum(
        state_entries(shape, rank, projected_side(shape, projection), stores_basis=stores_basis) for shape in shapes
    )
    frees = layerwise and facts.run.row_chunks <= 1
    largest = largest_tensor(model, part)
    copies = (model.param_bytes if frees else 0.0) + (2 * STATE_BYTES if model.param_bytes < STATE_BYTES else 0.0)
    terms = training_bytes(
        facts,
        gradient_params=0 if frees else None,
        optimizer_params=0,
        transient_bytes=copies * largest,
    )
    terms["optimizer"] = STATE_BYTES * kept + ADAM_BYTES * max(0.0, part.params - projected)
    flops = planned_step_flops(facts) + sum(map(step_flops, shapes))
    return Cost(step_flops=flops, bytes=terms)
