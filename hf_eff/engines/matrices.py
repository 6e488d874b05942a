"""Weight matrices of a module: which ones multiply tokens, how large they are, and which attention they belong to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from hf_eff.engines.module_tree import find_blocks

_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_SEQUENCE_TASKS = ("ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction")


@dataclass(frozen=True)
class Matrix:
    """A weight that multiplies every token it sees.

    Attributes:
        path: Name of its module inside the module that was searched.
        inputs, outputs: Its shape, as the tokens see it (a packed 4-bit weight has another ``numel``).
        weight: The parameter.
        known: False when its module is of an unknown kind and ``entries`` is an estimate.
        visits: How often one token meets it; below 1 for a mixture of experts, above 1 for layers that repeat.
    """

    path: str
    inputs: int
    outputs: int
    weight: nn.Parameter
    known: bool = True
    visits: float = 1.0

    @property
    def entries(self) -> int:
        """Entries that multiply one token."""
        return round(self.inputs * self.outputs * self.visits)


@dataclass(frozen=True)
class Attention:
    """One attention module of a block, as its matrices show it.

    Attributes:
        matrices: All of them, adapters included.
        projections: Those that read the module's input: queries, keys, values, with the inner adapter matrices.
        width: heads x head size: inputs of the output projection.
        is_cross: Whether keys and values come from the encoder.
    """

    matrices: tuple[Matrix, ...]
    projections: tuple[Matrix, ...]
    width: int
    is_cross: bool = False

    @property
    def from_encoder(self) -> tuple[Matrix, ...]:
        """Key and value matrices of a cross-attention."""
        if not self.is_cross:
            return ()
        return tuple(each for each in self.matrices if _own_name(each.path)[:1] in ("k", "v"))


def matrices(module: nn.Module, experts_share: float = 1.0) -> list[Matrix]:
    """Weight matrices in use, in order of registration: adapters that are off and replaced originals are left out.

    Args:
        module: A model or a part of one.
        experts_share: Experts that a token visits, as a share of all.
    """
    idle = _idle_modules(module)
    found: list[Matrix] = []
    for path, part in module.named_modules():
        if id(part) not in idle:
            found.extend(_own_matrices(path, part, experts_share))
    return found


def block_matrices(model: nn.Module) -> list[list[Matrix]]:
    """Weight matrices of each block, in forward order of the blocks."""
    config, repeats = text_config(model), block_repeats(model)
    share = _experts_share(config)
    own = [matrices(block, share) for _, block in find_blocks(model)]
    if repeats == 1:
        return own
    return [[replace(each, visits=each.visits * repeats) for each in block] for block in own]


def outer_matrices(model: nn.Module) -> list[Matrix]:
    """Matrices outside the blocks that multiply every token.

    Poolers and heads that read one position a row are left out: they cost under one part in (layers x length).
    """
    if backbone_name(model).endswith(_SEQUENCE_TASKS):
        return []
    poolers = [name for name, part in model.named_modules() if type(part).__name__.endswith("Pooler")]
    skipped = tuple(f"{name}." for name in [*poolers, *(name for name, _ in find_blocks(model))])
    return [each for each in matrices(model) if not each.path.startswith(skipped)]


def block_repeats(model: nn.Module) -> int:
    """How often each block runs in one forward; above 1 where layers share weights (ALBERT)."""
    config, blocks = text_config(model), len(find_blocks(model))
    layers = getattr(config, "num_hidden_layers", None) or 0
    if getattr(config, "is_encoder_decoder", False) or not blocks or layers % blocks:
        return 1
    return max(1, layers // blocks)


def backbone_name(model: nn.Module) -> str:
    """Class name of the transformers model inside any wrappers."""
    from transformers import PreTrainedModel

    inner = next((part for part in model.modules() if isinstance(part, PreTrainedModel)), model)
    return type(inner).__name__


def text_config(model: nn.Module) -> Any:
    """Configuration of a model's language part; None for a module without one."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def is_matrix(module: nn.Module) -> bool:
    """Whether a module multiplies its input by one weight matrix, with adapters around it or not."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D" or hasattr(module, "base_layer")


def logical_sizes(model: nn.Module) -> dict[int, int]:
    """Entries of each parameter by ``id``, packed (4-bit) weights at the size they stand for."""
    sizes = {id(parameter): parameter.numel() for parameter in model.parameters()}
    for part in model.modules():
        weight = getattr(part, "weight", None)
        if isinstance(part, nn.Linear) and weight is not None and not weight.is_floating_point():
            sizes[id(weight)] = part.in_features * part.out_features
    return sizes


def attentions(block: nn.Module) -> list[Attention]:
    """Attention modules of a block in order of registration; outermost ones only."""
    found: list[tuple[str, Attention]] = []
    for path, part in block.named_modules():
        inside_another = any(path.startswith(f"{outer}.") for outer, _ in found)
        if not path or inside_another or "attention" not in type(part).__name__.lower():
            continue
        attention = _read_attention(path, part)
        if attention is not None:
            found.append((path, attention))
    return [attention for _, attention in found]


def _read_attention(path: str, part: nn.Module) -> Attention | None:
    """Split an attention module's matrices into projections of the input and the output projection."""
    own = matrices(part)
    while len({_own_name(each.path) for each in own}) == 1 and "." in own[0].path:  # a wrapper such as T5's layer
        name = _own_name(own[0].path)
        path, part = f"{path}.{name}", part.get_submodule(name)
        own = matrices(part)
    names = list(dict.fromkeys(_own_name(each.path) for each in own))
    if len(names) < 2:
        return None
    output = next((name for name in reversed(names) if name[:1] not in ("q", "k", "v")), names[-1])
    reads_input = [each for each in own if _own_name(each.path) != output and "lora_B" not in each.path]
    width = next(each.inputs for each in own if _own_name(each.path) == output)
    is_cross = any(mark in path.lower() for mark in ("cross", "encdec", "encoder_attn"))
    return Attention(tuple(own), tuple(reads_input), width, is_cross)


