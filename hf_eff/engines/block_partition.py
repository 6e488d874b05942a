"""The blocks of a model: which parameters train together, in forward order, each in exactly one place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from hf_eff.engines.module_tree import find_blocks, input_embedding, output_head
from hf_eff.errors import PlanError


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


def partition_layers(
    model: nn.Module,
    candidates: Collection[str],
    *,
    layers_per_block: int = 1,
    include_embedding: bool = False,
    include_head: bool = False,
    always_active: Sequence[str] = (),
) -> Partition:
    """Split the candidates of a model into blocks of consecutive layers.

    Args:
        model: The unwrapped model; adapters inside a layer belong to that layer.
        candidates: Names, as in ``model.named_parameters()``, that may train. A tied tensor has one
            name there, its first, and so lies in one block.
        layers_per_block: Layers a block holds, at least 1; the last block may hold fewer.
        include_embedding: Make what lies before the layers (token, position and type embeddings) the
            first block.
        include_head: Make all else outside the layers (final norm, pooler, output head) the last
            block; with ``include_embedding=False`` it takes the tensor that head and embedding share.
        always_active: Names of parameters or modules, or parts of such names between dots, that train at
            every step.

    Raises:
        PlanError: No layer holds a candidate, or an entry of ``always_active`` matches none.
    """
    left = [name for name, _ in model.named_parameters() if name in candidates]
    always = _take_always(left, always_active)
    layers = _take_layers(model, left)
    embedding, head = _take_outside(model, left, shared_in_head=include_head and not include_embedding)
    parts = [
        *([("embedding", embedding)] if include_embedding and embedding else []),
        *_grouped(layers, layers_per_block),
        *([("head", head)] if include_head and head else []),
    ]
    return Partition(
        labels=tuple(label for label, _ in parts),
        blocks=tuple(names for _, names in parts),
        always=always,
        frozen=(() if include_embedding else embedding) + (() if include_head else head),
    )


def _take(names: list[str], prefixes: Sequence[str]) -> tuple[str, ...]:
    """Remove from ``names``, and return, those that equal a prefix or lie below it."""
    return _remove(names, [name for name in names if any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes)])


def _take_always(names: list[str], parts: Sequence[str]) -> tuple[str, ...]:
    """Remove from ``names``, and return, those that hold one of ``parts`` as whole words between dots."""
    taken: tuple[str, ...] = ()
    for part in parts:
        found = _remove(names, [name for name in names if f".{part.strip('.')}." in f".{name}."])
        if not found:
            raise PlanError(
                f"always_active={part!r} matches no trainable parameter; give the name of a parameter or module as "
                "model.named_parameters() lists it (a tied tensor has the first of its names)."
            )
        taken += found
    return taken


def _remove(names: list[str], taken: Sequence[str]) -> tuple[str, ...]:
    gone = set(taken)
    names[:] = [name for name in names if name not in gone]
    return tuple(taken)


def _take_layers(model: nn.Module, names: list[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Pairs (layer, its parameters) for the layers that hold any of ``names``; these are removed from it."""
    stack = find_blocks(model)
    layers = [(layer, taken) for layer, _ in stack if (taken := _take(names, [layer]))]
    if not layers:
        what = "has no trainable parameter inside its layers" if stack else "has no stack of alike layers"
        raise PlanError(
            f"{type(model).__name__} {what} and cannot be trained block by block; use memory='full' or memory='lora'."
        )
    return layers


def _grouped(layers: list[tuple[str, tuple[str, ...]]], size: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    for start in range(0, len(layers), size):
        group = layers[start : start + size]
        yield " ".join(label for label, _ in group), tuple(name for _, names in group for name in names)


def _take_outside(
    model: nn.Module, names: list[str], *, shared_in_head: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split what lies outside the layers into embedding and head; a shared tensor goes to one of them."""
    embedding = _take(names, _embedding_prefixes(model))
    head = output_head(model)
    in_head = {id(tensor) for tensor in head.parameters()} if head is not None else set()
    shared = [name for name in embedding if shared_in_head and id(model.get_parameter(name)) in in_head]
    return tuple(name for name in embedding if name not in shared), (*names, *shared)


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
