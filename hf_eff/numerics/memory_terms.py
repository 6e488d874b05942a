"""Peak bytes of training in closed form, per term: weights, gradients, optimizer state, activations, the rest.

The rest is what exists for a moment or for the machinery: logits and their gradient, one block at work (computed again
where it is checkpointed), a copy of the largest weight gradient, what the optimizer's step multiplies out, the buckets
of DDP, the blocks that FSDP gathers. It is what the peak has beyond the four others, so moments that cannot meet are
not added up. The five together are the peak on one device; ``host_bytes`` waits in the host's memory beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_eff.contracts.cost import MEMORY_TERMS, Facts, TrainableFacts
from hf_eff.numerics.activation_bytes import (
    FLOAT_BYTES,
    KeptBytes,
    Precision,
    activation_bytes,
    block_bytes_per_token,
    kept_bytes,
    outputs_per_token,
    tokens_at_once,
)
from hf_eff.numerics.flops import everything_trains
from hf_eff.numerics.optimizer_bytes import (
    StateBytes,
    largest_tensor,
    optimizer_state_bytes,
    step_bytes,
    updates_in_backward,
)

__all__ = [
    "Forecast",
    "activation_bytes",
    "block_bytes_per_token",
    "forecast",
    "host_bytes",
    "largest_gradient_params",
    "training_bytes",
]


@dataclass(frozen=True)
class Forecast:
    """Predicted memory of a step on one device.

    Attributes:
        terms: Peak bytes of each term, keys of ``MEMORY_TERMS``; together an upper estimate of the peak.
        peak: Bytes at the step's highest moment, which is below the sum where terms peak at different moments.
    """

    terms: dict[str, float]
    peak: float


def training_bytes(
    facts: Facts,
    trainable: TrainableFacts | None = None,
    *,
    gradient_params: float | None = None,
    optimizer_params: float | None = None,
    optimizer_bytes: float | None = None,
    master_weights: bool = False,
    saves_activations: bool = True,
    transient_bytes: float = 0.0,
) -> dict[str, float]:
    """Predicted peak bytes per memory term on one device: the terms of ``forecast``, which see."""
    return forecast(
        facts,
        trainable,
        gradient_params=gradient_params,
        optimizer_params=optimizer_params,
        optimizer_bytes=optimizer_bytes,
        master_weights=master_weights,
        saves_activations=saves_activations,
        transient_bytes=transient_bytes,
    ).terms


def forecast(
    facts: Facts,
    trainable: TrainableFacts | None = None,
    *,
    gradient_params: float | None = None,
    optimizer_params: float | None = None,
    optimizer_bytes: float | None = None,
    master_weights: bool = False,
    saves_activations: bool = True,
    transient_bytes: float = 0.0,
) -> Forecast:
    """Predicted bytes per memory term, and at the highest moment, on one device.

    Args:
        facts: Model, run, hardware and pool. Tokens are ``run.batch_size`` rows of ``run.length``, or of the pool's
            longest row where no length is set.
        trainable: What receives updates; None for ``facts.model.trainable``, else everything.
        gradient_params: Parameters whose gradients exist at one time; None for all trainable ones, or the largest
            where ``run.optim`` updates during the backward.
        optimizer_params: Parameters with optimizer state; None for all trainable ones.
        optimizer_bytes: Bytes of optimizer state in all; None for what ``run`` says of each parameter.
        master_weights: Whether the optimizer works on four-byte copies of 16-bit weights; they are in its term.
        saves_activations: False for methods that only run forward.
        transient_bytes: What the method itself holds for a moment, such as a random direction.

    Returns:
        The terms and the peak. Memory that an allocator keeps without using it is not in them.
    """
    part = trainable or facts.model.trainable or everything_trains(facts.model)
    backward = saves_activations and part.params > 0
    shards = _shards(facts)
    weights = (facts.model.weight_bytes or facts.model.params * facts.model.param_bytes) / shards
    gradients = _gradient_params(facts, part, gradient_params) * facts.model.param_bytes / shards
    if optimizer_bytes is None:
        optimizer_bytes = _state_bytes(facts, part, optimizer_params, master_weights=master_weights).device
    kept = kept_bytes(facts, part) if backward else KeptBytes()
    if _offloads(facts):
        kept = KeptBytes(head=kept.head)
    activations = kept.layers + kept.head
    moment = max(_moments(facts, part, kept, gradients)) if backward else _forward_bytes(facts)
    beside = _sharing_bytes(facts, part, backward=backward) + transient_bytes
    states = optimizer_bytes / shards
    rest = max(0.0, moment - gradients - activations) + beside
    amounts = map(float, (weights, gradients, states, activations, rest))
    return Forecast(dict(zip(MEMORY_TERMS, amounts, strict=True)), float(weights + states + moment + beside))


def host_bytes(
    facts: Facts,
    trainable: TrainableFacts | None = None,
    *,
    optimizer_params: float | None = None,
    saves_activations: bool = True,
) -> float:
    """Bytes that wait in host memory instead of the accelerator's: offloaded activations, paged optimizer state.

    Args:
        facts: As for ``training_bytes``; on device ``"cpu"`` nothing waits elsewhere.
        trainable: What receives updates; None for ``facts.model.trainable``, else everything.
        optimizer_params: Parameters with optimizer state; None for all trainable ones.
        saves_activations: False for methods that only run forward.
    """
    part = trainable or facts.model.trainable or everything_trains(facts.model)
    waits = _offloads(facts) and saves_activations and part.params > 0
    paged = _state_bytes(facts, part, optimizer_params).host / _shards(facts)
    return paged + (kept_bytes(facts, part).layers if waits else 0.0)


def largest_gradient_params(facts: Facts, trainable: TrainableFacts | None = None) -> float:
    """Entries of the largest gradient, all that a method holds which applies each as it comes.

    Args:
        facts: The model is looked at.
        trainable: What receives updates; None for ``facts.model.trainable``, else everything.
    """
    model = facts.model
    part = trainable or model.trainable or everything_trains(model)
    if part.tensors or (model.trainable is not None and model.trainable.tensors):
        return largest_tensor(model, part)
    if part.head_matmul_params or part.lowest_block < 0:
        return float(min(part.params, max(model.embedding_params, part.head_matmul_params)))
    return float(min(model.hidden_size * max(model.intermediate_size, model.hidden_size), part.params))


def _gradient_params(facts: Facts, part: TrainableFacts, given: float | None) -> float:
    if given is not None:
        return given
    return largest_gradient_params(facts, part) if updates_in_backward(facts.run.optim) else part.params


def _state_bytes(
    facts: Facts, part: TrainableFacts, params: float | None, *, master_weights: bool = False
) -> StateBytes:
    run, counted = facts.run, part.params if params is None else params
    copies = FLOAT_BYTES * counted if master_weights and facts.model.param_bytes < FLOAT_BYTES else 0.0
    if run.optimizer_bytes is not None:
        return StateBytes(run.optimizer_bytes * counted + copies)
    whole = optimizer_state_bytes(
        run.optim,
        facts.model,
        part,
        optim_args=run.optim_args,
        target_modules=run.optim_target_modules,
        device=facts.hardware.device,
        in_float32=master_weights,
    )
    whole = whole.scaled(counted / part.params if part.params else 0.0)
    return StateBytes(whole.device + copies, whole.host)


def _offloads(facts: Facts) -> bool:
    return facts.run.offload and facts.hardware.device != "cpu"


# -- the rest -------------------------------------------------------------------------------------------------------


def _moments(facts: Facts, part: TrainableFacts, kept: KeptBytes, gradients: float) -> list[float]:
    """Bytes beside weights and optimizer state at the moments of a step when they may peak.

    They are the loss, the first block of the backward, its last, and the optimizer's step.
    """
    model, run = facts.model, facts.run
    precision = Precision.of(model, run, facts.hardware.device)
    earlier = gradients if run.accumulation * run.row_chunks > 1 else 0.0  # of the micro-batches before
    head = max(earlier, min(gradients, part.head_matmul_params * model.param_bytes))
    largest = min(gradients, largest_gradient_params(facts, part) * model.param_bytes)
    block = (2.0 if run.checkpointing else 1.0) * _block_work(facts, precision)
    return [
        kept.layers + kept.head + _loss_work(facts, precision, backward=True) + earlier,
        kept.layers + head + block,
        gradients + largest + block,
        gradients + step_bytes(run.optim, model, part, facts.hardware.device),
    ]


def _forward_bytes(facts: Facts) -> float:
    precision = Precision.of(facts.model, facts.run, facts.hardware.device)
    return max(_loss_work(facts, precision, backward=False), _block_work(facts, precision))


def _loss_work(facts: Facts, precision: Precision, *, backward: bool) -> float:
    """Logits in both types; in a backward their gradients instead, and what they are cast to."""
    tokens, size = tokens_at_once(facts), precision.compute_bytes
    if facts.run.loss_tokens:
        tokens = min(tokens, float(facts.run.loss_tokens))
    cast = size if backward and size < FLOAT_BYTES else 0.0
    kept = FLOAT_BYTES if backward and facts.run.loss_tokens else 0.0  # else among the activations
    return tokens * outputs_per_token(facts.model) * (size + FLOAT_BYTES + cast + kept)


def _block_work(facts: Facts, precision: Precision) -> float:
    """One block's states, or as many gradients of them."""
    model = facts.model
    widest = max((block_bytes_per_token(model, each, "trained", precision) for each in model.blocks), default=0.0)
    return tokens_at_once(facts) * widest