def _own_name(path: str) -> str:
    return path.partition(".")[0]


def _own_matrices(path: str, part: nn.Module, experts_share: float) -> list[Matrix]:
    """Matrices that a module holds itself, not through a child."""
    weight: Any = getattr(part, "weight", None)
    if isinstance(part, nn.Embedding):
        return []
    if isinstance(part, nn.Linear):
        return [Matrix(path, part.in_features, part.out_features, weight)]
    if type(part).__name__ == "Conv1D" and isinstance(weight, nn.Parameter):  # GPT-2's transposed linear layer
        return [Matrix(path, weight.shape[0], weight.shape[1], weight)]
    return _estimated(path, part, experts_share)


def _estimated(path: str, part: nn.Module, experts_share: float) -> list[Matrix]:
    """Parameters of two or more dimensions in a module of unknown kind, taken as matrices; 3-D ones as experts."""
    found = []
    for name, parameter in part.named_parameters(recurse=False):
        shape = [size for size in parameter.shape if size > 1]
        if len(shape) < 2:  # norms, biases, class tokens
            continue
        visits = experts_share if len(shape) == 3 else 1.0
        inputs = parameter.numel() // shape[-1]
        found.append(Matrix(f"{path}.{name}", inputs, shape[-1], parameter, known=False, visits=visits))
    return found


def _idle_modules(module: nn.Module) -> set[int]:
    """Parts that PEFT holds but does not run: adapters that are off, and originals that a trained copy replaces."""
    idle: set[int] = set()
    for layer in module.modules():
        active = _active_adapters(layer)
        if active is None:
            continue
        for name, child in layer.named_children():
            if isinstance(child, nn.ModuleDict):
                off = [part for key, part in child.items() if key not in active]
                idle.update(id(each) for part in off for each in part.modules())
            elif name == "original_module" and active:
                idle.update(id(each) for each in child.modules())
    return idle


def _active_adapters(layer: Any) -> list[str] | None:
    """Names of the adapters a PEFT layer applies; None for any other module."""
    if not hasattr(layer, "adapter_layer_names") or not hasattr(layer, "active_adapters"):
        return None
    if getattr(layer, "disable_adapters", False) or getattr(layer, "merged", False):
        return []
    return list(layer.active_adapters)


def _experts_share(config: Any) -> float:
    """Experts a token visits over all experts; 1 for a dense model."""
    total = next((getattr(config, name) for name in _NUM_EXPERTS if getattr(config, name, None)), 0)
    visited = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_k", None)
    return min(1.0, visited / total) if total and visited else 1.0
