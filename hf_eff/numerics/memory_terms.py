"""Peak bytes of training in closed form, per term: weights, gradients, optimizer state, activations, the rest.

Activations are what autograd keeps of a pre-norm block with fused attention, per token, for hidden size h and inner
widths w (the other sides of the block's matrices added up: queries, keys, values, output, feed-forward of width i):

    frozen, passed by a gradient    2 h + w          norm inputs; attention's inputs and output; feed-forward products
    with adapters                   4 h + w + i      and the inputs of the adapted matrices
    trained                         6 h + w + i      and the normalised states that the norms' weights need

to which an ungated feed-forward adds nothing and from which it takes i. Blocks below the lowest trained one keep
nothing. The loss keeps one value per vocabulary entry and token in four bytes. Norm inputs are kept in four bytes too,
whatever type the rest is computed in. Autocast over fp32 weights also keeps a 16-bit copy of every matrix that a
gradient passes, and one of its input for each matrix that reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_eff.contracts.cost import MEMORY_TERMS, BlockFacts, Facts, ModelFacts, RunFacts, TrainableFacts
from hf_eff.numerics.flops import everything_trains

BlockForm = Literal["frozen", "adapters", "trained"]
_FLOAT_BYTES = 4.0


@dataclass(frozen=True)
class Precision:
    """How a forward pass stores what it computes.

    Attributes:
        compute_bytes: Bytes per activation element.
        casts_weights: Whether weights are kept in four bytes and cast for each matrix product (autocast).
        adapter_bytes: Bytes per element of the copy of its input that each adapter takes because it has another type
            than its 16-bit base; 0 when it reads the base's own.
    """

    compute_bytes: float = 4.0
    casts_weights: bool = False
    adapter_bytes: float = 0.0

    @classmethod
    def of(cls, model: ModelFacts, run: RunFacts) -> Precision:
        """Precision of a run. Sixteen-bit weights give sixteen-bit activations, with or without autocast."""
        autocast = run.compute_bytes < _FLOAT_BYTES
        if model.is_quantized or not model.weight_bytes or model.weight_bytes >= 3 * model.params:
            return cls(run.compute_bytes, casts_weights=autocast and not model.is_quantized)
        mixed = model.is_peft and model.param_bytes >= _FLOAT_BYTES
        return cls(2.0, adapter_bytes=(2.0 if autocast else _FLOAT_BYTES) if mixed else 0.0)


def training_bytes(
    facts: Facts,
    trainable: TrainableFacts | None = None,
    *,
    gradient_params: float | None = None,
    optimizer_params: float | None = None,
    saves_activations: bool = True,
    transient_bytes: float = 0.0,
) -> dict[str, float]:
    """Predicted peak bytes per memory term.

    Args:
        facts: Model, run and pool. Tokens are ``run.batch_size`` rows of ``run.length``, or of the pool's longest row
            where no length is set.
        trainable: What receives updates; None for ``facts.model.trainable``, else everything.
        gradient_params: Parameters whose gradients exist at one time; None for all trainable ones.
        optimizer_params: Parameters with optimizer state; None for all trainable ones.
        saves_activations: False for methods that only run forward.
        transient_bytes: What the method itself holds for a moment, such as a random direction.

    Returns:
        Bytes by term, keys of ``MEMORY_TERMS``. ``rest`` holds copies of the logits and their gradient, one
        block's activations with their gradients, and one copy of the largest weight gradient. Memory that an
        allocator keeps without using it is not in it.
    """
    model, run = facts.model, facts.run
    part = trainable or model.trainable or everything_trains(model)
    backward = saves_activations and part.params > 0
    gradients = part.params if gradient_params is None else gradient_params
    states = part.params if optimizer_params is None else optimizer_params
    working = _tokens(facts) * _working_bytes(model, Precision.of(model, run), backward=backward)
    largest = _largest_matrix(model, part) * model.param_bytes if gradients else 0.0
    amounts = (
        model.weight_bytes or model.params * model.param_bytes,
        gradients * model.param_bytes,
        states * run.optimizer_bytes,
        activation_bytes(facts, part) if backward else 0.0,
        working + largest + transient_bytes,
    )
    return dict(zip(MEMORY_TERMS, map(float, amounts), strict=True))


def activation_bytes(facts: Facts, trainable: TrainableFacts) -> float:
    """What autograd keeps between forward and backward, activation checkpointing included.

    Args:
        facts: Model, run and pool.
        trainable: What receives updates.
    """
    model, precision = facts.model, Precision.of(facts.model, facts.run)
    per_token = _loss_bytes(model) + _last_norm_bytes(model, precision, trainable)
    cast_entries = model.head_matmul_params
    for index, block in enumerate(model.blocks):
        if index < trainable.lowest_block:
            continue
        if facts.run.checkpointing:
            per_token += model.hidden_size * (_FLOAT_BYTES if precision.casts_weights else precision.compute_bytes)
        else:
            form, trained = block_form(model, trainable, index), trainable.block_matmul_params[index]
            per_token += block_bytes_per_token(model, block, form, precision, trained)
            cast_entries += block.matmul_params + block.cross_matmul_params
    copies = cast_entries * precision.compute_bytes if precision.casts_weights else 0.0
    return _tokens(facts) * per_token + copies


def block_form(model: ModelFacts, trainable: TrainableFacts, index: int) -> BlockForm:
    """Which of the three forms a block's activations take."""
    entries = trainable.block_matmul_params[index]
    if not entries:
        return "frozen"
    block = model.blocks[index]
    whole = entries >= block.matmul_params + block.cross_matmul_params
    return "adapters" if model.is_peft and not whole else "trained"


