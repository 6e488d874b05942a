"""FLOPs of a forward and a backward pass in closed form, from the shapes of a model and of a batch.

One multiply-add counts as two FLOPs. Embedding lookups, norms, activations and rotary embeddings count as zero, and
attention is charged for the full square of the sequence, as a kernel without causal skipping computes it. With D
tokens, a layer whose matrices hold N entries, and attention of width W (heads x head size) over S positions:

    forward   2 D N + 4 rows W S^2              per layer, and 2 D V h for the output head
    backward  2 D N' (input gradients) + 2 D N* (weight gradients) + 8 rows W S^2

where N' covers the layers that a gradient has to pass through and N* the matrices that receive updates.

Every count is linear in the batch's tokens and attended pairs. ``Coefficients`` holds that linear form; it is worked
out once per model and trainable part, so that pricing a batch costs a few additions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar

from hf_eff.contracts.cost import BlockFacts, ModelFacts, TrainableFacts
from hf_eff.contracts.memory import BatchShape


@dataclass(frozen=True, kw_only=True)
class GradientPath(TrainableFacts):
    """Trainable part with the places where a gradient need not go; without them the count is an upper bound.

    Attributes:
        unused_input_gradients: Per block, entries of matrices whose input needs no gradient: the first projections
            of the lowest block when nothing before them trains. Empty: none.
        head_needs_input_gradient: False when only the output head itself trains.
    """

    unused_input_gradients: tuple[int, ...] = ()
    head_needs_input_gradient: bool = True


@dataclass(frozen=True)
class Coefficients:
    """FLOPs per unit of each quantity that a batch has.

    Attributes:
        token, encoder_token: Per token of the decoder (or only) stack, and of the encoder.
        pair, encoder_pair, cross_pair: Per attended pair of positions: inside the decoder (or only) stack, inside the
            encoder, and from decoder to encoder.
    """

    token: float = 0.0
    encoder_token: float = 0.0
    pair: float = 0.0
    encoder_pair: float = 0.0
    cross_pair: float = 0.0

    def __add__(self, other: Coefficients) -> Coefficients:
        """Sum of two counts."""
        return Coefficients(
            self.token + other.token,
            self.encoder_token + other.encoder_token,
            self.pair + other.pair,
            self.encoder_pair + other.encoder_pair,
            self.cross_pair + other.cross_pair,
        )

    def of(self, shape: BatchShape) -> float:
        """FLOPs of one batch."""
        rows, length, source = shape.rows, shape.length, shape.encoder_length
        packed = shape.packed_lengths
        pairs = sum(each * each for each in packed) if packed else rows * length * length
        flops = self.token * rows * length + self.pair * pairs
        if source:
            flops += self.encoder_token * rows * source + self.encoder_pair * rows * source * source
            flops += self.cross_pair * rows * length * source
        return flops


def forward_flops(facts: ModelFacts, shape: BatchShape) -> float:
    """FLOPs of one forward pass.

    >>> block = BlockFacts(params=12, matmul_params=12, attention_width=2)
    >>> model = ModelFacts(
    ...     architecture="toy",
    ...     params=20,
    ...     blocks=(block,),
    ...     head_matmul_params=8,
    ...     embedding_params=8,
    ...     hidden_size=2,
    ...     vocab_size=4,
    ... )
    >>> forward_flops(model, BatchShape(rows=1, length=3))  # 2 x 3 x (12 + 8) + 4 x 2 x 9
    192.0
    """
    return _cached(_forward, facts, None).of(shape)


def generation_flops(facts: ModelFacts, shape: BatchShape, new_tokens: int) -> float:
    """FLOPs of generating with a key-value cache when no row ends early.

    One forward over the prompts, whose last position gives the first token, and one forward a further token.

    Args:
        facts: Shapes of the model.
        shape: Prompts; of an encoder-decoder model the source is the prompt.
        new_tokens: Tokens generated in each row.
    """
    form, rows, source = _cached(_forward, facts, None), shape.rows, shape.encoder_length
    start = 1 if facts.is_encoder_decoder else shape.length
    first = form.of(BatchShape(rows, start, source)) - 2.0 * facts.head_matmul_params * rows * (start - 1)
    further = new_tokens - 1
    attended = start * further + further * (further + 1) / 2
    return first + rows * (further * (form.token + form.cross_pair * source) + form.pair * attended)


def backward_flops(facts: ModelFacts, shape: BatchShape, trainable: TrainableFacts | None = None) -> float:
    """FLOPs of one backward pass.

    Args:
        facts: Shapes of the model.
        shape: Shape of the batch.
        trainable: What receives updates; None for ``facts.trainable``, and everything when that is None too.
            A plain ``TrainableFacts`` gives an upper bound, at most the first projections of one block too high;
            a ``GradientPath`` knows those.
    """
    return _cached(_backward, facts, trainable or facts.trainable).of(shape)


def training_flops(facts: ModelFacts, shape: BatchShape, trainable: TrainableFacts | None = None) -> float:
    """FLOPs of one forward and one backward pass; arguments as for ``backward_flops``."""
    return _cached(_training, facts, trainable or facts.trainable).of(shape)


def recompute_flops(facts: ModelFacts, shape: BatchShape, trainable: TrainableFacts | None = None) -> float:
    """Extra FLOPs of non-reentrant activation checkpointing of every block.

    A block runs forward a second time if a gradient passes through it, and stops as soon as the last saved tensor is
    back: the matrix that ends a pre-norm block is then left out. Adapters, dropout and post-norm blocks save
    something after that matrix, so their blocks are redone in full.

    Args:
        facts: Shapes of the model.
        shape: Shape of the batch.
        trainable: As for ``backward_flops``. With inputs forced to require gradients (as transformers does on
            enabling checkpointing) its ``lowest_block`` is -1.
    """
    return _cached(_recompute, facts, trainable or facts.trainable).of(shape)


def everything_trains(facts: ModelFacts) -> TrainableFacts:
    """Description of full fine-tuning."""
    return TrainableFacts(
        params=facts.params,
        lowest_block=-1,
        block_matmul_params=tuple(block.matmul_params + block.cross_matmul_params for block in facts.blocks),
        head_matmul_params=facts.head_matmul_params,
    )


# -- one linear form per pass ---------------------------------------------------------------------------------------


def _forward(facts: ModelFacts, _trainable: TrainableFacts | None = None) -> Coefficients:
    total = Coefficients(token=2.0 * facts.head_matmul_params)
    for block in facts.blocks:
        total += _block_forward(block)
    return total


def _block_forward(block: BlockFacts) -> Coefficients:
    if block.stream == "encoder":
        return Coefficients(encoder_token=2.0 * block.matmul_params, encoder_pair=4.0 * block.attention_width)
    return Coefficients(
        token=2.0 * block.matmul_params,
        encoder_token=2.0 * block.cross_matmul_params,
        pair=4.0 * block.attention_width,
        cross_pair=4.0 * block.cross_width,
    )


def _backward(facts: ModelFacts, trainable: TrainableFacts | None) -> Coefficients:
    part = trainable or everything_trains(facts)
    if part.params == 0:
        return Coefficients()
    total = Coefficients(token=2.0 * part.head_matmul_params)
    if _head_passes_gradient(facts, part):
        total += Coefficients(token=2.0 * facts.head_matmul_params)
    for index, block in enumerate(facts.blocks):
        total += _weight_gradients(block, part.block_matmul_params[index])
        if index >= part.lowest_block:
            total += _input_gradients(facts, part, index)
    return total


def _training(facts: ModelFacts, trainable: TrainableFacts | None) -> Coefficients:
    return _forward(facts) + _backward(facts, trainable)


def _recompute(facts: ModelFacts, trainable: TrainableFacts | None) -> Coefficients:
    part = trainable or everything_trains(facts)
    if part.params == 0:
        return Coefficients()
    pre_norm = facts.is_causal_lm or facts.is_encoder_decoder
    stops_early = pre_norm and not facts.is_peft and facts.dropout == 0
    last_matrix = 2.0 * facts.hidden_size * facts.intermediate_size if stops_early else 0.0
    total = Coefficients()
    for index, block in enumerate(facts.blocks):
        if index >= part.lowest_block:
            left_out = min(last_matrix, 2.0 * block.matmul_params)
            on_encoder = block.stream == "encoder"
            total += _block_forward(block)
            total += Coefficients(encoder_token=-left_out) if on_encoder else Coefficients(token=-left_out)
    return total


# -- where a gradient goes ------------------------------------------------------------------------------------------


def _head_passes_gradient(facts: ModelFacts, part: TrainableFacts) -> bool:
    if part.lowest_block < len(facts.blocks):
        return True
    if isinstance(part, GradientPath):
        return part.head_needs_input_gradient
    return part.params > part.head_matmul_params


def _weight_gradients(block: BlockFacts, entries: int) -> Coefficients:
    """Weight gradients of ``entries`` of a block's matrices, shared out between the two token streams."""
    if block.stream == "encoder":
        return Coefficients(encoder_token=2.0 * entries)
    matrices = block.matmul_params + block.cross_matmul_params
    on_encoder = entries * block.cross_matmul_params / matrices if matrices else 0.0
    return Coefficients(token=2.0 * (entries - on_encoder), encoder_token=2.0 * on_encoder)


