"""Shapes of a layer's weight matrices, worked out from the sums that ``ModelFacts`` holds."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hf_eff.contracts.cost import BlockFacts, ModelFacts, TrainableFacts


def layer_shapes(model: ModelFacts, block: BlockFacts) -> list[tuple[int, int]]:
    """(outputs, inputs) of every matrix of a layer.

    Exact for a layer of queries, keys, values, output and a feed-forward of two or three matrices. One product for
    queries, keys and values counts as three, and experts of a mixture as one feed-forward.

    >>> block = BlockFacts(params=100, matmul_params=4 * 4 * 2 + 2 * 4 * 2 + 3 * 4 * 8, attention_width=4)
    >>> facts = ModelFacts(
    ...     architecture="toy",
    ...     params=0,
    ...     blocks=(block,),
    ...     head_matmul_params=0,
    ...     embedding_params=0,
    ...     hidden_size=4,
    ...     vocab_size=0,
    ...     intermediate_size=8,
    ... )
    >>> layer_shapes(facts, block)
    [(4, 4), (4, 4), (2, 4), (2, 4), (8, 4), (8, 4), (4, 8)]
    """
    hidden, inner = model.hidden_size, model.intermediate_size
    entries = block.matmul_params + block.cross_matmul_params
    if not hidden or not entries:
        return []
    queries = [(width, hidden) for width in (block.attention_width, block.cross_width) if width]
    attention = [*queries, *((hidden, width) for width, _ in queries)]
    left = entries - sum(rows * columns for rows, columns in attention)
    gates = 2 if left > 3 * hidden * inner else 1
    feed_forward = [(inner, hidden)] * gates + [(hidden, inner)] if inner else []
    left -= sum(rows * columns for rows, columns in feed_forward)
    width = left // (2 * hidden * max(1, len(queries)))
    keys_and_values = [(width, hidden)] * (2 * max(1, len(queries))) if width > 0 else []
    return [*attention, *keys_and_values, *feed_forward]


def projected_shapes(
    model: ModelFacts, part: TrainableFacts, target_modules: Sequence[str] = ()
) -> list[tuple[int, int]]:
    """Shapes of the trained matrices of linear modules inside the layers, one entry a matrix.

    Args:
        model: Shapes of the model.
        part: What trains.
        target_modules: Names, or last parts of names, of the modules that count; empty for all. Not known where the
            facts have no names, and all count then.
    """
    if not part.tensors:
        trained = [block for block, entries in zip(model.blocks, part.block_matmul_params, strict=True) if entries]
        return [shape for block in trained for shape in layer_shapes(model, block)]
    return [
        (tensor.shape[0], tensor.shape[1])
        for tensor in part.tensors
        if tensor.kind == "linear" and len(tensor.shape) == 2 and _is_wanted(tensor.name, target_modules)
        for _ in tensor.blocks
    ]


def is_named(path: str, wanted: str) -> bool:
    """Whether ``wanted`` is a module's name or the last parts of it.

    >>> is_named("layers.0.mlp.up_proj", "up_proj"), is_named("layers.0.mlp.up_proj", "proj")
    (True, False)
    """
    return path == wanted or path.endswith(f".{wanted}")


def _is_wanted(parameter: str, target_modules: Sequence[str]) -> bool:
    module = parameter.removesuffix(".weight")
    return not target_modules or any(is_named(module, each) for each in target_modules)


def largest_tensor(model: ModelFacts, part: TrainableFacts) -> float:
    """Entries of the largest trainable tensor: the vocabulary's where the embedding or the head trains."""
    if part.tensors:
        return float(max(math.prod(tensor.shape) for tensor in part.tensors))
    inside = [rows * columns for rows, columns in projected_shapes(model, part)]
    outside = max(part.head_matmul_params, model.embedding_params if part.lowest_block < 0 else 0)
    return float(min(part.params, max([outside, *inside], default=0)))
