"""addax: first-order steps on short rows and zeroth-order steps on long ones, in one update without gradients kept.

Idea
    Activations grow with the length of a row, forwards without a backward need none. Rows of at most L_T tokens
    (D1) give a gradient, the longer ones (D0) a zeroth-order estimate, and every step has K1 and K0 of them:

        c = (L(w + eps z; B0) - L(w - eps z; B0)) / (2 eps)        z drawn from (seed, step, name)
        w <- w - lr ((1 - alpha) grad L(w; B1) + alpha c z)

    Both are taken at the same w. The gradient's part is applied inside the backward, each tensor's as soon as it is
    complete, and the direction's part after it. Rows are dealt out before training, so that every batch has its mix.

Cost      P parameters, w bytes per weight, K1 short and K0 long rows of a batch, L longest row
    weights      w P bytes
    gradients    none that stays; the largest tensor's for a moment
    optimizer    none
    activations  those of K1 rows of L_T tokens, or the forward of K0 rows of L if that needs more
    step         forward and backward of the short rows, two forwards of the long ones

Use when   a few long rows decide how much memory a run takes, and SGD is good enough.
Avoid when all rows are about equally long, or the long ones carry what is to be learnt: alpha is tiny, so that they
           steer little. With accumulation or several processes.
Differs    from the paper's algorithm: L_T follows from a byte budget where one is given, and is the mean length
           otherwise; alpha shrinks with the square root of P unless it is set; weights are not perturbed in place;
           bf16 weights are rounded stochastically; weight decay is applied; max_grad_norm can be.

Paper      Addax: Utilizing Zeroth-Order Gradients to Improve Memory Efficiency and Performance of SGD for Fine-Tuning
           Language Models (2024), arXiv:2410.06441
Code       none could be obtained; written from the paper's algorithm
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hf_eff.contracts.cost import Cost, Facts, ModelFacts
from hf_eff.contracts.memory import BatchShape, MemoryMethod, OptimizerContext, SamplerContext, StepContext
from hf_eff.contracts.spec import MethodConfig, MethodSpec, Paper, Traits, knob
from hf_eff.engines.two_order_cost import require_rows, two_order_cost, two_order_flops
from hf_eff.errors import CheckpointError, EffError, OptionError, PlanError
from hf_eff.numerics.flops import everything_trains
from hf_eff.numerics.length_share import LengthShare, share_lengths, share_rows
from hf_eff.units import parse_quantity

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hf_eff.engines.two_order_step import TwoOrderStep
    from hf_eff.engines.two_streams import TwoStreams


@dataclass(frozen=True, kw_only=True)
class AddaxConfig(MethodConfig):
    """Options of ``memory="addax"``."""

    max_first_order_length: int | None = knob(
        None,
        "L_T: longer rows are zeroth-order. None: what activation_budget holds, else the pool's mean length.",
        low=1,
        unit="tokens",
    )
    activation_budget: str | None = knob(
        None, "Bytes that the short rows may keep for their backward, such as '2GiB'; L_T is worked out from it."
    )
    short_rows: int | None = knob(
        None, "K1, first-order rows of a micro-batch; None: what long_rows leaves, else 4 of 10.", low=1, unit="rows"
    )
    long_rows: int | None = knob(
        None, "K0, zeroth-order rows of a micro-batch; None: what short_rows leaves.", low=1, unit="rows"
    )
    assign: bool = knob(
        True,
        "Whether rows go by length; False draws both parts from all rows.",
        paper="True; False where all rows fit",
    )
    alpha: float | None = knob(
        None,
        "Weight of the zeroth-order part; None: kappa over the square root of the trained parameters, at most 1e-3.",
        low=0,
        high=1,
    )
    kappa: float = knob(1.0, "Norm of the zeroth-order part over that of a gradient, with alpha=None.", low=0)
    eps: float = knob(1e-3, "Length of the perturbation along z.", low=1e-8, high=1.0)
    distribution: Literal["gaussian", "rademacher"] = knob(
        "gaussian",
        "Entries of z: standard normal, or +1 and -1 (also unbiased, and cheaper to draw on a CPU).",
        choices=("gaussian", "rademacher"),
    )
    zo_clip: float | None = knob(None, "Bound on |c|; None for none.", low=0)
    clip: Literal["value", "two_backwards"] | None = knob(
        None,
        "For the gradient: 'two_backwards' applies max_grad_norm exactly, with a second backward; 'value' bounds each "
        "entry by clip_value instead; None needs max_grad_norm=0.",
        choices=("value", "two_backwards"),
    )
    clip_value: float = knob(1.0, "Bound on each entry of a gradient, with clip='value'.", low=0.0)

    def __post_init__(self) -> None:
        """Check what bounds cannot say.

        Raises:
            OptionError: A bound is zero, a budget is no number of bytes, or two options say how long a short row is.
        """
        super().__post_init__()
        for name in ("zo_clip", "clip_value"):
            if getattr(self, name) == 0:
                raise OptionError(f"{self._address(name)} must be above 0, got 0.")
        if self.activation_budget is not None and parse_quantity(self.activation_budget)[0] != "bytes":
            raise OptionError(
                f"{self._address('activation_budget')}={self.activation_budget!r} is no number of bytes like '2GiB'."
            )
        if (self.max_first_order_length is not None) + (self.activation_budget is not None) + (not self.assign) > 1:
            raise OptionError(
                f"{self._address('max_first_order_length')}, activation_budget and assign=False each say which rows "
                "are first-order; set one of them."
            )

    def share(self, facts: Facts) -> LengthShare:
        """Rows of a batch and their lengths, of a pool as the facts have it."""
        budget = None if self.activation_budget is None else parse_quantity(self.activation_budget)[1]
        take = share_rows(facts.run.batch_size, self.short_rows, self.long_rows)
        return share_lengths(facts, take, limit=self.max_first_order_length, budget=budget, assign=self.assign)

    def weight(self, size: int) -> float:
        """Alpha for so many trained parameters."""
        return min(1e-3, self.kappa / math.sqrt(max(1, size))) if self.alpha is None else self.alpha


class Addax(MemoryMethod):
    """Deals rows out by length, and trains each part of a batch by its own order.

    Args:
        config: Options.
    """

    def __init__(self, config: AddaxConfig) -> None:
        self.config = config
        self.step: TwoOrderStep | None = None
        self._streams: TwoStreams | None = None
        self._limit: int | None = None

    def create_optimizer(self, context: OptimizerContext) -> torch.optim.Optimizer:
        """Group the candidates; hooks come later, because a wrapper may replace parameters.

        Raises:
            PlanError: ``max_grad_norm`` would be ignored, or there is nothing to train.
        """
        from hf_eff.engines.backward_update import BackwardUpdate
        from hf_eff.engines.directions import FAMILIES
        from hf_eff.engines.two_order_optimizer import TwoOrderOptimizer
        from hf_eff.engines.two_order_step import TwoOrderStep

        config = self.config
        _require_clip(config, context.max_grad_norm)
        family = FAMILIES[config.distribution](context.seed)
        optimizer = TwoOrderOptimizer(context, SPEC.address, family, config.weight)
        norm = context.max_grad_norm if config.clip == "two_backwards" else 0.0
        value = config.clip_value if config.clip == "value" else None
        backward = BackwardUpdate(optimizer, max_norm=norm, clip_value=value)
        self.step = TwoOrderStep(optimizer, backward, eps=config.eps, clip=config.zo_clip)
        return optimizer

    def sampler(self, context: SamplerContext) -> torch.utils.data.Sampler[int] | None:
        """Rows in an order whose every batch holds short and long ones, by their tokenised length."""
        from hf_eff.engines.two_streams import deal_by_length, row_lengths

        config = self.config
        self._limit = config.share(context.facts).short_length if config.assign else None
        self._streams = deal_by_length(
            row_lengths(context.dataset),
            self._limit,
            share_rows(context.batch_size, config.short_rows, config.long_rows),
            seed=context.seed,
            processes=context.processes,
            drop_last=context.drop_last,
        )
        return self._streams

    def train_begin(self, model: nn.Module, global_step: int) -> None:
        """Register the hooks on the parameters as they are now."""
        self._built().backward.attach()

    def training_step(self, context: StepContext) -> torch.Tensor:
        """Probe with the long rows, then train on the short ones; the loss is theirs where there are any."""
        from hf_eff.engines.row_split import num_rows

        return self._built().run(context, self._short_rows(num_rows(context.inputs)), self._limit)

    def _short_rows(self, rows: int) -> int:
        if self._streams is not None:
            return self._streams.first_rows(rows)
        return share_rows(rows, self.config.short_rows, self.config.long_rows)[0]

    def _built(self) -> TwoOrderStep:
        if self.step is None:
            raise EffError(f"{SPEC.address} has no optimizer yet; call create_optimizer first.")
        return self.step

    def grad_norm(self) -> float | None:
        """Norm of the short rows' gradient, before clipping; of the zeroth-order part where there is no gradient."""
        if self.step is None:
            return None
        norm = self.step.gradient_norm
        return self.step.direction_norm if norm is None else norm

    def train_end(self) -> None:
        """Remove the hooks and let go of the model."""
        if self.step is not None:
            self.step.close()

    def step_flops(self, facts: ModelFacts, shapes: Sequence[BatchShape], global_step: int) -> float:
        """Forward and backward of the short rows, cut to their longest, and two forwards of the long ones."""
        step, flops = self._built(), 0.0
        longest = self._streams.longest(global_step) if self._streams is not None else None
        for shape in shapes:
            short = self._short_rows(shape.rows)
            lengths = [min(shape.length, each) for each in longest or (shape.length,) * 2]
            first = dataclasses.replace(shape, rows=short, length=lengths[0])
            second = dataclasses.replace(shape, rows=shape.rows - short, length=lengths[1])
            again = step.backward.max_norm > 0 and len(shapes) == 1
            flops += two_order_flops(facts, first, second, step.optimizer.alpha, two_backwards=again)
        return flops

    def state_dict(self) -> dict[str, Any]:
        """Counts of what was left out, and the length up to which rows are short."""
        return {} if self.step is None else {**self.step.state_dict(), "first_order_length": self._limit}

    def load_state_dict(self, state: Mapping[str, Any], global_step: int) -> None:
        """Restore the counts.

        Raises:
            CheckpointError: The run dealt its rows out by another length.
        """
        if not state:
            return
        limit = state["first_order_length"]
        if self._limit is not None and limit != self._limit:
            raise CheckpointError(
                f"the checkpoint's run called rows of up to {limit} tokens short, and this one those of up to "
                f"{self._limit}; set max_first_order_length={limit} to resume it."
            )
        self._built().load_state_dict(state)

    def log_entries(self) -> Mapping[str, float]:
        """Both losses, both norms, alpha, and what was left out so far."""
        return {} if self.step is None else self.step.log_entries()


