"""What trains while each block is active, in plain numbers: the counterpart of a partition of names.

Where the facts list the trained tensors the parts are exact. Where they only hold sizes, layers and what lies outside
them are exact, and a block that is less than a layer, or is given by names, is charged as the whole layer, or as all
layers: too high, never too low.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from hf_eff.contracts.cost import ModelFacts, TensorFacts, TrainableFacts
from hf_eff.numerics.flops import everything_trains

Place = Literal["block", "always", "frozen"]
Granularity = Literal["layer", "attn_mlp", "matrix"]
_ADAPTER = re.compile(r"\.(?:lora_|base_layer\b|modules_to_save\b)")


@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """How a model is cut into blocks.

    Attributes:
        granularity: One block a layer, two (attention with the norms, feed-forward), or one a matrix.
        layers_per_block: Consecutive layers that one block holds, at least 1; the last may hold fewer.
        group_outside: Whether embedding and head count as layers when blocks are made of several.
        embedding: Where the tables before the layers go: a block of their own, the first; what trains
            at every step; or what never trains.
        head: The same for the output head; its block is the last.
        norm: The same for what else lies outside the layers (final norm, pooler); a block together
            with the head where both are ``"block"``.
        custom: Blocks by name instead, each a few names of modules or parameters joined by ``+``.
        always_active: Names of modules or parameters that train at every step.
    """

    granularity: Granularity = "layer"
    layers_per_block: int = 1
    group_outside: bool = False
    embedding: Place = "frozen"
    head: Place = "frozen"
    norm: Place = "frozen"
    custom: tuple[str, ...] = ()
    always_active: tuple[str, ...] = ()


ONE_LAYER_A_BLOCK = BlockLayout()


def trainable_blocks(model: ModelFacts, layout: BlockLayout = ONE_LAYER_A_BLOCK) -> list[TrainableFacts]:
    """Trainable part of each block, in the order of the blocks.

    Args:
        model: Shapes; layers without anything in ``model.trainable`` form no block.
        layout: How the model is cut.
    """
    parts = _Parts(model, layout)
    if layout.custom:
        return [part for names in layout.custom if (part := parts.named(names)) is not None]
    inner = [part for index in range(len(model.blocks)) for part in parts.layer(index)]
    before, after = parts.outside("embedding", "block"), parts.after("block")
    if layout.group_outside:
        return list(_grouped([*before, *inner, *after], layout.layers_per_block))
    return [*before, *_grouped(inner, layout.layers_per_block), *after]


def always_trains(model: ModelFacts, layout: BlockLayout) -> TrainableFacts | None:
    """What trains at every step of a layout beside the blocks; None for nothing.

    Args:
        model: Shapes. What ``always_active`` names is known where they list tensors.
        layout: How the model is cut.
    """
    parts = _Parts(model, layout)
    found = [*parts.always_active(), *parts.outside("embedding", "always"), *parts.after("always")]
    return joined(found) if found else None


def joined(parts: Sequence[TrainableFacts]) -> TrainableFacts:
    """Several parts that train together, disjoint and at least one."""
    return TrainableFacts(
        params=sum(part.params for part in parts),
        lowest_block=min(part.lowest_block for part in parts),
        block_matmul_params=tuple(map(sum, zip(*(part.block_matmul_params for part in parts), strict=True))),
        head_matmul_params=sum(part.head_matmul_params for part in parts),
        tensors=tuple(tensor for part in parts for tensor in part.tensors),
    )


def expected_draws(blocks: Sequence[TrainableFacts], num_active: int) -> list[tuple[int, TrainableFacts]]:
    """Mean over all draws of ``num_active`` blocks, as few weighted parts: one for each lowest block of a draw.

    What a step costs is linear in what trains once the lowest layer is fixed, so that these parts give the mean cost
    over all draws, up to the rounding of entries.

    Args:
        blocks: Parts in forward order.
        num_active: Blocks of a draw, in [1, len(blocks)].

    Returns:
        Pairs (number of draws with this lowest block, their mean part).
    """
    expected = []
    for lowest in range(len(blocks) - num_active + 1):
        above = len(blocks) - 1 - lowest
        share = (num_active - 1) / above if above else 0.0
        others = [_scaled(part, share) for part in blocks[lowest + 1 :]]
        expected.append((math.comb(above, num_active - 1), joined([blocks[lowest], *others])))
    return expected


class _Parts:
    """The parts of one model under one layout."""

    def __init__(self, model: ModelFacts, layout: BlockLayout) -> None:
        self.model, self.layout = model, layout
        self.trained = model.trainable or everything_trains(model)
        self._encoders = sum(block.stream == "encoder" for block in model.blocks)
        self._matrices = [0] * len(model.blocks)
        for tensor in self.trained.tensors:
            for index in tensor.blocks:
                self._matrices[index] += math.prod(tensor.shape) if _multiplies(tensor) else 0
        every = [single for tensor in self.trained.tensors for single in _single(tensor)]
        self._always = [each for each in every if any(self._is_named(each, name) for name in layout.always_active)]
        self.tensors = [each for each in every if each not in self._always]

    def always_active(self) -> list[TrainableFacts]:
        """What the option of this name holds, where tensors are listed."""
        return [self._of(self._always)] if self._always else []

    def named(self, names: str) -> TrainableFacts | None:
        """A block given by names; None where it matches nothing."""
        if not self.trained.tensors:
            return joined([part for index in range(len(self.model.blocks)) for part in self.layer(index)])
        found = [each for each in self.tensors if any(self._is_named(each, name) for name in names.split("+"))]
        return self._of(found) if found else None

    def layer(self, index: int) -> list[TrainableFacts]:
        """One layer's blocks: none where nothing of it trains."""
        entries = self.trained.block_matmul_params[index]
        if not self.trained.tensors:
            return [self._layer_by_size(index)] if entries else []
        own = [each for each in self.tensors if each.blocks == (index,)]
        if not own:
            return []
        if self.layout.granularity == "layer":
            return [self._of(own)]
        keys = _matrix_keys(own)
        if self.layout.granularity == "attn_mlp":
            sides = ["att" in (keys[each.name] or "att").rpartition("{}")[2].lower() for each in own]
            halves = [[each for each, side in zip(own, sides, strict=True) if side == half] for half in (True, False)]
            return [self._of(half) for half in halves if half]
        first = next((key for key in keys.values() if key is not None), None)
        groups: dict[str | None, list[TensorFacts]] = {}
        for each in own:
            groups.setdefault(keys[each.name] or first, []).append(each)
        return [self._of(group) for group in groups.values()]

    def _layer_by_size(self, index: int) -> TrainableFacts:
        block, entries = self.model.blocks[index], self.trained.block_matmul_params[index]
        # Norms and biases train where all matrices do; beside adapters they are frozen.
        whole = entries == block.matmul_params + block.cross_matmul_params
        sizes = tuple(entries if each == index else 0 for each in range(len(self.model.blocks)))
        params = block.params if whole else entries
        return TrainableFacts(params=params, lowest_block=index, block_matmul_params=sizes)

    def outside(self, what: Literal["embedding", "norm", "head"], place: Place) -> list[TrainableFacts]:
        """One of the three parts outside the layers, where the layout gives it this place and it holds anything."""
        if getattr(self.layout, what) != place:
            return []
        if self.trained.tensors:
            own = [each for each in self.tensors if not each.blocks and self._kind(each) == what]
            return [self._of(own)] if own else []
        return [] if self.model.is_peft else self._outside_by_size(what)

    def after(self, place: Place) -> list[TrainableFacts]:
        """Final norm and head as one part, those of them that have this place."""
        parts = [*self.outside("norm", place), *self.outside("head", place)]
        return [joined(parts)] if parts else []

    def _outside_by_size(self, what: str) -> list[TrainableFacts]:
        model, last = self.model, len(self.model.blocks)
        nothing = (0,) * last
        head, shared = model.head_matmul_params, model.tied_embeddings
        if what == "norm":
            return [TrainableFacts(params=model.hidden_size, lowest_block=last, block_matmul_params=nothing)]
        if what == ("embedding" if shared and self._shared_in_head else "head") and shared:
            return []
        lowest = -1 if what == "embedding" or shared else last
        size = model.embedding_params if what == "embedding" else head
        reads = head if what == "head" or shared else 0
        return [TrainableFacts(params=size, lowest_block=lowest, block_matmul_params=nothing, head_matmul_params=reads)]

    @property
    def _shared_in_head(self) -> bool:
        """Whether a tensor that embedding and head share trains as the head's."""
        return self.layout.embedding == "frozen" and self.layout.head != "frozen"

    def _kind(self, tensor: TensorFacts) -> str:
        if tensor.kind == "embedding":
            shared = self.model.tied_embeddings and math.prod(tensor.shape) == self.model.head_matmul_params
            return "head" if shared and self._shared_in_head else "embedding"
        return "head" if tensor.kind == "linear" else "norm"

    def _is_named(self, tensor: TensorFacts, name: str) -> bool:
        """Whether a name is part of the tensor's, as whole words between dots."""
        return f".{name.strip().strip('.')}." in f".{self._full_name(tensor)}."

    def _full_name(self, tensor: TensorFacts) -> str:
        if not tensor.blocks:
            return tensor.name
        number = tensor.blocks[0]
        number -= self._encoders if self.model.blocks[number].stream == "decoder" else 0
        return tensor.name.replace("{}", str(number))

    def _place(self, tensor: TensorFacts) -> int:
        """Lowest block that a gradient for something outside the blocks has to enter."""
        if tensor.kind == "embedding":
            return -1
        ends_encoder = self.model.is_encoder_decoder and "encoder" in tensor.name.split(".")
        return self._encoders - 1 if ends_encoder else len(self.model.blocks)

    def _of(self, tensors: Sequence[TensorFacts]) -> TrainableFacts:
        """Sum over tensors of one block or none each."""
        sizes, places, head = [0.0] * len(self.model.blocks), [], 0
        for tensor in tensors:
            entries = math.prod(tensor.shape)
            is_table = tensor.kind == "embedding"
            places += [*tensor.blocks] or [self._place(tensor)]
            for index in tensor.blocks if _multiplies(tensor) else ():
                sizes[index] += self.trained.block_matmul_params[index] * entries / self._matrices[index]
            reads = tensor.kind == "linear" or (is_table and self.model.tied_embeddings)
            head += entries if reads and not tensor.blocks else 0
        return TrainableFacts(
            params=sum(math.prod(tensor.shape) for tensor in tensors),
            lowest_block=min(places),
            block_matmul_params=tuple(map(round, sizes)),
            head_matmul_params=min(head, self.model.head_matmul_params),
            tensors=tuple(tensors),
        )


