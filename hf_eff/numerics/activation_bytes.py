"""Bytes that autograd keeps from the forward to the backward, in closed form.

They are what it keeps of a pre-norm block with fused attention, per token, for hidden size h and inner widths w (the
other sides of the block's matrices added up: queries, keys, values, output, feed-forward of width i):

    frozen, passed by a gradient    2 h + w          norm inputs; attention's inputs and output; feed-forward products
    with adapters on all matrices   4 h + w + i      and the inputs of the adapted matrices
    trained                         6 h + w + i      and the normalised states that the norms' weights need

to which an ungated feed-forward adds nothing and from which it takes i. Blocks below the lowest trained one keep
nothing. The loss keeps one value per vocabulary entry and token in four bytes. Norm inputs are kept in four bytes too,
whatever type the rest is computed in. Autocast over fp32 weights also keeps a 16-bit copy of every matrix that a
gradient passes, and one of its input for each matrix that reads it. Where facts say which matrices train, their inputs
are counted one by one, and with attention that is not fused every head keeps its probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_eff.contracts.cost import BlockFacts, Facts, KeptInputs, ModelFacts, RunFacts, TrainableFacts

BlockForm = Literal["frozen", "adapters", "trained"]
FLOAT_BYTES = 4.0


@dataclass(frozen=True)
class Precision:
    """How a forward pass stores what it computes.

    Attributes:
        compute_bytes: Bytes per activation element.
        casts_weights: Whether weights are kept in four bytes and cast for each matrix product (autocast).
        adapter_bytes: Bytes per element of the copy of its input that each adapter takes because it has another type
            than its 16-bit base; 0 when it reads the base's own.
        mask_bytes: Bytes per element of a dropout mask; 0 for those of what it masks.
    """

    compute_bytes: float = 4.0
    casts_weights: bool = False
    adapter_bytes: float = 0.0
    mask_bytes: float = 0.0

    @property
    def bytes_per_mask(self) -> float:
        """Bytes per element of a mask: on a CPU it has the type of what it masks, which autocast leaves wide."""
        wide = FLOAT_BYTES if self.casts_weights else self.adapter_bytes or self.compute_bytes
        return self.mask_bytes or wide

    @classmethod
    def of(cls, model: ModelFacts, run: RunFacts, device: str = "cpu") -> Precision:
        """Precision of a run. Sixteen-bit weights give sixteen-bit activations, with or without autocast."""
        autocast, mask = run.compute_bytes < FLOAT_BYTES, 0.0 if device == "cpu" else 1.0
        if model.is_quantized or not model.weight_bytes or model.weight_bytes >= 3 * model.params:
            return cls(run.compute_bytes, casts_weights=autocast and not model.is_quantized, mask_bytes=mask)
        mixed = model.is_peft and model.param_bytes >= FLOAT_BYTES
        adapters = (2.0 if autocast else FLOAT_BYTES) if mixed else 0.0
        return cls(2.0, adapter_bytes=adapters, mask_bytes=mask)


@dataclass(frozen=True)
class KeptBytes:
    """Bytes kept for the backward: of the layers, and of the output head with the loss."""

    layers: float = 0.0
    head: float = 0.0


def tokens_at_once(facts: Facts) -> float:
    """Tokens of one forward: the rows of a micro-batch, or of its largest part where it is split."""
    rows = -(-facts.run.batch_size // max(1, facts.run.row_chunks))
    return float(rows * _length(facts))


def activation_bytes(facts: Facts, trainable: TrainableFacts) -> float:
    """What autograd keeps between forward and backward, wherever it waits.

    Args:
        facts: Model, run, hardware and pool.
        trainable: What receives updates.
    """
    kept = kept_bytes(facts, trainable)
    return kept.layers + kept.head


def kept_bytes(facts: Facts, trainable: TrainableFacts) -> KeptBytes:
    """The same in two parts. With checkpointing a layer keeps its input only.

    Args:
        facts: Model, run, hardware and pool.
        trainable: What receives updates.
    """
    model, run = facts.model, facts.run
    precision = Precision.of(model, run, facts.hardware.device)
    kept_input = model.hidden_size * (FLOAT_BYTES if precision.casts_weights else precision.compute_bytes)
    per_token, cast_entries = 0.0, 0
    for index in range(max(0, trainable.lowest_block), len(model.blocks)):
        block = model.blocks[index]
        if is_checkpointed(run, index):
            per_token += kept_input
            continue
        per_token += _block_bytes(facts, trainable, index, precision)
        cast_entries += block.matmul_params + block.cross_matmul_params
    copy_bytes = precision.compute_bytes if precision.casts_weights else 0.0
    tokens = tokens_at_once(facts)
    # A loss in chunks makes the head's gradient on the way and keeps it until the backward asks for it.
    early = trainable.head_matmul_params * model.param_bytes if run.loss_tokens else 0.0
    return KeptBytes(
        layers=tokens * per_token + cast_entries * copy_bytes,
        head=tokens * _head_bytes(facts, trainable, precision)
        + (early if run.loss_tokens else model.head_matmul_params * copy_bytes),
    )


def is_checkpointed(run: RunFacts, index: int) -> bool:
    """Whether a layer is computed again in the backward: the first and every ``checkpoint_every``-th after it."""
    return run.checkpointing and index % max(1, run.checkpoint_every) == 0


def _block_bytes(facts: Facts, trainable: TrainableFacts, index: int, precision: Precision) -> float:
    """Bytes per token that block ``index`` keeps."""
    model, block = facts.model, facts.model.blocks[index]
    kept = trainable.kept_inputs[index] if trainable.kept_inputs else None
    form, entries = block_form(model, trainable, index), trainable.block_matmul_params[index]
    scores = block.score_heads * _length(facts) * precision.compute_bytes
    # The lowest block's own input needs no gradient; only a trained norm keeps it.
    unread = model.hidden_size * FLOAT_BYTES if form == "adapters" and index == trainable.lowest_block else 0.0
    return scores - unread + block_bytes_per_token(model, block, form, precision, entries, kept)


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
    kept: KeptInputs | None = None,
) -> float:
    """Bytes that autograd keeps of one block for each token, attention probabilities excluded.

    Args:
        model: Shapes of the model.
        block: The block.
        form: What of it trains.
        precision: How activations are stored.
        adapter_params: Entries of the adapters among the block's matrices.
        kept: What is kept for the matrices that train; None for all of the block's.

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
    hidden, inner, norms = model.hidden_size, model.intermediate_size, _norms(block)
    adapters = (kept.adapters if kept else 0) or (adapter_params if form == "adapters" else 0)
    entries = block.matmul_params + block.cross_matmul_params - adapters
    gated = _is_gated(model, block, entries)
    widths = entries / hidden if hidden else 0.0
    elements = (widths if gated else widths - inner) + (block.activation_copies - 1) * inner
    floats = norms * hidden * FLOAT_BYTES  # norm inputs
    if form != "frozen":
        inputs = kept or _all_inputs(model, block, form, adapter_params, gated=gated)
        elements += inputs.inner
        if form == "adapters" and precision.adapter_bytes:
            floats += inputs.each * precision.adapter_bytes
        else:
            elements += inputs.copies if precision.casts_weights else inputs.states
        floats += inputs.masks * precision.bytes_per_mask
    if form == "trained" and block.keeps_normalised:
        floats += norms * hidden * (FLOAT_BYTES if precision.casts_weights else precision.compute_bytes)
    if model.dropout > 0 and not model.is_peft:
        elements += norms * hidden  # masks of the residual dropouts
    return floats + elements * precision.compute_bytes


