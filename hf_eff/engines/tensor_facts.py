"""Facts of a model in the detail the memory ledger needs: trained tensors, and what its blocks keep for a backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from hf_eff.contracts.cost import BlockFacts, KeptInputs, ModelFacts, TensorFacts
from hf_eff.engines.matrices import Matrix, attentions, block_matrices, logical_sizes, text_config
from hf_eff.engines.module_tree import find_blocks


def with_details(facts: ModelFacts, model: nn.Module) -> ModelFacts:
    """Facts of a model with the tensors that train now and with what its blocks keep.

    Args:
        facts: Facts of the model so far.
        model: The model.
    """
    chosen = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    trainable = facts.trainable
    if trainable is not None:
        trainable = dataclasses.replace(
            trainable, kept_inputs=kept_inputs(model, chosen), tensors=tensor_facts(model, chosen)
        )
    return dataclasses.replace(facts, blocks=with_kept_states(model, facts.blocks), trainable=trainable)


def tensor_facts(model: nn.Module, chosen: Collection[int]) -> tuple[TensorFacts, ...]:
    """The chosen parameters, equal ones of several blocks taken together.

    Args:
        model: The model.
        chosen: ``id`` of each chosen parameter.
    """
    prefixes = [(f"{name}.", index) for index, (name, _) in enumerate(find_blocks(model))]
    kinds, sizes = _kinds(model), logical_sizes(model)
    groups: dict[tuple[Any, ...], list[int]] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) not in chosen:
            continue
        template, block = _template(name, prefixes)
        shape = tuple(parameter.shape) if parameter.numel() == sizes[id(parameter)] else (sizes[id(parameter)],)
        key = (template, shape, float(parameter.element_size()), kinds.get(id(parameter), "other"), block is None)
        groups.setdefault(key, []).extend([] if block is None else [block])
    return tuple(
        TensorFacts(name=name, shape=shape, bytes=size, kind=kind, blocks=tuple(blocks))
        for (name, shape, size, kind, _), blocks in groups.items()
    )


def _template(name: str, prefixes: Sequence[tuple[str, int]]) -> tuple[str, int | None]:
    """Name with ``{}`` for the block's number, and the block's index; None outside the blocks."""
    for prefix, index in prefixes:
        if name.startswith(prefix):
            head, _, _ = prefix[:-1].rpartition(".")
            return f"{head}.{{}}.{name[len(prefix) :]}", index
    return name, None


def _kinds(model: nn.Module) -> dict[int, str]:
    """Kind of each parameter by ``id``; a tied table is an embedding."""
    kinds: dict[int, str] = {}
    for part in model.modules():
        weight = getattr(part, "weight", None)
        if isinstance(part, nn.Embedding):
            kinds[id(weight)] = "embedding"
        elif isinstance(part, nn.Linear):
            kinds.setdefault(id(weight), "linear")
    return kinds


# -- what blocks keep -----------------------------------------------------------------------------------------------


def kept_inputs(model: nn.Module, chosen: Collection[int]) -> tuple[KeptInputs, ...]:
    """Per block, what is kept only because chosen matrices read it.

    Args:
        model: The model.
        chosen: ``id`` of each parameter that trains.
    """
    dropouts = _adapter_dropouts(model)
    return tuple(
        _kept(block, own, set(chosen), dropouts)
        for (_, block), own in zip(find_blocks(model), block_matrices(model), strict=True)
    )


def _kept(block: nn.Module, own: Sequence[Matrix], chosen: set[int], dropouts: dict[int, float]) -> KeptInputs:
    places = {id(each.weight): index for index, one in enumerate(attentions(block)) for each in one.matrices}
    reading = {id(each.weight) for one in attentions(block) for each in one.projections}
    states: dict[tuple[str, int, int], int] = {}
    copies = each_input = inner = masks = 0
    for matrix in own:
        if id(matrix.weight) not in chosen:
            continue
        if "lora_B" in matrix.path:
            inner += matrix.inputs
            continue
        key = id(matrix.weight)
        dropped = dropouts.get(key, 0.0) > 0
        attends, projects = key in places, key in reading
        kept_already = attends and not projects  # the output projection reads what fused attention keeps
        place = ("own", key, 0) if dropped else ("reads", places.get(key, -1), matrix.inputs)
        if dropped or not kept_already:
            states[place] = matrix.inputs
        wide = not attends and matrix.inputs > matrix.outputs  # its input is the product of 16-bit states
        copies += matrix.inputs if dropped or not (kept_already or wide) else 0
        copies += matrix.inputs if wide and not dropped else 0
        each_input += matrix.inputs
        masks += matrix.inputs if dropped else 0
    adapters = sum(each.entries for each in own if "lora_" in each.path)
    return KeptInputs(
        states=sum(states.values()), copies=copies, each=each_input, inner=inner, masks=masks, adapters=adapters
    )


def _adapter_dropouts(model: nn.Module) -> dict[int, float]:
    """Dropout before each first adapter matrix, by ``id`` of its weight."""
    rates: dict[int, float] = {}
    for part in model.modules():
        drops, firsts = getattr(part, "lora_dropout", None), getattr(part, "lora_A", None)
        if not isinstance(drops, nn.ModuleDict) or not isinstance(firsts, nn.ModuleDict):
            continue
        for name, first in firsts.items():
            rates[id(getattr(first, "weight", None))] = float(getattr(drops[name], "p", 0.0)) if name in drops else 0.0
    return rates


def with_kept_states(model: nn.Module, blocks: Sequence[BlockFacts]) -> tuple[BlockFacts, ...]:
    """Facts of the blocks with what their attention, norms and activation functions keep.

    Args:
        model: The model.
        blocks: Its blocks.
    """
    config = text_config(model)
    eager = getattr(config, "_attn_implementation", "sdpa") == "eager"
    heads = int(getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", None) or 0)
    # A bias that trains needs the probabilities, which fused kernels do not give.
    biased = any("relative_attention_bias" in name and each.requires_grad for name, each in model.named_parameters())

    def score_heads(facts: BlockFacts) -> int:
        return heads * ((eager or biased) * bool(facts.attention_width) + eager * bool(facts.cross_width))

    return tuple(
        dataclasses.replace(
            facts,
            score_heads=score_heads(facts),
            keeps_normalised=not any(isinstance(part, nn.LayerNorm) for part in block.modules()),
            activation_copies=_activation_copies(block),
        )
        for (_, block), facts in zip(find_blocks(model), blocks, strict=True)
    )


def _activation_copies(block: nn.Module) -> int:
    """States that the block's activation function saves; counted by running it on a few numbers."""
    found = [part for part in block.modules() if type(part).__module__.endswith("transformers.activations")]
    if not found:
        return 1
    saved: set[int] = set()
    held: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() > 1:
            held.append(tensor)
            saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.enable_grad():
        found[0](torch.ones(4, device="cpu", requires_grad=True))
    return max(1, len(saved))
