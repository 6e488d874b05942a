"""The blocks of a model: which parameters train together, in forward order, each in exactly one place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from hf_eff.engines.matrices import is_matrix
from hf_eff.engines.module_tree import find_blocks, input_embedding, output_head
from hf_eff.errors import PlanError
from hf_eff.numerics.trainable_blocks import ONE_LAYER_A_BLOCK, BlockLayout, Granularity

_Part = tuple[str, tuple[str, ...]]
"""Label and parameter names of a block."""


@dataclass(frozen=True)
class Partition:
    """Names of the candidate parameters, each in exactly one place.

    Attributes:
        labels: Per block, the layers it holds.
        blocks: Per block, its parameters, in forward order of the blocks.
        always: Parameters that train at every step.
        frozen: Candidates that never train.
    """

    labels: tuple[str, ...]
    blocks: tuple[tuple[str, ...], ...]
    always: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """SHA-256 over what trains when; equal for equal partitions."""
        return hashlib.sha256(json.dumps([self.blocks, self.always]).encode()).hexdigest()


def partition_model(
    model: nn.Module, candidates: Collection[str], layout: BlockLayout = ONE_LAYER_A_BLOCK
) -> Partition:
    """Cut the candidates of a model into blocks.

    Args:
        model: The unwrapped model; adapters inside a layer belong to that layer.
        candidates: Names, as in ``model.named_parameters()``, that may train. A tied tensor has one
            name there, its first, and so lies in one block: with the embedding, or with the head where
            the embedding is frozen and the head is not.
        layout: What a block is.

    Raises:
        PlanError: No layer holds a candidate, a name of ``always_active`` or of a custom block matches
            none, or two custom blocks claim one parameter.
    """
    left = [name for name, _ in model.named_parameters() if name in candidates]
    always = _take_named(left, layout.always_active, "always_active")
    if layout.custom:
        custom = _custom_parts(left, layout.custom)
        return _partition(custom, always, tuple(left))
    layers = _take_layers(model, left)
    inner = [part for layer in layers for part in _split(model, layer, layout.granularity)]
    outside = _take_outside(model, left, layout)
    before, after = _own_blocks(outside, layout)
    if layout.group_outside:
        parts = list(_grouped([*before, *inner, *after], layout.layers_per_block))
    else:
        parts = [*before, *_grouped(inner, layout.layers_per_block), *after]
    places = {"embedding": layout.embedding, "norm": layout.norm, "head": layout.head}
    constant = [name for key, names in outside.items() if places[key] == "always" for name in names]
    idle = [name for key, names in outside.items() if places[key] == "frozen" for name in names]
    return _partition(parts, (*always, *constant), tuple(idle))


def _partition(parts: Sequence[_Part], always: tuple[str, ...], frozen: tuple[str, ...]) -> Partition:
    labels, blocks = tuple(label for label, _ in parts), tuple(names for _, names in parts)
    return Partition(labels, blocks, always, frozen)


# -- by name --------------------------------------------------------------------------------------------------------


def _take(names: list[str], prefixes: Sequence[str]) -> tuple[str, ...]:
    """Remove from ``names``, and return, those that equal a prefix or lie below it."""
    return _remove(names, [name for name in names if any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes)])


def _take_named(names: list[str], parts: Sequence[str], option: str) -> tuple[str, ...]:
    """Remove from ``names``, and return, those that hold one of ``parts`` as whole words between dots."""
    taken: tuple[str, ...] = ()
    for part in parts:
        found = _remove(names, [name for name in names if f".{part.strip().strip('.')}." in f".{name}."])
        if not found:
            raise PlanError(
                f"{option}={part!r} matches no trainable parameter that is still free; give the name of a parameter or "
                "module as model.named_parameters() lists it (a tied tensor has the first of its names)."
            )
        taken += found
    return taken


def _custom_parts(names: list[str], blocks: Sequence[str]) -> list[_Part]:
    return [(block, _take_named(names, block.split("+"), "blocks")) for block in blocks]


def _remove(names: list[str], taken: Sequence[str]) -> tuple[str, ...]:
    gone = set(taken)
    names[:] = [name for name in names if name not in gone]
    return tuple(taken)


# -- layers and parts of layers -------------------------------------------------------------------------------------


def _take_layers(model: nn.Module, names: list[str]) -> list[_Part]:
    """Pairs (layer, its parameters) for the layers that hold any of ``names``; these are removed from it."""
    stack = find_blocks(model)
    layers = [(layer, taken) for layer, _ in stack if (taken := _take(names, [layer]))]
    if not layers:
        what = "has no trainable parameter inside its layers" if stack else "has no stack of alike layers"
        raise PlanError(
            f"{type(model).__name__} {what} and cannot be trained block by block; use memory='full' or memory='lora'."
        )
    return layers


def _split(model: nn.Module, layer: _Part, granularity: Granularity) -> list[_Part]:
    """Cut one layer; parts that hold no candidate are left out."""
    label, names = layer
    if granularity == "layer":
        return [layer]
    owners = {name: _matrix_of(model, label, name) for name in names}
    if granularity == "attn_mlp":
        inside = _attention_paths(model, label)
        attention = [name for name in names if owners[name] is None or name.startswith(inside)]
        parts = {"attention": attention, "feed-forward": [name for name in names if name not in set(attention)]}
    else:
        first = next((owner for owner in owners.values() if owner is not None), label)
        parts = {}
        for name in names:  # vectors beside the matrices go with the first
            parts.setdefault(owners[name] or first, []).append(name)
    return [(f"{label} {key}".strip(), tuple(own)) for key, own in parts.items() if own]


def _attention_paths(model: nn.Module, layer: str) -> tuple[str, ...]:
    """Beginnings of the names of what lies in a layer's attention modules."""
    named = model.get_submodule(layer).named_modules()
    return tuple(f"{layer}.{path}." for path, part in named if path and "attention" in type(part).__name__.lower())


