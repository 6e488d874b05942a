"""FLOPs of an optimizer step that is only planned: from the training arguments and the pool's mean length."""

from __future__ import annotations

from hf_eff.contracts.cost import Facts, TrainableFacts
from hf_eff.contracts.memory import BatchShape
from hf_eff.numerics.flops import training_flops


def planned_shape(facts: Facts) -> BatchShape:
    """Shape of a mean micro-batch; source and target of an encoder-decoder are taken to be equally long."""
    length = round(facts.run.length or facts.pool.mean_tokens)
    return BatchShape(facts.run.batch_size, length, encoder_length=length if facts.model.is_encoder_decoder else 0)


def planned_step_flops(facts: Facts, trainable: TrainableFacts | None = None) -> float:
    """FLOPs of one optimizer step in one process: forward and backward of every micro-batch, no recomputation.

    Args:
        facts: Model, pool and run.
        trainable: What receives updates; None for ``facts.model.trainable``, and everything when that is None too.
    """
    return facts.run.accumulation * training_flops(facts.model, planned_shape(facts), trainable)