def _input_gradients(facts: ModelFacts, part: TrainableFacts, index: int) -> Coefficients:
    """Gradients with respect to the inputs of a block's matrices and attention products."""
    block, entries, width = facts.blocks[index], facts.blocks[index].matmul_params, facts.blocks[index].attention_width
    if isinstance(part, GradientPath) and part.unused_input_gradients:
        entries -= part.unused_input_gradients[index]
    if block.stream == "encoder":
        return Coefficients(encoder_token=2.0 * entries, encoder_pair=8.0 * width)
    if _only_cross_attention(facts, part, index):
        # A gradient bound for the encoder leaves the first decoder block through the keys and values of its
        # cross-attention: self-attention (four square matrices) and the cross-attention's queries are spared.
        entries -= facts.hidden_size * (4 * width + block.cross_width)
        passed = Coefficients(token=2.0 * entries, cross_pair=6.0 * block.cross_width)
        return passed + Coefficients(encoder_token=2.0 * block.cross_matmul_params)
    return Coefficients(token=2.0 * entries, pair=8.0 * width) + _cross_gradients(facts, part, index)


def _cross_gradients(facts: ModelFacts, part: TrainableFacts, index: int) -> Coefficients:
    block = facts.blocks[index]
    encoder_trains = part.lowest_block < _first_decoder_block(facts)
    if encoder_trains:
        return Coefficients(encoder_token=2.0 * block.cross_matmul_params, cross_pair=8.0 * block.cross_width)
    # Frozen encoder: its states need no gradient, nor do keys and values that frozen matrices make of them.
    return Coefficients(cross_pair=(8.0 if part.block_matmul_params[index] else 4.0) * block.cross_width)


