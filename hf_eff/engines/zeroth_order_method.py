"""What zeroth-order methods share: options, probes of a window, the replay log, resume, and cost.

A method adds its directions (``family``) and, where one step is not the mean of c z, its update (``rule``).
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from hf_eff.contracts.cost import Cost, Facts, ModelFacts, TrainableFacts
from hf_eff.contracts.memory import BatchShape, MemoryMethod, OptimizerContext, StepContext
from hf_eff.contracts.spec import MethodConfig, Traits, knob
from hf_eff.errors import EffError, OptionError
from hf_eff.numerics.flops import everything_trains, forward_flops
from hf_eff.numerics.layer_shapes import projected_shapes
from hf_eff.numerics.memory_terms import training_bytes
from hf_eff.numerics.planned_step import planned_shape

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hf_eff.engines.directions import DirectionFamily
    from hf_eff.engines.ephemeral import EphemeralWeights
    from hf_eff.engines.sharded_weights import ShardedWeights
    from hf_eff.engines.update_rules import UpdateRule
    from hf_eff.engines.zeroth_order_optimizer import ZerothOrderOptimizer

SCRATCH_BYTES = 6 * 2**20
"""Random numbers of one piece, while they are drawn."""

CLIP_WINDOW = 64
"""Steps whose median |c| bounds the next one."""

TRAITS = Traits(
    fsdp2=True,
    deterministic=False,
    needs_backward=False,
    owns_backward=True,
    owns_optimizer=True,
    stateless_optimizer=True,
    fp16=False,
    streaming=True,
    dropout_off=True,
    max_grad_norm=False,
)
"""What every zeroth-order method needs and works with."""


@dataclass(frozen=True, kw_only=True)
class ZerothOrderConfig(MethodConfig):
    """Options that every zeroth-order method has."""

    eps: float = knob(1e-3, "Length of the perturbation along z.", low=1e-8, high=1.0, paper="1e-3; 1e-2 with LoRA")
    num_directions: int = knob(1, "Directions averaged in a step (n-SPSA); each costs two forwards.", low=1, paper="1")
    clip: float | None = knob(None, "Bound on |c|; None for none. max_grad_norm is not applied.", low=0, paper="none")
    clip_factor: float | None = knob(
        None, "Bound on |c| as a multiple of the median |c| of the last 64 steps; None for none.", low=1, paper="none"
    )
    one_sided: bool = knob(
        False,
        "Compare w + eps z with w itself, whose loss serves all directions: n + 1 forwards instead of 2n, and an "
        "error in proportion to eps instead of its square.",
        paper="no",
    )
    eps_check_every: int = knob(
        0,
        "Every so many steps probe again with eps/2 and warn when the two c differ by half; 0 for never.",
        low=0,
        unit="steps",
    )
    save: Literal["weights", "log"] = knob(
        "weights",
        "What checkpoints hold: the weights, or only the log from which resuming rebuilds them, which takes the time "
        "of drawing every step's directions again.",
        choices=("weights", "log"),
    )

    def __post_init__(self) -> None:
        """Check what bounds cannot say.

        Raises:
            OptionError: ``clip`` is zero, which would freeze the model.
        """
        super().__post_init__()
        if self.clip == 0:
            raise OptionError(f"{self._address('clip')} must be above 0 or None, got 0.")

    @property
    def forwards(self) -> int:
        """Forwards of a step and micro-batch."""
        return self.num_directions + 1 if self.one_sided else 2 * self.num_directions

    @property
    def check_forwards(self) -> int:
        """Forwards that one check of eps adds."""
        return 1 if self.one_sided else 2


class ZerothOrder(MemoryMethod):
    """Probes in ``training_step``, moves the weights in the optimizer's ``step``.

    Args:
        config: Options.
    """

    name: str
    """What the user typed."""

    def __init__(self, config: Any) -> None:
        self.config: ZerothOrderConfig = config
        self.optimizer: ZerothOrderOptimizer | None = None
        self._weights: EphemeralWeights | ShardedWeights | None = None
        self._regather: torch.utils.hooks.RemovableHandle | None = None
        self._window: tuple[int, torch.Tensor | None] = (-1, None)
        self._coefficients: list[float] = []

    def family(self, context: OptimizerContext) -> DirectionFamily:
        """The directions of a run."""
        raise NotImplementedError

    def rule(self) -> UpdateRule | None:
        """How coefficients move the weights; None for their mean."""
        return None

    def loss(self, context: StepContext) -> torch.Tensor:
        """Scalar that is compared on both sides of a direction; called without gradients, in evaluation mode."""
        return context.loss(context.unwrapped, copy.copy(context.inputs), context.num_items)

    def create_optimizer(self, context: OptimizerContext) -> torch.optim.Optimizer:
        """Group the candidates by weight decay."""
        from hf_eff.engines.zeroth_order_optimizer import make_optimizer

        self.optimizer = make_optimizer(context, self.family(context), self.config.eps, self.rule())
        self._weights = None
        return self.optimizer

    def train_begin(self, model: nn.Module, global_step: int) -> None:
        """Have sharded parameters gathered anew after each update."""
        from hf_eff.engines.sharded_weights import gather_again, is_sharded

        if self.optimizer is not None and is_sharded(model):
            self._regather = self.optimizer.register_step_post_hook(lambda *_: gather_again(model))

    def step_begin(self, global_step: int) -> None:
        """Forget an unfinished window."""
        self._window = (global_step, None)

    def training_step(self, context: StepContext) -> torch.Tensor:
        """Probe all directions of the step on one micro-batch; after the last one, set what the optimizer applies.

        The losses that are compared are summed over micro-batches and averaged over ranks before c is taken.
        """
        from hf_eff.engines.forward_only import forward_only
        from hf_eff.engines.packed_weights import never_packed

        with forward_only(context.unwrapped), never_packed(context.unwrapped):
            losses = self._probe(context)
        step, earlier = self._window
        total = losses if earlier is None or step != context.global_step else earlier + losses
        self._window = (context.global_step, total)
        if context.micro_step == context.micro_steps - 1:
            self._finish(context.global_step, context.mean_over_ranks(total))
        return (losses[:, 1] if self.config.one_sided else losses).mean().float()

    def _probe(self, context: StepContext) -> torch.Tensor:
        """[n, 2] losses above and below along each direction; one-sided, above and at the weights themselves."""
        import torch

        from hf_eff.engines.eps_check import warn_if_apart
        from hf_eff.engines.zeroth_order import loss_along

        weights, eps = self._weights_of(context.unwrapped), self.config.eps
        weights.holds = context.holds_weights
        loss = partial(self.loss, context)
        at = partial(
            loss_along, weights, self._optimizer().family, loss, step=context.global_step, noise=context.micro_step
        )
        centre = at(0.0) if self.config.one_sided else None

        def look(length: float, draw: int = 0) -> torch.Tensor:
            return torch.stack([at(length, draw=draw), at(-length, draw=draw) if centre is None else centre])

        losses = torch.stack([look(eps, draw) for draw in range(self.config.num_directions)])
        if context.micro_step == 0 and self._checks_eps(context.global_step):
            warn_if_apart(losses[0], look(eps / 2), eps, one_sided=self.config.one_sided)
        return losses

    def _finish(self, step: int, losses: torch.Tensor) -> None:
        """Turn the losses of the whole window into coefficients."""
        above, below = losses.T
        apart = self.config.eps if self.config.one_sided else 2 * self.config.eps
        self._coefficients = ((above - below) / apart).tolist()
        self._optimizer().stage(step, self._coefficients, clip=self._bound())

    def _bound(self) -> float | None:
        """What |c| may reach at this step."""
        found = [] if self.config.clip is None else [self.config.clip]
        typical = self._optimizer().log.median_coefficient(CLIP_WINDOW) if self.config.clip_factor else None
        if typical and self.config.clip_factor:
            found.append(self.config.clip_factor * typical)
        return min(found, default=None)

    def grad_norm(self) -> float | None:
        """Mean of |c| over the directions, before clipping."""
        if not self._coefficients:
            return None
        return math.fsum(map(abs, self._coefficients)) / len(self._coefficients)

    def train_end(self) -> None:
        """Let go of the model."""
        self._weights = None
        self._window = (-1, None)
        if self._regather is not None:
            self._regather.remove()
            self._regather = None

    def step_flops(self, facts: ModelFacts, shapes: Sequence[BatchShape], global_step: int) -> float:
        """All forwards of the directions, and those of the check of eps where there is one."""
        flops = float(self.config.forwards) * sum(forward_flops(facts, shape) for shape in shapes)
        if shapes and self._checks_eps(global_step):
            flops += self.config.check_forwards * forward_flops(facts, shapes[0])
        return flops

    def state_dict(self) -> dict[str, Any]:
        """The replay log."""
        return {} if self.optimizer is None else {"log": self.optimizer.log.to_dict()}

    def load_state_dict(self, state: Mapping[str, Any], global_step: int) -> None:
        """Continue the replay log at ``global_step``; later records are dropped.

        Raises:
            CheckpointError: The log is damaged, or of a run with other options, seed or parameters.
        """
        from hf_eff.engines.replay_log import ReplayLog

        if not state:
            return
        optimizer = self._optimizer()
        log = ReplayLog.from_dict(state["log"])
        log.header.require_same(optimizer.log.header, f"resume the run with memory='{self.name}'")
        log.truncate(global_step)
        optimizer.resume(log)

    def save_log(self, path: str | os.PathLike[str]) -> None:
        """Write the replay log as JSON lines, atomically; ``engines.replay.replay`` rebuilds the weights from it."""
        self._optimizer().log.save(path)

    def log_entries(self) -> Mapping[str, float]:
        """The mean projected gradient with its sign, eps, and the steps skipped so far."""
        if not self._coefficients or self.optimizer is None:
            return {}
        skipped = sum(record.skipped for record in self.optimizer.log.records)
        mean = math.fsum(self._coefficients) / len(self._coefficients)
        return {"projected_grad": mean, "eps": self.config.eps, "skipped_steps": float(skipped)}

    def _checks_eps(self, step: int) -> bool:
        return self.config.eps_check_every > 0 and step % self.config.eps_check_every == 0

    def _optimizer(self) -> ZerothOrderOptimizer:
        if self.optimizer is None:
            raise EffError(f"memory='{self.name}' has no optimizer yet; call create_optimizer first.")
        return self.optimizer

    def _weights_of(self, model: nn.Module) -> EphemeralWeights | ShardedWeights:
        """The parameters as they are now: a wrapper may have replaced the ones the optimizer was made with."""
        from hf_eff.engines.ephemeral import EphemeralWeights, unique_parameters
        from hf_eff.engines.sharded_weights import ShardedWeights, gather_again, is_sharded, shards_of

        if self._weights is None:
            optimizer = self._optimizer()
            gather_again(model)
            parameters = unique_parameters(model, optimizer.names)
            optimizer.family.shards.update(shards_of(parameters))
            kind = ShardedWeights if is_sharded(model) else EphemeralWeights
            self._weights = kind(model, parameters)
        return self._weights


def zeroth_order_cost(config: ZerothOrderConfig, facts: Facts, held_bytes: float = 0.0) -> Cost:
    """Forwards, and the bytes of inference with copies of the output head and of the largest layer at work.

    Args:
        config: Options.
        facts: Model and run.
        held_bytes: What the directions keep from step to step.
    """
    checks = config.check_forwards / config.eps_check_every if config.eps_check_every else 0.0
    forwards = facts.run.accumulation * config.forwards + checks
    terms = training_bytes(
        facts,
        gradient_params=0,
        optimizer_params=0,
        saves_activations=False,
        transient_bytes=_transient_bytes(facts.model) + held_bytes,
    )
    return Cost(step_flops=forwards * forward_flops(facts.model, planned_shape(facts)), bytes=terms)


def matrix_shapes(model: ModelFacts, part: TrainableFacts) -> list[tuple[int, int]]:
    """[rows, all other entries] of every trained tensor of two or more dimensions, one entry a tensor.

    Args:
        model: Shapes of the model.
        part: What trains; where its tensors are not known, those of the layers and one table are taken.
    """
    if part.tensors:
        shapes = [(each.shape, max(1, len(each.blocks))) for each in part.tensors if len(each.shape) > 1]
        return [(shape[0], math.prod(shape[1:])) for shape, count in shapes for _ in range(count)]
    table = [(model.vocab_size, model.hidden_size)] if part.lowest_block < 0 else []
    return table + projected_shapes(model, part)


def _transient_bytes(model: ModelFacts) -> float:
    """Copies of what is perturbed at one time, or of one bf16 parameter in fp32 during its update."""
    part = model.trainable or everything_trains(model)
    head = max(part.head_matmul_params, model.embedding_params if part.lowest_block < 0 else 0)
    layer = model.hidden_size * max(model.intermediate_size, model.hidden_size)
    trained = float(part.params)
    probe = model.param_bytes * min(trained, head + layer)
    widened = 4.0 * min(trained, max(head, layer)) if model.param_bytes < 4 else 0.0
    return max(probe, widened) + SCRATCH_BYTES
