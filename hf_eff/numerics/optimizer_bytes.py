"""Bytes of optimizer state, for every optimizer that transformers can name, from the shapes of what trains.

With n entries of b bytes in a tensor of shape [rows, columns]:

    AdamW, schedule-free AdamW, GrokAdamW    2 n b, 2 n b, 3 n b
    SGD, RMSprop, Adagrad                    a copy of the tensor for each of momentum, square and mean that is on
    Adafactor, AdaLomo                       4 (rows + columns); 4 n for a vector
    bitsandbytes                             4 n a state; 8-bit: n + 4 n / 256, but 4 n below 4096 entries
    torchao                                  8-bit or 4-bit: n or n / 2, and 4 n / 256; 2 n b below 4096 entries
    GaLore, APOLLO                           AdamW's on the projected gradient, and the projection

Paged states count as the host's on an accelerator: they leave it when memory is short.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hf_eff.contracts.cost import ModelFacts, TensorFacts, TrainableFacts
from hf_eff.errors import OptionError

_BLOCK = 256
_SMALL = 4096
"""Entries below which low-bit optimizers keep a tensor's state whole."""
_PAGED = 100_000
"""Entries from which bitsandbytes pages a state."""
_TYPE_BYTES = {"float64": 8.0, "float32": 4.0, "bfloat16": 2.0, "float16": 2.0}


@dataclass(frozen=True)
class StateBytes:
    """Bytes of state: on the device, and in host memory instead of it."""

    device: float = 0.0
    host: float = 0.0

    def scaled(self, factor: float) -> StateBytes:
        """The same for ``factor`` times as much."""
        return StateBytes(self.device * factor, self.host * factor)


@dataclass(frozen=True)
class _Choice:
    """An optimizer with its options."""

    name: str
    options: Mapping[str, str]
    targets: str | tuple[str, ...]

    def number(self, key: str, default: float) -> float:
        return float(self.options.get(key, default))

    def on(self, key: str) -> bool:
        return self.options.get(key, "").lower() in ("true", "1", "yes", "y", "on", "t")


def optimizer_state_bytes(
    optim: str,
    model: ModelFacts,
    trainable: TrainableFacts,
    *,
    optim_args: str = "",
    target_modules: str | tuple[str, ...] = (),
    device: str = "cpu",
    in_float32: bool = False,
) -> StateBytes:
    """Bytes of state that an optimizer holds after its first step.

    Args:
        optim: A name that ``TrainingArguments.optim`` takes.
        model: The model; its trained tensors stand in where ``trainable`` lists none.
        trainable: What receives updates.
        optim_args: Options as ``TrainingArguments.optim_args`` writes them.
        target_modules: ``TrainingArguments.optim_target_modules``.
        device: Type of the device; on ``"cpu"`` nothing is paged.
        in_float32: Whether the optimizer works on four-byte copies of the parameters.

    Raises:
        OptionError: The name is unknown.
    """
    form = _FORMS.get(optim)
    if form is None:
        raise OptionError(f"optim={optim!r} has no known state; known are {', '.join(sorted(_FORMS))}.")
    choice = _Choice(optim, _parsed(optim_args), target_modules)
    groups, scale = trained_tensors(model, trainable)
    if in_float32:
        groups = [(replace(tensor, bytes=4.0), count) for tensor, count in groups]
    total = sum(count * form(tensor, choice) for tensor, count in groups) * scale
    if not optim.startswith("paged") or device == "cpu":
        return StateBytes(total)
    paged = sum(count * form(tensor, choice) for tensor, count in groups if _entries(tensor) >= _PAGED) * scale
    return StateBytes(total - paged, paged)


def step_bytes(optim: str, model: ModelFacts, trainable: TrainableFacts, device: str = "cpu") -> float:
    """Bytes that an optimizer's step multiplies out: none where it is fused.

    On an accelerator torch's own optimizers work on all tensors at once, elsewhere on one at a time.

    Args:
        optim: A name that ``TrainingArguments.optim`` takes.
        model: The model.
        trainable: What receives updates.
        device: Type of the device.
    """
    form = _FORMS.get(optim, _ADAMW)
    if "fused" in optim or "8bit" in optim or updates_in_backward(optim) or form(_ENTRY, _PLAIN) == 0:
        return 0.0
    if device != "cpu" and optim in _FOREACH:
        return trainable.params * model.param_bytes
    return 2.0 * largest_tensor(model, trainable) * model.param_bytes


def is_stateless(optim: str, optim_args: str = "") -> bool:
    """Whether an optimizer keeps nothing from step to step."""
    return optim == "lomo" or (optim == "sgd" and float(_parsed(optim_args).get("momentum", 0)) == 0)


def updates_in_backward(optim: str) -> bool:
    """Whether an optimizer applies each gradient as soon as it exists and frees it."""
    return optim in ("lomo", "adalomo") or optim.endswith("_layerwise")


def largest_tensor(model: ModelFacts, trainable: TrainableFacts) -> float:
    """Entries of the largest trained parameter."""
    groups, _ = trained_tensors(model, trainable)
    return float(max((_entries(tensor) for tensor, _ in groups), default=0))