def _only_cross_attention(facts: ModelFacts, part: TrainableFacts, index: int) -> bool:
    first = _first_decoder_block(facts)
    return 0 < first == index and 0 <= part.lowest_block < first and part.block_matmul_params[index] == 0


def _first_decoder_block(facts: ModelFacts) -> int:
    """Index of the first decoder block of an encoder-decoder model; 0 for models of one stack."""
    return sum(block.stream == "encoder" for block in facts.blocks)


# -- cache ----------------------------------------------------------------------------------------------------------


_T = TypeVar("_T")
_Form = Callable[[ModelFacts, "TrainableFacts | None"], Coefficients]


class _ByIdentity(Generic[_T]):
    """Hash key that compares by identity: hashing a hundred blocks by value would cost more than the count."""

    __slots__ = ("value",)

    def __init__(self, value: _T) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and self.value is other.value


def _cached(form: _Form, facts: ModelFacts, trainable: TrainableFacts | None) -> Coefficients:
    return _coefficients(form, _ByIdentity(facts), _ByIdentity(trainable))


@lru_cache(maxsize=512)
def _coefficients(
    form: _Form, facts: _ByIdentity[ModelFacts], trainable: _ByIdentity[TrainableFacts | None]
) -> Coefficients:
    # The keys hold their values, so an identity cannot be reused while its entry lives.
    return form(facts.value, trainable.value)