def _multiplies(tensor: TensorFacts) -> bool:
    """Whether tokens are multiplied by it: a matrix that is no table."""
    return len(tensor.shape) > 1 and tensor.kind != "embedding"


def _single(tensor: TensorFacts) -> list[TensorFacts]:
    """The same parameters, one block each."""
    return [dataclasses.replace(tensor, blocks=(index,)) for index in tensor.blocks] or [tensor]


def _matrix_keys(tensors: Iterable[TensorFacts]) -> dict[str, str | None]:
    """For each tensor of a layer the matrix it belongs to, by name; None for norms and other vectors."""
    keys: dict[str, str | None] = {}
    wide = {}
    for tensor in tensors:
        if len(tensor.shape) > 1:
            owner = _ADAPTER.split(tensor.name.rpartition(".")[0])[0]
            wide[owner] = owner if len(tensor.shape) == 2 else tensor.name  # experts lie in one tensor
            keys[tensor.name] = wide[owner]
    for tensor in tensors:
        keys.setdefault(tensor.name, wide.get(tensor.name.rpartition(".")[0]))
    return keys


def _scaled(part: TrainableFacts, share: float) -> TrainableFacts:
    return dataclasses.replace(
        part,
        params=round(part.params * share),
        block_matmul_params=tuple(round(entries * share) for entries in part.block_matmul_params),
        head_matmul_params=round(part.head_matmul_params * share),
    )


def _grouped(parts: Sequence[TrainableFacts], size: int) -> Iterator[TrainableFacts]:
    for start in range(0, len(parts), size):
        yield joined(parts[start : start + size])