def block_bytes_per_token(
    model: ModelFacts,
    block: BlockFacts,
    form: BlockForm,
    precision: Precision = Precision(),
    adapter_params: int = 0,
) -> float:
    """Bytes that autograd keeps of one block for each token.

    Args:
        model: Shapes of the model.
        block: The block.
        form: What of it trains.
        precision: How activations are stored.
        adapter_params: Entries of the adapters among the block's matrices.

    >>> block = BlockFacts(params=3540096, matmul_params=3538944, attention_width=576)
    >>> smollm = ModelFacts(
    ...     architecture="LlamaForCausalLM",
    ...     params=134515008,
    ...     blocks=(block,) * 30,
    ...     head_matmul_params=28311552,
    ...     embedding_params=28311552,
    ...     hidden_size=576,
    ...     vocab_size=49152,
    ...     intermediate_size=1536,
    ... )
    >>> [round(512 * block_bytes_per_token(smollm, block, form) / 2**20, 1) for form in ("trained", "frozen")]
    [21.8, 14.2]
    """
    hidden, inner = model.hidden_size, model.intermediate_size
    entries = block.matmul_params + block.cross_matmul_params - (adapter_params if form == "adapters" else 0)
    gated, norms = _is_gated(model, block, entries), 3 if block.cross_width else 2
    widths = entries / hidden if hidden else 0.0
    floats = norms * hidden * _FLOAT_BYTES  # norm inputs
    elements = widths if gated else widths - inner
    readers = 5 if gated else 4  # matrices that read a normalised state: queries, keys, values, gate, input
    if form != "frozen":
        elements += inner + (norms + readers - 2 if precision.casts_weights else norms) * hidden
    if form == "adapters":
        matrices = readers + 2
        elements += adapter_params * matrices / max(1.0, matrices * hidden + widths)  # the inner adapters' outputs
        if precision.adapter_bytes:
            elements -= inner + norms * hidden
            floats += (readers * hidden + block.attention_width + inner) * precision.adapter_bytes
    if form == "trained":
        floats += norms * hidden * (_FLOAT_BYTES if precision.casts_weights else precision.compute_bytes)
    if model.dropout > 0 and not model.is_peft:
        elements += norms * hidden  # masks of the residual dropouts
    return floats + elements * precision.compute_bytes


def _is_gated(model: ModelFacts, block: BlockFacts, entries: float) -> bool:
    """Whether the feed-forward has a gate: three matrices of h x i fit beside the attention's."""
    attention = 2 * model.hidden_size * (block.attention_width + block.cross_width)
    return entries - attention > 3 * model.hidden_size * model.intermediate_size


def _tokens(facts: Facts) -> float:
    return float(facts.run.batch_size * (facts.run.length or facts.pool.max_tokens))


def _outputs(model: ModelFacts) -> float:
    """Output values per token: the vocabulary for a language model, next to none for a classifier."""
    return model.head_matmul_params / model.hidden_size if model.hidden_size else 0.0


def _loss_bytes(model: ModelFacts) -> float:
    return _outputs(model) * _FLOAT_BYTES


def _last_norm_bytes(model: ModelFacts, precision: Precision, trainable: TrainableFacts) -> float:
    """The norm before the head: its input, and where the head trains its two outputs."""
    kept = model.hidden_size * _FLOAT_BYTES if trainable.lowest_block < len(model.blocks) else 0.0
    return kept + (2 * model.hidden_size * precision.compute_bytes if trainable.head_matmul_params else 0.0)


def _working_bytes(model: ModelFacts, precision: Precision, *, backward: bool) -> float:
    """Bytes per token held for a moment: logits in both types, their gradient, and one block with its gradients."""
    size = precision.compute_bytes
    cast = size if backward and size < _FLOAT_BYTES else 0.0
    widest = max((block_bytes_per_token(model, each, "trained", precision) for each in model.blocks), default=0.0)
    return _outputs(model) * (size + _FLOAT_BYTES + cast) + (2.0 if backward else 1.0) * widest


def _largest_matrix(model: ModelFacts, trainable: TrainableFacts) -> float:
    """Entries of the largest gradient: the vocabulary's where the embedding or the head trains."""
    if trainable.head_matmul_params or trainable.lowest_block < 0:
        return float(max(model.embedding_params, trainable.head_matmul_params))
    return float(min(model.hidden_size * max(model.intermediate_size, model.hidden_size), trainable.params))