def _require_clip(config: AddaxConfig, max_grad_norm: float) -> None:
    if max_grad_norm > 0 and config.clip is None:
        raise PlanError(
            f"memory='addax' knows the norm of a gradient only after its update, so max_grad_norm={max_grad_norm:g} "
            "would be ignored; set max_grad_norm=0, or clip='two_backwards' to apply it exactly."
        )


def cost(config: AddaxConfig, facts: Facts) -> Cost:
    """Bytes of the short rows' backward or of the long rows' forward, whichever is more; FLOPs of both.

    Raises:
        PlanError: Rows cannot be told apart, ``max_grad_norm`` would be ignored, or no length fits the budget.
    """
    _require_clip(config, facts.run.max_grad_norm)
    require_rows(facts, SPEC.address)
    part = facts.model.trainable or everything_trains(facts.model)
    twice = config.clip == "two_backwards" and facts.run.max_grad_norm > 0
    return two_order_cost(facts, config.share(facts), config.weight(part.params), two_backwards=twice)


SPEC = MethodSpec(
    name="addax",
    kind="memory",
    slot="update",
    summary="First-order updates in the backward of short rows, a zeroth-order part from the long ones.",
    config=AddaxConfig,
    build=Addax,
    cost=cost,
    paper=Paper(
        title="Addax: Utilizing Zeroth-Order Gradients to Improve Memory Efficiency and Performance of SGD for "
        "Fine-Tuning Language Models",
        year=2024,
        arxiv="2410.06441",
    ),
    traits=Traits(
        deterministic=False,
        owns_backward=True,
        owns_optimizer=True,
        stateless_optimizer=True,
        ddp=False,
        grad_accum=False,
        fp16=False,
        packing=False,
    ),
    tiny={"clip": "two_backwards", "max_first_order_length": 21},
)
