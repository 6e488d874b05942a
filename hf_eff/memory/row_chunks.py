"""row_chunks: the rows of a micro-batch in k parts, one forward and backward each, so that activations shrink k times.

Idea
    The loss of a batch is a sum over its rows, and so is its gradient. Cut the rows into parts S_1 ... S_k and let
    each part run forward and backward before the next begins:

        L = sum_i w_i L(S_i),     grad L = sum_i w_i grad L(S_i)

    with w_i = 1 where losses are sums over a known number of tokens (as in most trainers), else the part's share of
    the tokens or rows that the mean is over. The dataloader, the optimizer and the schedule see one batch.

Cost      A bytes of activations of the whole micro-batch
    weights, gradients, optimizer   as without
    activations                     A / k, logits included
    step                            the same FLOPs in k smaller, less busy passes

Use when   one micro-batch does not fit and its size shall stay as it is: the result does not change.
Avoid when a single row does not fit (checkpointing, chunked_loss), or rows are packed into one.
Differs    from gradient_accumulation_steps: that counts in the dataloader, the schedule and the logs; this does not.
           Losses that are means are weighted, so that parts of unequal size add up to the same gradient.

Paper      none
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.memory import MemoryMethod, StepContext
from hf_eff.contracts.spec import MethodConfig, MethodSpec, Traits, knob
from hf_eff.errors import OptionError, PlanError
from hf_eff.numerics.memory_terms import training_bytes
from hf_eff.numerics.planned_step import planned_step_flops

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class RowChunksConfig(MethodConfig):
    """Options of ``memory="row_chunks"``."""

    chunks: int = knob(2, "Parts k of a micro-batch; never more than it has rows.", low=1, unit="parts")
    rows_at_once: int | None = knob(
        None, "Instead of chunks: rows of a part at most, whatever the micro-batch has.", low=1, unit="rows"
    )
    trim: bool = knob(
        False, "Cut off the columns on the right that are padding in a whole part: less work, other rounding."
    )

    def __post_init__(self) -> None:
        """Check what bounds cannot say.

        Raises:
            OptionError: Both ``chunks`` and ``rows_at_once`` are set.
        """
        super().__post_init__()
        if self.rows_at_once is not None and self.chunks != 2:
            raise OptionError(
                f"{self._address('rows_at_once')}={self.rows_at_once} and chunks={self.chunks} both say how large a "
                "part is; set one of them."
            )

    def parts(self, rows: int) -> int:
        """How many parts a micro-batch of so many rows is meant to have."""
        return self.chunks if self.rows_at_once is None else -(-rows // self.rows_at_once)


class RowChunks(MemoryMethod):
    """Splits each micro-batch and lets the methods below train the parts.

    Args:
        config: Options.
    """

    def __init__(self, config: RowChunksConfig) -> None:
        self.config = config
        self._numbers = 0

    def training_step(self, context: StepContext) -> torch.Tensor:
        """Train the parts one after the other.

        Raises:
            PlanError: Rows are packed into one, or the loss compares rows with each other.
        """
        from hf_eff.engines.row_split import num_rows, split_rows, train_in_parts, trim_padding

        wanted = self.config.parts(num_rows(context.inputs))
        parts = split_rows(context.inputs, wanted)
        if self.config.trim:
            parts = [trim_padding(part) for part in parts]
        # Every micro-batch of a window counts as equally many, so that numbers never meet twice.
        self._numbers = max(wanted, self._numbers if context.micro_step else 0)
        return train_in_parts(context, parts, self._numbers)


def adapt(config: RowChunksConfig, facts: Facts) -> Facts:
    """Facts of a run whose micro-batches go in parts.

    Raises:
        PlanError: Rows are flattened into one.
    """
    if facts.run.padding_free:
        raise PlanError(
            "memory='row_chunks' needs rows to split and padding_free=True flattens them into one; set "
            "padding_free=False, or lower per_device_train_batch_size."
        )
    chunks = max(1, min(config.parts(facts.run.batch_size), facts.run.batch_size))
    return facts.replace(run=dataclasses.replace(facts.run, row_chunks=chunks * facts.run.row_chunks))


def cost(config: RowChunksConfig, facts: Facts) -> Cost:
    """Bytes of the largest part, FLOPs of all."""
    return Cost(step_flops=planned_step_flops(facts), bytes=training_bytes(adapt(config, facts)))


SPEC = MethodSpec(
    name="row_chunks",
    kind="memory",
    slot="activations.rows",
    summary="The rows of a micro-batch in k parts, one forward and backward each: activations shrink k times.",
    config=RowChunksConfig,
    build=RowChunks,
    cost=cost,
    adapt=adapt,
    traits=Traits(fsdp2=True, baseline=True, packing=False, streaming=True),
)
