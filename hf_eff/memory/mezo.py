"""mezo: zeroth-order SGD by two forwards a step; no backward, no gradients, no optimizer state.

Idea
    Draw a random direction z, look at the loss on both sides, move along z (SPSA, Definition 1):

        c = (L(w + eps z) - L(w - eps z)) / (2 eps),        w <- w - lr (c z + decay w)

    z is never stored: it is drawn again, parameter by parameter, from (seed, step, name). The perturbed
    weights exist only while the module that holds them runs; the stored ones are not touched by a probe.

Cost      P parameters, w bytes per weight, V vocabulary, h hidden size, n directions, m micro-batches
    weights      w P bytes
    gradients    none
    optimizer    none (a replay log of about a hundred bytes a step)
    activations  none; the peak above inference is one copy of the output head (w V h), one of the
                 largest other layer at work, and 11 MiB for random numbers
    step         2 n m forwards and 2 n m + n passes of random numbers over the weights

Use when   only inference fits, or the loss has no gradient; with adapters, whose few parameters
           make the estimate less noisy.
Avoid when backpropagation fits: MeZO needs 10 to 100 times as many steps. The learning rate has to be
           small, about 1e-7 to 1e-6 for all weights and 1e-5 to 1e-4 for adapters.
Differs    from the paper's Algorithm 1: weights are not perturbed and restored in place (which drifts by 4%
           in 100 steps of bf16), so a bf16 run is possible; one direction serves the whole accumulation window;
           bf16 updates are rounded stochastically; c is taken from losses averaged over processes; the loss
           reported is (L+ + L-) / 2. The official code reports L+ and refuses accumulation.

Paper      Fine-Tuning Language Models with Just Forward Passes (2023), arXiv:2305.17333
Code       princeton-nlp/MeZO, MIT; its in-place loop is timed beside ours in benchmarks/zeroth_order.py
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from hf_eff.contracts.cost import Cost, Facts, ModelFacts
from hf_eff.contracts.memory import BatchShape, MemoryMethod, OptimizerContext, StepContext
from hf_eff.contracts.spec import MethodConfig, MethodSpec, Paper, Traits, knob
from hf_eff.errors import EffError, OptionError
from hf_eff.numerics.flops import everything_trains, forward_flops
from hf_eff.numerics.memory_terms import training_bytes
from hf_eff.numerics.planned_step import planned_shape

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hf_eff.engines.ephemeral import EphemeralWeights
    from hf_eff.engines.zeroth_order_optimizer import ZerothOrderOptimizer

_SCRATCH_BYTES = 11 * 2**20


@dataclass(frozen=True, kw_only=True)
class MeZOConfig(MethodConfig):
    """Options of ``memory="mezo"``."""

    eps: float = knob(1e-3, "Length of the perturbation along z.", low=1e-8, high=1.0, paper="1e-3; 1e-2 with LoRA")
    distribution: Literal["gaussian", "rademacher"] = knob(
        "gaussian",
        "Entries of z: standard normal, or +1 and -1 (also unbiased, and cheaper to draw on a CPU).",
        choices=("gaussian", "rademacher"),
        paper="gaussian",
    )
    num_directions: int = knob(1, "Directions averaged in a step (n-SPSA); each costs two forwards.", low=1, paper="1")
    clip: float | None = knob(None, "Bound on |c|; None for none. max_grad_norm is not applied.", low=0, paper="none")
    eps_check_every: int = knob(
        0,
        "Every so many steps probe again with eps/2 and warn when the two c differ by half; 0 for never.",
        low=0,
        unit="steps",
    )

    def __post_init__(self) -> None:
        """Check what bounds cannot say.

        Raises:
            OptionError: ``clip`` is zero, which would freeze the model.
        """
        super().__post_init__()
        if self.clip == 0:
            raise OptionError(f"{self._address('clip')} must be above 0 or None, got 0.")


class MeZO(MemoryMethod):
    """Probes in ``training_step``, moves the weights in the optimizer's ``step``.

    Args:
        config: Options.
    """

    def __init__(self, config: MeZOConfig) -> None:
        self.config = config
        self.optimizer: ZerothOrderOptimizer | None = None
        self._weights: EphemeralWeights | None = None
        self._window: tuple[int, torch.Tensor | None] = (-1, None)
        self._coefficients: list[float] = []

    def create_optimizer(self, context: OptimizerContext) -> torch.optim.Optimizer:
        """Group the candidates by weight decay; nothing is stored for them."""
        from hf_eff.engines.directions import FAMILIES
        from hf_eff.engines.zeroth_order_optimizer import make_optimizer

        family = FAMILIES[self.config.distribution](context.seed)
        self.optimizer = make_optimizer(context, family, self.config.eps)
        self._weights = None
        return self.optimizer

    def step_begin(self, global_step: int) -> None:
        """Forget an unfinished window."""
        self._window = (global_step, None)

    def training_step(self, context: StepContext) -> torch.Tensor:
        """Probe all directions of the step on one micro-batch; after the last one, set what the optimizer applies.

        The loss at w + eps z and w - eps z is summed over micro-batches and averaged over ranks before c is taken.
        """
        from hf_eff.engines.forward_only import forward_only

        with forward_only(context.unwrapped):
            losses = self._probe(context)
        step, earlier = self._window
        total = losses if earlier is None or step != context.global_step else earlier + losses
        self._window = (context.global_step, total)
        if context.micro_step == context.micro_steps - 1:
            self._finish(context.global_step, context.mean_over_ranks(total))
        return losses.mean().float()

    def _probe(self, context: StepContext) -> torch.Tensor:
        """[n, 2] losses above and below along each direction."""
        import torch

        from hf_eff.engines.eps_check import warn_if_apart
        from hf_eff.engines.zeroth_order import probe

        def loss() -> torch.Tensor:
            return context.loss(context.unwrapped, copy.copy(context.inputs), context.num_items)

        weights, family = self._weights_of(context.unwrapped), self._optimizer().family
        look = partial(probe, weights, family, loss, step=context.global_step, noise=context.micro_step)
        eps, directions = self.config.eps, range(self.config.num_directions)
        losses = torch.stack([look(eps=eps, draw=draw) for draw in directions])
        if context.micro_step == 0 and self._checks_eps(context.global_step):
            warn_if_apart(losses[0], look(eps=eps / 2), eps)
        return losses

    def _finish(self, step: int, losses: torch.Tensor) -> None:
        """Turn the losses of the whole window into coefficients."""
        above, below = losses.T
        self._coefficients = ((above - below) / (2 * self.config.eps)).tolist()
        self._optimizer().stage(step, self._coefficients, clip=self.config.clip)

    def grad_norm(self) -> float | None:
        """Mean of |c| over the directions, before clipping."""
        if not self._coefficients:
            return None
        return math.fsum(map(abs, self._coefficients)) / len(self._coefficients)

    def train_end(self) -> None:
        """Let go of the model."""
        self._weights = None
        self._window = (-1, None)

    def step_flops(self, facts: ModelFacts, shapes: Sequence[BatchShape], global_step: int) -> float:
        """Two forwards a direction and micro-batch, and two more where eps is checked."""
        flops = 2.0 * self.config.num_directions * sum(forward_flops(facts, shape) for shape in shapes)
        if shapes and self._checks_eps(global_step):
            flops += 2.0 * forward_flops(facts, shapes[0])
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
        log.header.require_same(optimizer.log.header, "resume the run with memory='mezo'")
        log.truncate(global_step)
        optimizer.log = log

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
            raise EffError("memory='mezo' has no optimizer yet; call create_optimizer first.")
        return self.optimizer

    def _weights_of(self, model: nn.Module) -> EphemeralWeights:
        """The parameters as they are now: a wrapper may have replaced the ones the optimizer was made with."""
        from hf_eff.engines.ephemeral import EphemeralWeights, unique_parameters

        if self._weights is None:
            self._weights = EphemeralWeights(model, unique_parameters(model, self._optimizer().names))
        return self._weights


def cost(config: MeZOConfig, facts: Facts) -> Cost:
    """Forwards, and the bytes of inference with copies of the output head and of the largest layer at work."""
    checks = 2.0 / (config.eps_check_every * facts.run.accumulation) if config.eps_check_every else 0.0
    forwards = facts.run.accumulation * (2.0 * config.num_directions + checks)
    terms = training_bytes(
        facts,
        gradient_params=0,
        optimizer_params=0,
        saves_activations=False,
        transient_bytes=_transient_bytes(facts.model),
    )
    return Cost(step_flops=forwards * forward_flops(facts.model, planned_shape(facts)), bytes=terms)


def _transient_bytes(model: ModelFacts) -> float:
    """Copies of what is perturbed at one time, or of one bf16 parameter in fp32 during its update."""
    part = model.trainable or everything_trains(model)
    head = max(part.head_matmul_params, model.embedding_params if part.lowest_block < 0 else 0)
    layer = model.hidden_size * max(model.intermediate_size, model.hidden_size)
    trained = float(part.params)
    probe = model.param_bytes * min(trained, head + layer)
    widened = 4.0 * min(trained, max(head, layer)) if model.param_bytes < 4 else 0.0
    return max(probe, widened) + _SCRATCH_BYTES


SPEC = MethodSpec(
    name="mezo",
    kind="memory",
    slot="update",
    summary="Zeroth-order SGD by two forwards a step; no backward, no gradients, no optimizer state.",
    config=MeZOConfig,
    build=MeZO,
    cost=cost,
    paper=Paper(title="Fine-Tuning Language Models with Just Forward Passes", year=2023, arxiv="2305.17333"),
    traits=Traits(
        deterministic=False,
        needs_backward=False,
        owns_backward=True,
        owns_optimizer=True,
        stateless_optimizer=True,
        fp16=False,
        streaming=True,
        dropout_off=True,
        max_grad_norm=False,
    ),
)