def trained_tensors(model: ModelFacts, part: TrainableFacts) -> tuple[list[tuple[TensorFacts, int]], float]:
    """Tensors that receive updates with how many there are of each, and a factor that makes up for unlisted ones.

    Args:
        model: The model. The tensors of ``model.trainable`` that lie in the blocks of ``part``, and outside them where
            embedding or head are in it, serve for a part that lists none.
        part: What receives updates.
    """
    if part.params <= 0:
        return [], 1.0
    known = part.tensors or (model.trainable.tensors if model.trainable is not None else ())
    active = {index for index, entries in enumerate(part.block_matmul_params) if entries}
    outside = part.lowest_block < 0 or part.head_matmul_params > 0
    groups = []
    for tensor in known:
        count = 1 if not tensor.blocks else len(tensor.blocks if part.tensors else active.intersection(tensor.blocks))
        if count and (tensor.blocks or outside or part.tensors):
            groups.append((tensor, count))
    total = sum(_entries(tensor) * count for tensor, count in groups)
    return (groups, part.params / total) if total else (_guessed(model, part), 1.0)


def _guessed(model: ModelFacts, part: TrainableFacts) -> list[tuple[TensorFacts, int]]:
    """Tensors of a part of which only sizes are known: its share of each block, and of what lies outside."""
    width = max(1, model.hidden_size)
    inner = [
        block.params if entries >= block.matmul_params + block.cross_matmul_params else entries
        for block, entries in zip(model.blocks, part.block_matmul_params, strict=True)
    ]
    table = min(max(0, part.params - sum(inner)), max(model.embedding_params, part.head_matmul_params))
    sizes = [(size, "linear") for size in inner if size] + ([(table, "embedding")] if table else [])
    listed = sum(size for size, _ in sizes)
    factor = part.params / listed if listed else 1.0
    sizes = sizes or [(part.params, "linear")]

    def matrix(size: float, kind: str) -> TensorFacts:
        rows = max(1, round(size * factor / width))
        return TensorFacts(name="", shape=(rows, width), kind=kind)  # four bytes: the most that a state takes

    return [(matrix(size, kind), 1) for size, kind in sizes]


# -- one tensor -----------------------------------------------------------------------------------------------------

_Form = Callable[[TensorFacts, _Choice], float]


def _entries(tensor: TensorFacts) -> int:
    return math.prod(tensor.shape)


def _copies(copies: float, step_bytes: float = 0.0) -> _Form:
    """So many tensors like the parameter, and a counter."""
    return lambda tensor, _: copies * _entries(tensor) * tensor.bytes + step_bytes


def _sgd(tensor: TensorFacts, choice: _Choice) -> float:
    return _entries(tensor) * tensor.bytes if choice.number("momentum", 0.0) else 0.0


def _rmsprop(tensor: TensorFacts, choice: _Choice) -> float:
    copies = 1 + bool(choice.number("momentum", 0.0)) + choice.on("centered")
    return copies * _entries(tensor) * tensor.bytes + 4


def _anyprecision(tensor: TensorFacts, choice: _Choice) -> float:
    kinds = ["momentum_dtype", "variance_dtype"]
    sizes = [_TYPE_BYTES.get(choice.options.get(kind, "float32"), 4.0) for kind in kinds]
    if choice.on("use_kahan_summation"):
        sizes.append(_TYPE_BYTES.get(choice.options.get("compensation_buffer_dtype", "bfloat16"), 2.0))
    return _entries(tensor) * sum(sizes) + 4


def _stable_adamw(tensor: TensorFacts, choice: _Choice) -> float:
    asked = choice.options.get("kahan_sum")
    compensates = tensor.bytes < 4 if asked is None else bool(asked) and tensor.bytes < 4
    return (3 if compensates else 2) * _entries(tensor) * tensor.bytes + 4


def _factored(shape: tuple[int, ...]) -> float:
    """Row and column means in four bytes."""
    if len(shape) < 2:
        return 4.0 * math.prod(shape)
    return 4.0 * (math.prod(shape[:-1]) + math.prod((*shape[:-2], shape[-1])))


def _adafactor(tensor: TensorFacts, _choice: _Choice) -> float:
    return _factored(tensor.shape) + 4


def _bitsandbytes(states: int) -> _Form:
    def form(tensor: TensorFacts, choice: _Choice) -> float:
        entries = _entries(tensor)
        if "8bit" not in choice.name:
            return 4.0 * states * entries
        if entries < _SMALL or tensor.kind == "embedding":
            return 4.0 * states * entries
        return states * (entries + 4.0 * math.ceil(entries / _BLOCK))

    return form


def _torchao(bits: int) -> _Form:
    def form(tensor: TensorFacts, choice: _Choice) -> float:
        entries, block = _entries(tensor), int(choice.number("block_size", _BLOCK))
        if entries < _SMALL or entries % block:
            return 2 * entries * tensor.bytes + 4
        return 2 * (entries * bits / 8 + 4 * entries / block + 4 * 2**bits) + 4

    return form