def _matrix_of(model: nn.Module, layer: str, name: str) -> str | None:
    """The matrix a parameter belongs to: a linear module with its bias and adapters, or a tensor of experts.

    Returns:
        A name that is the same for all parameters of one matrix; None for norms and other vectors.
    """
    owner, dot, _ = name[len(layer) + 1 :].rpartition(".")
    words = owner.split(".") if dot else []
    for count in range(1, len(words) + 1):
        path = ".".join(words[:count])
        if is_matrix(model.get_submodule(f"{layer}.{path}")):
            return path
    if model.get_parameter(name).dim() >= 2:
        return name[len(layer) + 1 :]
    module = model.get_submodule(f"{layer}.{owner}" if owner else layer)
    wide = [key for key, tensor in module.named_parameters(recurse=False) if tensor.dim() >= 2]
    return f"{owner}.{wide[0]}".strip(".") if wide else None


def _grouped(parts: Sequence[_Part], size: int) -> Iterator[_Part]:
    for start in range(0, len(parts), size):
        group = parts[start : start + size]
        yield " ".join(label for label, _ in group), tuple(name for _, names in group for name in names)


# -- outside the layers ---------------------------------------------------------------------------------------------


def _take_outside(model: nn.Module, names: list[str], layout: BlockLayout) -> dict[str, tuple[str, ...]]:
    """Split what lies outside the layers into embedding, norm and head; a shared tensor goes to one of them."""
    head = output_head(model)
    in_head = {id(tensor) for tensor in head.parameters()} if head is not None else set()
    embedding = _take(names, _embedding_prefixes(model))
    to_head = layout.embedding == "frozen" and layout.head != "frozen"
    shared = [name for name in embedding if to_head and id(model.get_parameter(name)) in in_head]
    own = [name for name in names if id(model.get_parameter(name)) in in_head]
    return {
        "embedding": tuple(name for name in embedding if name not in shared),
        "norm": tuple(name for name in names if name not in own),
        "head": (*own, *shared),
    }


def _own_blocks(outside: dict[str, tuple[str, ...]], layout: BlockLayout) -> tuple[list[_Part], list[_Part]]:
    """Blocks before and after the layers."""
    before = [("embedding", outside["embedding"])] if layout.embedding == "block" else []
    last = [
        *(outside["norm"] if layout.norm == "block" else ()),
        *(outside["head"] if layout.head == "block" else ()),
    ]
    return [part for part in before if part[1]], [("head", tuple(last))] if last else []


def _embedding_prefixes(model: nn.Module) -> list[str]:
    """Every table outside the layers, and the largest part around the input embedding that holds no layer."""
    table = input_embedding(model)
    layers = [layer for layer, _ in find_blocks(model)]
    prefixes = [name for name, module in model.named_modules() if module is table or isinstance(module, nn.Embedding)]
    around = next((name for name, module in model.named_modules() if module is table), "")
    while around and not any(layer.startswith(f"{around}.") for layer in layers):
        prefixes.append(around)
        around = around.rpartition(".")[0]
    return prefixes