def _all_inputs(
    model: ModelFacts, block: BlockFacts, form: BlockForm, adapter_params: int, *, gated: bool
) -> KeptInputs:
    """Inputs kept when all matrices of a block train or have adapters."""
    hidden, inner, norms = model.hidden_size, model.intermediate_size, _norms(block)
    readers = 5 if gated else 4  # matrices that read a normalised state: queries, keys, values, gate, input
    matrices = readers + 2
    width = (block.matmul_params + block.cross_matmul_params) / hidden if hidden else 0.0
    ranks = adapter_params * matrices / max(1.0, matrices * hidden + width) if form == "adapters" else 0.0
    return KeptInputs(
        states=norms * hidden + inner,
        copies=(norms + readers - 2) * hidden + inner,
        each=readers * hidden + block.attention_width + inner,
        inner=round(ranks),
    )


def _norms(block: BlockFacts) -> int:
    return 3 if block.cross_width else 2


def _is_gated(model: ModelFacts, block: BlockFacts, entries: float) -> bool:
    """Whether the feed-forward has a gate: three matrices of h x i fit beside the attention's."""
    attention = 2 * model.hidden_size * (block.attention_width + block.cross_width)
    return entries - attention > 3 * model.hidden_size * model.intermediate_size


# -- output head and loss -------------------------------------------------------------------------------------------


def outputs_per_token(model: ModelFacts) -> float:
    """Output values per token: the vocabulary for a language model, next to none for a classifier."""
    return model.head_matmul_params / model.hidden_size if model.hidden_size else 0.0


def _head_bytes(facts: Facts, trainable: TrainableFacts, precision: Precision) -> float:
    """The norm before the head: its input, where the head trains its two outputs; and what the loss keeps."""
    model = facts.model
    kept = model.hidden_size * FLOAT_BYTES if trainable.lowest_block < len(model.blocks) else 0.0
    if trainable.head_matmul_params:
        kept += 2 * model.hidden_size * precision.compute_bytes
    if facts.run.loss_tokens:
        return kept + (0.0 if trainable.head_matmul_params else model.hidden_size * precision.compute_bytes)
    return kept + outputs_per_token(model) * FLOAT_BYTES


def _length(facts: Facts) -> int:
    return facts.run.length or facts.pool.max_tokens
