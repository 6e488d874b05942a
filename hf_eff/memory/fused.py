"""fused: the update runs inside the backward, so that one gradient exists at a time and SGD keeps no state.

Idea
    A weight's gradient is complete long before the backward ends. A hook uses it at once and frees it:

        g_i complete   ->   w_i <- w_i - lr g_i   ->   g_i freed

    As the update of one weight needs no other weight's gradient, this is SGD to the last bit. Clipping by the
    norm of all gradients needs them first: the backward then runs twice, to measure and to update.

Cost      P parameters, w bytes per weight, P_max entries of the largest tensor
    weights    w P bytes
    gradients  none that stays; w P_max for a moment
    optimizer  none with SGD and sign SGD, 8 P with AdamW
    step       forward and backward; a second backward with clip='two_backwards' and max_grad_norm > 0

Use when   all weights shall move and gradients with optimizer state do not fit.
Avoid when Adam's step sizes matter (rule='adamw' keeps its state, 8 bytes a weight), with accumulation or DDP.
Differs    from LOMO's code: learning rate and weight decay are read from the groups, so schedules work; clipping
           and accumulation are refused where they would be ignored; bf16 weights are rounded stochastically;
           the norm of the gradient is reported; no scan over all parameters in every hook.

Paper      Full Parameter Fine-tuning for Large Language Models with Limited Resources (2023), arXiv:2306.09782
Code       OpenLMLab/LOMO, MIT; compared by running the package lomo-optim
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hf_eff.contracts.cost import Cost, Facts, ModelFacts
from hf_eff.contracts.memory import BatchShape, MemoryMethod, OptimizerContext, StepContext
from hf_eff.contracts.spec import MethodConfig, MethodSpec, Paper, Traits, knob
from hf_eff.errors import OptionError, PlanError
from hf_eff.numerics.flops import backward_flops, everything_trains
from hf_eff.numerics.layer_shapes import largest_tensor
from hf_eff.numerics.memory_terms import training_bytes
from hf_eff.numerics.planned_step import planned_shape, planned_step_flops

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hf_eff.engines.backward_update import BackwardUpdate

_ADAM_BYTES = 8.0


@dataclass(frozen=True, kw_only=True)
class FusedConfig(MethodConfig):
    """Options of ``memory="fused"``."""

    rule: Literal["sgd", "signsgd", "adamw"] = knob(
        "sgd",
        "Update: SGD without momentum, the sign of the gradient, or AdamW (which keeps its state, and no gradients).",
        choices=("sgd", "signsgd", "adamw"),
        paper="sgd",
    )
    clip: Literal["value", "two_backwards"] | None = knob(
        None,
        "'two_backwards' applies max_grad_norm exactly, with a second backward; 'value' bounds each entry by "
        "clip_value instead; None needs max_grad_norm=0.",
        choices=("value", "two_backwards"),
        paper="both; two backwards by default",
    )
    clip_value: float = knob(1.0, "Bound on each entry of a gradient, with clip='value'.", low=0.0)
    decay: Literal["coupled", "decoupled"] = knob(
        "coupled",
        "SGD's weight decay: added to the gradient as torch.optim.SGD does, or shrinking the weights as AdamW does. "
        "The other rules decouple.",
        choices=("coupled", "decoupled"),
    )
    stochastic_rounding: bool = knob(
        True, "Round updated bf16 weights up or down at random, so that small updates count on average."
    )

    def __post_init__(self) -> None:
        """Check what bounds cannot say.

        Raises:
            OptionError: ``clip_value`` is zero, which would freeze the model.
        """
        super().__post_init__()
        if self.clip_value == 0:
            raise OptionError(f"{self._address('clip_value')} must be above 0, got 0.")


class Fused(MemoryMethod):
    """Updates in the backward; the trainer's optimizer holds the groups, and its step finds no gradient left.

    Args:
        config: Options.
    """

    def __init__(self, config: FusedConfig) -> None:
        self.config = config
        self.backward: BackwardUpdate | None = None

    def create_optimizer(self, context: OptimizerContext) -> torch.optim.Optimizer:
        """Group the candidates; hooks come later, because sharding replaces parameters.

        Raises:
            PlanError: ``max_grad_norm`` would be ignored, or there is nothing to train.
        """
        from hf_eff.engines.backward_update import BackwardUpdate
        from hf_eff.engines.fused_optimizer import FusedOptimizer

        config = self.config
        _require_clip(config, context.max_grad_norm)
        optimizer = FusedOptimizer(
            context,
            config.rule,
            decoupled_decay=config.decay == "decoupled",
            stochastic_rounding=config.stochastic_rounding,
        )
        self.backward = BackwardUpdate(
            optimizer,
            max_norm=context.max_grad_norm if config.clip == "two_backwards" else 0.0,
            clip_value=config.clip_value if config.clip == "value" else None,
        )
        return optimizer

    def train_begin(self, model: nn.Module, global_step: int) -> None:
        """Register the hooks on the parameters as they are now."""
        if self.backward is not None:
            self.backward.attach()

    def training_step(self, context: StepContext) -> torch.Tensor:
        """Forward, and the backward with the updates inside."""
        return super().training_step(context) if self.backward is None else self.backward.run(context)

    def grad_norm(self) -> float | None:
        """Norm of all gradients of the last step, before clipping."""
        return None if self.backward is None else self.backward.norm

    def train_end(self) -> None:
        """Remove the hooks."""
        if self.backward is not None:
            self.backward.detach()

    def step_flops(self, facts: ModelFacts, shapes: Sequence[BatchShape], global_step: int) -> float:
        """Forward and backward, and the backward that measures where there is one."""
        flops = super().step_flops(facts, shapes, global_step)
        if self.backward is not None and self.backward.max_norm and len(shapes) == 1:
            flops += backward_flops(facts, shapes[0])
        return flops

    def log_entries(self) -> Mapping[str, float]:
        """Updates left out so far because a gradient was not finite."""
        return {} if self.backward is None else {"skipped_updates": float(self.backward.skipped)}

    def state_dict(self) -> dict[str, Any]:
        """The count of updates left out."""
        return {} if self.backward is None else {"skipped": self.backward.skipped}

    def load_state_dict(self, state: Mapping[str, Any], global_step: int) -> None:
        """Restore the count."""
        if self.backward is not None:
            self.backward.skipped = int(state.get("skipped", 0))


def _require_clip(config: FusedConfig, max_grad_norm: float) -> None:
    if max_grad_norm > 0 and config.clip is None:
        raise PlanError(
            f"memory='fused' updates inside the backward, before the norm of all gradients is known, and max_grad_norm="
            f"{max_grad_norm:g} would be ignored; set max_grad_norm=0, or clip='two_backwards' to apply it exactly."
        )


def cost(config: FusedConfig, facts: Facts) -> Cost:
    """Bytes without gradients; FLOPs of one backward, or of two where the norm is measured first.

    Raises:
        PlanError: ``max_grad_norm`` would be ignored.
    """
    model, run = facts.model, facts.run
    _require_clip(config, run.max_grad_norm)
    if run.loss_tokens:
        raise PlanError(
            "memory='fused' updates the output head while 'chunked_loss' still needs it; use one of 'fused' and "
            "'chunked_loss'."
        )
    part = model.trainable or everything_trains(model)
    parts = run.row_chunks > 1  # their gradients are added up before the update
    twice = config.clip == "two_backwards" and run.max_grad_norm > 0 and not parts
    widened = config.stochastic_rounding and model.param_bytes < 4
    copies = (0.0 if parts else model.param_bytes) + ((8.0 if config.rule == "adamw" else 4.0) if widened else 0.0)
    terms = training_bytes(
        facts,
        gradient_params=None if parts else 0,
        optimizer_params=0,
        transient_bytes=copies * largest_tensor(model, part),
    )
    if config.rule == "adamw":
        terms["optimizer"] = _ADAM_BYTES * part.params
    again = run.accumulation * backward_flops(model, planned_shape(facts)) if twice else 0.0
    return Cost(step_flops=planned_step_flops(facts) + again, bytes=terms)


SPEC = MethodSpec(
    name="fused",
    kind="memory",
    slot="update",
    summary="The update runs inside the backward, so that one gradient exists at a time and SGD keeps no state.",
    config=FusedConfig,
    build=Fused,
    cost=cost,
    paper=Paper(
        title="Full Parameter Fine-tuning for Large Language Models with Limited Resources",
        year=2023,
        arxiv="2306.09782",
    ),
    traits=Traits(
        fsdp2=True,
        owns_backward=True,
        owns_optimizer=True,
        stateless_optimizer=True,
        ddp=False,
        grad_accum=False,
        fp16=False,
        streaming=True,
    ),
    tiny={"rule": "signsgd", "clip": "two_backwards"},
)
