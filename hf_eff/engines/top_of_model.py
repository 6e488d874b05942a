"""The last layers of a model and what comes after them, by the names of their parameters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hf_eff.engines.module_tree import find_blocks, input_embedding, output_head
from hf_eff.errors import PlanError


@dataclass(frozen=True)
class TopNames:
    """Names as in ``model.named_parameters()``.

    Attributes:
        layers: Parameters of the last layers.
        norm: Those after the last layer that are not the head's.
        head: The output head's; empty when it shares the embedding's weight.
        tied: Whether it does.
    """

    layers: frozenset[str]
    norm: frozenset[str]
    head: frozenset[str]
    tied: bool

    @property
    def all(self) -> frozenset[str]:
        """All of them."""
        return self.layers | self.norm | self.head


def parameters_of_top(model: nn.Module, count: int, *, include_norm: bool, include_head: bool) -> TopNames:
    """Parameters of the last ``count`` layers and, where asked for, of the norm and the head after them.

    What comes after the layers is told from what comes before by the order of the module tree; parameters of a head
    that is defined outside it all are the head's wherever they stand.

    Args:
        model: Any model with a stack of layers; of an encoder-decoder the decoder's are the last.
        count: Layers from the end.
        include_norm: Whether ``norm`` is wanted.
        include_head: Whether ``head`` is wanted.

    Raises:
        PlanError: The model has no stack of layers.
    """
    blocks = find_blocks(model)
    if not blocks:
        raise PlanError(f"{type(model).__name__} has no layers to choose the last ones of; use memory='full'.")
    names = [name for name, _ in model.named_parameters()]
    top = frozenset(name for name in names if any(name.startswith(f"{block}.") for block, _ in blocks[-count:]))
    after = _after(model, blocks[-1][0])
    shared = {id(parameter) for parameter in _parameters(input_embedding(model))}
    in_head = {id(parameter) for parameter in _parameters(output_head(model))}
    head = frozenset(name for name in after if id(model.get_parameter(name)) in in_head - shared)
    rest = frozenset(name for name in after if id(model.get_parameter(name)) not in in_head | shared)
    return TopNames(
        layers=top,
        norm=rest if include_norm else frozenset(),
        head=head if include_head else frozenset(),
        tied=bool(in_head & shared),
    )


def _parameters(module: nn.Module | None) -> list[nn.Parameter]:
    return [] if module is None else list(module.parameters())


def _after(model: nn.Module, last_block: str) -> list[str]:
    """Parameters registered after the stack of layers."""
    stack = last_block.rpartition(".")[0]
    names = [name for name, _ in model.named_parameters()]
    inside = [index for index, name in enumerate(names) if name.startswith(f"{stack}." if stack else last_block)]
    return names[max(inside, default=-1) + 1 :]
