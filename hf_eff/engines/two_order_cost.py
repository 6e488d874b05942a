"""What a step costs whose short rows give a gradient and whose long rows give a zeroth-order estimate."""

from __future__ import annotations

from hf_eff.contracts.cost import Cost, Facts, ModelFacts
from hf_eff.contracts.memory import BatchShape
from hf_eff.engines.zeroth_order_method import ZerothOrderConfig, zeroth_order_cost
from hf_eff.errors import PlanError
from hf_eff.numerics.flops import backward_flops, everything_trains, forward_flops, training_flops
from hf_eff.numerics.layer_shapes import largest_tensor
from hf_eff.numerics.length_share import LengthShare, of_size
from hf_eff.numerics.memory_terms import training_bytes
from hf_eff.numerics.planned_step import planned_shape


def require_rows(facts: Facts, address: str) -> None:
    """Refuse runs whose rows cannot be dealt out by length.

    Args:
        facts: Pool and run.
        address: What the user typed.

    Raises:
        PlanError: Rows are a stream, flattened, or split by another method; or the output head is needed again after
            its update.
    """
    run = facts.run
    for wrong, sentence in (
        (facts.pool.streaming, "deals rows out by length before training; give a dataset of known length"),
        (run.padding_free, "needs rows to tell apart and padding_free=True flattens them; set padding_free=False"),
        (run.row_chunks > 1, "deals out the rows that 'row_chunks' would split; lower short_rows instead"),
        (run.loss_tokens > 0, "updates the output head while 'chunked_loss' still needs it; leave 'chunked_loss' out"),
    ):
        if wrong:
            raise PlanError(f"{address} {sentence}.")


def two_order_flops(
    facts: ModelFacts, first: BatchShape, second: BatchShape, alpha: float, *, two_backwards: bool = False
) -> float:
    """FLOPs of one micro-batch; a part without weight is not worked out where there is another.

    Args:
        facts: Shapes of the model.
        first: Rows for the gradient.
        second: Rows for the direction.
        alpha: Weight of the direction's part.
        two_backwards: Whether the gradient's norm is measured by a backward of its own.
    """
    probes = second.rows > 0 and (alpha > 0 or not first.rows)
    flops = 2.0 * forward_flops(facts, second) if probes else 0.0
    if first.rows and (alpha < 1 or not probes):
        flops += training_flops(facts, first) + (backward_flops(facts, first) if two_backwards else 0.0)
    return flops


def two_order_cost(facts: Facts, share: LengthShare, alpha: float, *, two_backwards: bool = False) -> Cost:
    """Bytes of the short rows' backward or of the long rows' forward, whichever is more; FLOPs of both.

    Args:
        facts: Model, pool, hardware and run.
        share: Rows of both kinds and their lengths. FLOPs take long rows to be half-way between the shortest and the
            longest of them; where both parts draw from all rows, rows of mean length.
        alpha: Weight of the direction's part.
        two_backwards: Whether the gradient's norm is measured by a backward of its own.
    """
    model, longest = facts.model, share.long_length
    limit = min(share.short_length, longest)
    usual = (limit + longest) // 2 if limit < longest else round(facts.run.length or facts.pool.mean_tokens)
    first = planned_shape(of_size(facts, share.short_rows, min(limit, usual)))
    second = planned_shape(of_size(facts, share.long_rows, usual))
    flops = facts.run.accumulation * two_order_flops(model, first, second, alpha, two_backwards=two_backwards)
    widened = 4.0 if model.param_bytes < 4 else 0.0
    part = model.trainable or everything_trains(model)
    backward = training_bytes(
        of_size(facts, share.short_rows, limit),
        gradient_params=0,
        optimizer_params=0,
        transient_bytes=(model.param_bytes + widened) * largest_tensor(model, part),
    )
    if not share.long_rows or alpha == 0:
        return Cost(step_flops=flops, bytes=backward)
    forward = dict(zeroth_order_cost(ZerothOrderConfig(), of_size(facts, share.long_rows, longest)).bytes)
    if alpha == 1:
        return Cost(step_flops=flops, bytes=forward)
    more = max(0.0, sum(forward.values()) - sum(backward.values()))
    return Cost(step_flops=flops, bytes={**backward, "rest": backward["rest"] + more})
