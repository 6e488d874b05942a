"""How far down a model a gradient has to go for the parameters that train, and what it may leave out on the way."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from hf_eff.engines.matrices import attentions, block_matrices, is_matrix, logical_sizes, outer_matrices
from hf_eff.engines.module_tree import encoder_blocks, find_blocks, input_embedding, output_head
from hf_eff.errors import OptionError
from hf_eff.numerics.flops import GradientPath


def trainable_facts(model: nn.Module, names: Collection[str] | None = None) -> GradientPath:
    """Which parts of a model receive updates, and how far down a gradient has to go for it.

    Args:
        model: The model. Hooks that make its inputs require gradients count: a gradient then runs through every block.
        names: Parameter names as in ``model.named_parameters()``; None for those that require gradients now. Of tied
            parameters either name will do.

    Raises:
        OptionError: A name is no parameter of the model.
    """
    chosen = _chosen_parameters(model, names)
    sizes, blocks = logical_sizes(model), [block for _, block in find_blocks(model)]
    lowest = _lowest_block(model, blocks, chosen)
    trained = [sum(each.entries for each in own if id(each.weight) in chosen) for own in block_matrices(model)]
    unused = [0] * len(blocks)
    for index in _gradient_sources(lowest, encoder_blocks(model), trained):
        unused[index] = _unused_input_gradients(blocks[index], chosen)
    return GradientPath(
        params=sum(sizes[key] for key in chosen),
        lowest_block=lowest,
        block_matmul_params=tuple(trained),
        head_matmul_params=sum(each.entries for each in outer_matrices(model) if id(each.weight) in chosen),
        unused_input_gradients=tuple(unused),
        head_needs_input_gradient=lowest < len(blocks) or not chosen <= _parameters(output_head(model)),
    )


def _chosen_parameters(model: nn.Module, names: Collection[str] | None) -> set[int]:
    every = dict(model.named_parameters(remove_duplicate=False))
    if names is None:
        return {id(parameter) for parameter in every.values() if parameter.requires_grad}
    unknown = sorted(set(names) - every.keys())
    if unknown:
        raise OptionError(f"{unknown[0]!r} is no parameter of the {type(model).__name__}; see named_parameters().")
    return {id(every[name]) for name in names}


def _lowest_block(model: nn.Module, blocks: list[nn.Module], chosen: set[int]) -> int:
    """First block that a gradient has to enter; -1 when it goes on to what comes before the blocks."""
    if not chosen:
        return len(blocks)
    if _inputs_require_grad(model):
        return -1
    places = {id(parameter): index for index, block in enumerate(blocks) for parameter in block.parameters()}
    passed = -1
    embedded, head = _parameters(input_embedding(model)), _parameters(output_head(model))
    for name, parameter in model.named_parameters():
        key = id(parameter)
        passed = max(passed, places[key]) if key in places else passed
        if key in embedded:
            places[key] = -1
        elif key in head:
            places[key] = len(blocks)
        elif key not in places:
            places[key] = _place(name, passed, len(blocks))
    lowest = min(places[key] for key in chosen)
    return min(lowest, encoder_blocks(model)) if _position_bias_requires_grad(model) else lowest


def _place(name: str, passed: int, num_blocks: int) -> int:
    """Block that a parameter outside the blocks belongs to, registered right after block ``passed``."""
    if "emb" in name:  # BART registers the norm of its embeddings after its layers
        return -1
    if passed == -1 and ("final" in name or "project_out" in name):  # OPT registers its last norm before its layers
        return num_blocks
    return num_blocks if passed == num_blocks - 1 else passed


def _parameters(module: nn.Module | None) -> set[int]:
    return set() if module is None else {id(parameter) for parameter in module.parameters()}


def _inputs_require_grad(model: nn.Module) -> bool:
    """Whether a hook makes the embedding output require gradients, as checkpointing and k-bit training set up."""
    tables = [part for part in model.modules() if isinstance(part, nn.Embedding)]
    hooks = [hook for table in tables for hook in getattr(table, "_forward_hooks", {}).values()]
    return any(getattr(hook, "__name__", "").startswith("make_inputs_require_grad") for hook in hooks)


def _position_bias_requires_grad(model: nn.Module) -> bool:
    """Whether the bias of T5's cross-attention requires gradients, as it does under activation checkpointing."""
    biases = [part for part in model.modules() if getattr(part, "has_relative_attention_bias", None) is False]
    return any(getattr(part, "gradient_checkpointing", False) for part in biases)


def _gradient_sources(lowest: int, num_encoder: int, trained: list[int]) -> list[int]:
    """Blocks whose own input needs no gradient: the lowest, and the first decoder block above a trained encoder."""
    if not 0 <= lowest < len(trained):
        return []
    above = lowest < num_encoder and trained[num_encoder] > 0
    return [lowest, num_encoder] if above else [lowest]


def _unused_input_gradients(block: nn.Module, chosen: set[int]) -> int:
    """Entries of a block's first projections, if nothing that trains comes before them in the block."""
    own = attentions(block)
    if not own or _trains_before_projections(block, chosen):
        return 0
    return sum(each.entries for each in own[0].projections)


def _trains_before_projections(block: nn.Module, chosen: set[int]) -> bool:
    """Whether a trained norm may feed the block's first matrices. One registered beside an earlier matrix does not."""
    if any(id(parameter) in chosen for parameter in block.parameters(recurse=False)):
        return True
    for parent in block.modules():
        after_matrix = False
        for child in parent.children():
            after_matrix = after_matrix or is_matrix(child)
            own = child.parameters(recurse=False)
            may_come_first = not after_matrix and not isinstance(child, nn.Embedding)
            if may_come_first and any(id(parameter) in chosen for parameter in own):
                return True
    return False
