"""What trains while each block of layers is active, in plain numbers: the counterpart of a partition of names."""

from __future__ import annotations

from collections.abc import Sequence

from hf_eff.contracts.cost import ModelFacts, TrainableFacts
from hf_eff.numerics.flops import everything_trains


def trainable_blocks(
    model: ModelFacts, *, layers_per_block: int = 1, include_embedding: bool = False, include_head: bool = False
) -> list[TrainableFacts]:
    """Trainable part for each block, in forward order.

    Args:
        model: Shapes; layers without anything in ``model.trainable`` form no block.
        layers_per_block: Consecutive layers that one block holds, at least 1.
        include_embedding: Whether the embeddings are the first block.
        include_head: Whether the final norm and the output head are the last block. A matrix that both share is
            counted with the embedding.
    """
    trained = model.trainable or everything_trains(model)
    layers = [index for index, entries in enumerate(trained.block_matmul_params) if entries]
    blocks = [
        _layers(model, trained, layers[start : start + layers_per_block])
        for start in range(0, len(layers), layers_per_block)
    ]
    shared = model.head_matmul_params if model.tied_embeddings else 0
    if include_embedding:
        blocks.insert(0, _outside(model, params=model.embedding_params, lowest=-1, head=shared))
    if include_head:
        head = 0 if include_embedding and shared else model.head_matmul_params
        blocks.append(_outside(model, params=head + model.hidden_size, lowest=len(model.blocks), head=head))
    return blocks


def _layers(model: ModelFacts, trained: TrainableFacts, group: Sequence[int]) -> TrainableFacts:
    entries = trained.block_matmul_params
    params = 0
    for index in group:
        block = model.blocks[index]
        whole = entries[index] == block.matmul_params + block.cross_matmul_params
        # Norms and biases train where all matrices do; beside adapters they are frozen.
        params += block.params if whole else entries[index]
    return TrainableFacts(
        params=params,
        lowest_block=group[0],
        block_matmul_params=tuple(size if index in group else 0 for index, size in enumerate(entries)),
    )


def _outside(model: ModelFacts, *, params: int, lowest: int, head: int) -> TrainableFacts:
    nothing = (0,) * len(model.blocks)
    return TrainableFacts(params=params, lowest_block=lowest, block_matmul_params=nothing, head_matmul_params=head)