# -- low rank -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Projected:
    """A gradient of shape [rows, columns] after its projection to rank r.

    Attributes:
        shape: Shape of what the moments are kept of.
        projection: Entries of the projection.
        factors: Entries of the singular vectors that the projection was taken from.
    """

    shape: tuple[int, int]
    projection: float
    factors: float

    @classmethod
    def of(cls, tensor: TensorFacts, choice: _Choice) -> _Projected | None:
        """None where the tensor is not projected."""
        if len(tensor.shape) != 2 or tensor.kind != "linear" or not _is_target(tensor, choice.targets):
            return None
        (rows, columns), kind = tensor.shape, choice.options.get("proj_type", "std")
        small = min(rows, columns)
        rank = min(int(choice.number("rank", 128)), small)
        if kind == "full":
            return cls((rank, rank), rank * (rows + columns), small * (rows + columns))
        right = {"std": rows >= columns, "reverse_std": rows < columns}.get(kind, kind == "right")
        if right:
            return cls((rows, rank), rank * columns, small * columns)
        return cls((rank, columns), rows * rank, rows * small)


def _galore_projection(projected: _Projected, bytes_per_entry: float) -> float:
    # galore-torch keeps a view of the singular vectors, and with it all of them, unless it has to cast to 16 bits.
    return bytes_per_entry * (projected.factors if bytes_per_entry >= 4 else projected.projection)


def _galore_adamw(tensor: TensorFacts, choice: _Choice) -> float:
    projected = _Projected.of(tensor, choice)
    if projected is None:
        return 2 * _entries(tensor) * tensor.bytes
    return 2 * math.prod(projected.shape) * tensor.bytes + _galore_projection(projected, tensor.bytes)


def _galore_8bit(tensor: TensorFacts, choice: _Choice) -> float:
    projected = _Projected.of(tensor, choice)
    entries = _entries(tensor) if projected is None else math.prod(projected.shape)
    held = 0.0 if projected is None else _galore_projection(projected, tensor.bytes)
    return held + (8.0 * entries if entries < _SMALL else 2 * (entries + 4.0 * math.ceil(entries / _BLOCK)))


def _galore_adafactor(tensor: TensorFacts, choice: _Choice) -> float:
    projected = _Projected.of(tensor, choice)
    if projected is None:
        return _adafactor(tensor, choice)
    return _factored(projected.shape) + _galore_projection(projected, 4.0) + 4


def _apollo(tensor: TensorFacts, choice: _Choice) -> float:
    projected = _Projected.of(tensor, choice)
    if projected is None:
        return 2 * _entries(tensor) * tensor.bytes
    return (2 * math.prod(projected.shape) + projected.projection) * tensor.bytes


def _is_target(tensor: TensorFacts, targets: Any) -> bool:
    """Whether a weight's module is among the targets, by transformers' rule: patterns, names and parts of names."""
    module = tensor.name.removesuffix(".weight").replace("{}", str(tensor.blocks[0] if tensor.blocks else 0))
    if isinstance(targets, str):
        return targets.replace("_", "-") == "all-linear" or bool(re.fullmatch(targets, module))
    if not tensor.name:
        return bool(targets)
    return any(target in module or re.fullmatch(target, module) for target in targets)


def _parsed(optim_args: str) -> dict[str, str]:
    pairs = (each.partition("=") for each in optim_args.replace(" ", "").split(",") if each)
    return {key: value for key, _, value in pairs}


_FOREACH = ("adamw_torch", "adagrad", "rmsprop")
_ENTRY, _PLAIN = TensorFacts(name="", shape=(1,)), _Choice("", {}, ())
_ADAMW = _copies(2, step_bytes=4)
_FORMS: dict[str, _Form] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused"), _ADAMW),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"), _bitsandbytes(2)),
    **dict.fromkeys(("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"), _bitsandbytes(3)),
    **dict.fromkeys(("lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit"), _bitsandbytes(1)),
    **dict.fromkeys(("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"), _bitsandbytes(1)),
    **dict.fromkeys(("galore_adamw", "galore_adamw_layerwise"), _galore_adamw),
    **dict.fromkeys(("galore_adamw_8bit", "galore_adamw_8bit_layerwise"), _galore_8bit),
    **dict.fromkeys(("galore_adafactor", "galore_adafactor_layerwise"), _galore_adafactor),
    **dict.fromkeys(("apollo_adamw", "apollo_adamw_layerwise"), _apollo),
    **dict.fromkeys(("schedule_free_adamw", "schedule_free_radam"), _copies(2)),
    "schedule_free_sgd": _copies(1),
    "adamw_anyprecision": _anyprecision,
    "adamw_torch_8bit": _torchao(8),
    "adamw_torch_4bit": _torchao(4),
    "adafactor": _adafactor,
    "adalomo": _adafactor,
    "adagrad": _copies(1, step_bytes=4),
    "rmsprop": _rmsprop,
    "sgd": _sgd,
    "lomo": _copies(0),
    "grokadamw": _copies(3),
    "stable_adamw": _stable_adamw,
}
