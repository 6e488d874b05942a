"""FLOPs of an optimizer step that is only planned: from the training arguments and the pool's mean length."""

from __future__ import annotations

import dataclasses

from hf_eff.contracts.cost import Cost, Facts, TrainableFacts
from hf_eff.contracts.memory import BatchShape
from hf_eff.numerics.flops import (
    backward_flops,
    everything_trains,
    forward_flops,
    recompute_flops,
    training_flops,
)


def planned_shape(facts: Facts) -> BatchShape:
    """Shape of a mean micro-batch; source and target of an encoder-decoder are taken to be equally long."""
    length = round(planned_length(facts))
    return BatchShape(facts.run.batch_size, length, encoder_length=length if facts.model.is_encoder_decoder else 0)


def planned_length(facts: Facts) -> float:
    """Tokens of a row of a mean micro-batch, padding included.

    Rows are padded to the longest of their micro-batch: on average, of as many rows drawn at random.
    """
    lengths, rows = facts.pool.length_quantiles, facts.run.batch_size
    unpadded = facts.run.packing or facts.run.padding_free or facts.run.by_length
    if facts.run.length or unpadded or not lengths:
        return float(facts.run.length or facts.pool.mean_tokens)
    chances = [(index / len(lengths)) ** rows for index in range(len(lengths) + 1)]
    return sum(length * (chances[index + 1] - chances[index]) for index, length in enumerate(lengths))


def planned_step_flops(facts: Facts, trainable: TrainableFacts | None = None) -> float:
    """FLOPs of one optimizer step in one process: forward and backward of every micro-batch, no recomputation.

    Args:
        facts: Model, pool and run.
        trainable: What receives updates; None for ``facts.model.trainable``, and everything when that is None too.
    """
    return facts.run.accumulation * training_flops(facts.model, planned_shape(facts), trainable)


def planned_recompute_flops(facts: Facts, cost: Cost) -> float:
    """FLOPs of running checkpointed layers forward again, where a gradient passes them; to be added to a step's.

    A method whose gradient goes down to another layer at each step says only what a step costs on average. What that
    leaves after the forward, the head and the weights' own gradients is the part of the layers that is passed.
    """
    model, shape, run = facts.model, planned_shape(facts), facts.run
    part = model.trainable or everything_trains(model)
    nothing = TrainableFacts(params=1, lowest_block=len(model.blocks), block_matmul_params=(0,) * len(model.blocks))
    head = backward_flops(model, shape, nothing)
    inputs = backward_flops(model, shape, dataclasses.replace(nothing, lowest_block=part.lowest_block)) - head
    weights = backward_flops(model, shape, part) - head - inputs
    held = cost.bytes.get("gradients", 0.0) / max(1.0, part.params * model.param_bytes)
    rest = cost.step_flops / run.accumulation - forward_flops(model, shape) - head - min(1.0, held) * weights
    passed = min(1.0, max(0.0, rest / inputs)) if inputs > 0 else 0.0
    return passed * run.accumulation * recompute_flops(model, shape, part) / run.checkpoint_every