def _shards(facts: Facts) -> int:
    """Processes that weights, gradients and optimizer state are divided among."""
    return max(1, facts.hardware.world_size) if facts.hardware.backend.startswith("fsdp") else 1


def _sharing_bytes(facts: Facts, part: TrainableFacts, *, backward: bool) -> float:
    """What several processes need beside the model: DDP's buckets, or the blocks that FSDP holds whole.

    DDP copies every gradient into buckets made for all parameters that trained when the model was wrapped, so a method
    that trains a few of them at a time pays for all. FSDP gathers a block while it fetches the next, keeps what lies
    outside the blocks whole, and holds one block's gradients until they are divided.
    """
    model, hardware = facts.model, facts.hardware
    if hardware.world_size <= 1:
        return 0.0
    if hardware.backend == "ddp":
        wrapped = model.trainable or everything_trains(model)
        return wrapped.params * model.param_bytes if backward or hardware.device != "cpu" else 0.0
    if _shards(facts) == 1:
        return 0.0
    largest = max((block.params for block in model.blocks), default=0)
    outside = model.params - sum(block.params for block in model.blocks)
    per_entry = (
        (model.weight_bytes / model.params if model.weight_bytes else model.param_bytes) if model.params else 0.0
    )
    gathered = (outside + min(2, len(model.blocks)) * largest) * per_entry
    return gathered + (min(part.params, largest) * model.param_bytes if backward else 0.0)
