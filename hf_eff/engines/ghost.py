"""Inner products and norms of per-example gradients, without writing the gradients out where that is cheaper.

The gradient of example b with respect to the weight of y = x W^T is G_b = sum over tokens t of
g_bt x_bt^T, with g the slope of its loss with respect to y. Two ways lead to the inner product:

    token form      <G_a, G_b> = sum over s, t of <g_as, g_bt> <x_as, x_bt>      T^2 (o + i) a pair
    written out     sum over entries of G_a * G_b                                T o i an example, o i a pair

The token form is taken where 2 T^2 <= o i, as in arXiv:2110.05679; LoRA factors are always written
out. Of an embedding the inputs are one-hot: tokens meet where their ids are equal. A bias sees the sum
of slopes, the weight of a norm the sum of slope times normalised input. A weight that is used twice,
such as a head tied to the embedding, is one parameter whose gradient is a sum; its cross terms count.

``.grad`` of no parameter is read or written.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf_eff.engines.example_gradients import Signal, module_signals
from hf_eff.errors import PlanError
from hf_eff.numerics.example_loss import Reduction

# B, n examples, T, S tokens, o outputs and i inputs of a module, p entries of a vector

_ENTRIES = 2**24
"""Upper bound of the numbers held at a time beside slopes and inputs: 64 MiB in float32."""


@dataclass(frozen=True)
class Outer:
    """Gradient of a matrix: slopes [B, T, o] and inputs [B, T, i]."""

    slopes: Tensor
    inputs: Tensor
    written_out: bool


@dataclass(frozen=True)
class Table:
    """Gradient of an embedding: slopes [B, T, o] and ids [B, T]."""

    slopes: Tensor
    ids: Tensor


@dataclass(frozen=True)
class Vector:
    """Gradient of a bias or of a norm's weight: [B, p]."""

    values: Tensor


Part = Outer | Table | Vector
Parts = dict[str, list[Part]]
"""What each parameter's gradient is the sum of, by name; at most one part of a kind."""


def parameter_modules(root: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """Modules below ``root`` that hold parameters of their own, by name.

    Args:
        root: Where to look; itself included.
        prefix: Name of ``root`` in the model.

    Raises:
        PlanError: The gradient of a module's parameters has no known form.
    """
    found = {}
    for name, module in root.named_modules(prefix=prefix):
        if next(module.parameters(recurse=False), None) is None:
            continue
        if not (_is_linear(module) or _is_table(module) or _is_norm(module)):
            raise PlanError(
                f"gradients of single examples are not known for {name} ({type(module).__name__}): known are linear "
                "layers, embeddings, layer and RMS norms; choose params='lora' or 'lm_head'."
            )
        found[name] = module
    return found


def gradient_parts(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batch: Mapping[str, Any],
    *,
    is_causal_lm: bool,
    reduction: Reduction = "mean",
    compute_dtype: torch.dtype | None = None,
) -> Parts:
    """Per-example gradients of the parameters of some modules, in factors.

    Args:
        model: Unwrapped, in evaluation mode.
        modules: From ``parameter_modules``, or LoRA factors. Parameters that do not require gradients are left out.
        batch: A padded batch on the model's device, one example a row, with ``labels``.
        is_causal_lm: Whether labels are shifted by one.
        reduction: What each example's summed loss is divided by; see ``example_losses``.
        compute_dtype: Autocast type of the forward; None computes in the type of the weights.

    Raises:
        DataError: Rows of the batch are not independent examples, or no module took part.
        PlanError: The model's training loss couples the rows of a batch.
    """
    trained = {n: m for n, m in modules.items() if any(p.requires_grad for p in m.parameters(recurse=False))}
    options: dict[str, Any] = {"is_causal_lm": is_causal_lm, "reduction": reduction, "compute_dtype": compute_dtype}
    if is_causal_lm and any(_is_table(module) for module in trained.values()):
        batch = _with_positions(model, batch)
    signals = module_signals(model, trained, batch, **options)
    names: dict[int, str] = {}
    parts: Parts = {}
    for name in list(signals):
        module = trained[name]
        for key, part in _module_parts(name, module, signals.pop(name)):
            parameter = names.setdefault(id(getattr(module, key)), f"{name}.{key}")
            parts[parameter] = _merged(parts.get(parameter, []), part)
    return parts


def squared_norms(parts: Parts) -> Tensor:
    """[B] squared length of each example's gradient over all parameters."""
    return torch.stack([_square(group) for group in parts.values()]).sum(dim=0)


def gram(left: Parts, right: Parts | None = None) -> Tensor:
    """Inner products of the gradients of two batches, or of one with itself.

    Args:
        left: Parts of n examples.
        right: Parts of m examples, of the same modules; None for ``left``.

    Returns:
        [n, m], summed over parameters in float32, or float64 when the parts are.
    """
    other = left if right is None else right
    return torch.stack([_products(left[name], other[name]) for name in left if name in other]).sum(dim=0)


def _with_positions(model: Any, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch with positions for every row: one row of them for all would mix the gradients of their embedding."""
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    ids = batch.get("input_ids")
    takes_positions = "position_ids" in inspect.signature(type(core).forward).parameters
    if not isinstance(ids, Tensor) or not takes_positions or "position_ids" in batch:
        return batch
    mask = batch.get("attention_mask")
    seen = torch.ones_like(ids) if mask is None else mask.long()
    return {**batch, "position_ids": (seen.cumsum(dim=1) - 1).clamp(min=0)}


def _is_linear(module: nn.Module) -> bool:
    plain = type(module).forward is nn.Linear.forward
    return plain or type(module).__name__ == "Conv1D"


def _is_table(module: nn.Module) -> bool:
    # Subclasses that scale their output have another gradient.
    return type(module).forward is nn.Embedding.forward


def _is_norm(module: nn.Module) -> bool:
    named = type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
    return named and all(parameter.dim() == 1 for parameter in module.parameters(recurse=False))


def _module_parts(name: str, module: nn.Module, signals: Sequence[Signal]) -> Iterator[tuple[str, Part]]:
    """Gradients of a module's own parameters.

    Yields:
        The parameter's name in the module, and a part of its gradient.
    """
    for slope, inputs in signals:
        exact = _tokens(slope).to(torch.promote_types(slope.dtype, torch.float32))
        weight: Any = module.weight
        bias: Any = getattr(module, "bias", None)
        if weight.requires_grad:
            if _is_table(module):
                yield "weight", _table(module, exact, inputs)
            elif _is_norm(module):
                yield "weight", Vector((exact * _tokens(_normalised(module, inputs)).to(exact.dtype)).sum(dim=1))
            else:
                yield "weight", _outer(name, exact, inputs)
        if bias is not None and bias.requires_grad:
            yield "bias", Vector(exact.sum(dim=1))


def _tokens(values: Tensor) -> Tensor:
    """[B, T, features] from [B, ..., features]."""
    return values.reshape(len(values), -1, values.shape[-1])


def _outer(name: str, slopes: Tensor, inputs: Tensor) -> Outer:
    inputs = _tokens(inputs).to(slopes.dtype)
    tokens, entries = slopes.shape[1], slopes.shape[2] * inputs.shape[2]
    return Outer(slopes, inputs, written_out=".lora_" in name or 2 * tokens**2 > entries)


def _table(module: Any, slopes: Tensor, ids: Tensor) -> Table:
    ids = ids.reshape(len(ids), -1)
    if module.padding_idx is not None:
        slopes = slopes.masked_fill((ids == module.padding_idx)[..., None], 0.0)
    return Table(slopes, ids)


def _normalised(module: nn.Module, inputs: Tensor) -> Tensor:
    """What the weight of a norm is multiplied with: the output is linear in the weight, whatever its offset."""
    weight: Any = module.weight
    with torch.no_grad():
        one, none = (
            functional_call(module, {"weight": weight.new_full(weight.shape, value)}, (inputs,)) for value in (1.0, 0.0)
        )
    return one - none


def _merged(group: list[Part], part: Part) -> list[Part]:
    """The parts with one more: parts of a kind become one, of more tokens."""
    for place, known in enumerate(group):
        joined = _joined(known, part)
        if joined is not None:
            return [*group[:place], joined, *group[place + 1 :]]
    return [*group, part]


def _joined(first: Part, second: Part) -> Part | None:
    if isinstance(first, Vector) and isinstance(second, Vector):
        return Vector(first.values + second.values)
    if isinstance(first, Table) and isinstance(second, Table):
        return Table(*(torch.cat(pair, dim=1) for pair in ((first.slopes, second.slopes), (first.ids, second.ids))))
    if isinstance(first, Outer) and isinstance(second, Outer):
        slopes, inputs = (torch.cat(p, dim=1) for p in ((first.slopes, second.slopes), (first.inputs, second.inputs)))
        return Outer(slopes, inputs, first.written_out or 2 * slopes.shape[1] ** 2 > slopes.shape[2] * inputs.shape[2])
    return None


def _square(group: Sequence[Part]) -> Tensor:
    """[B] squared length of the sum of the parts of one parameter."""
    total = torch.stack([_square_of(part) for part in group]).sum(dim=0)
    for outer, table in _ties(group, group):
        total += 2 * torch.stack([_tied(outer, table, row, slice(row, row + 1))[0] for row in range(len(table.ids))])
    return total


def _square_of(part: Part) -> Tensor:
    if isinstance(part, Vector):
        return part.values.square().sum(dim=1)
    rows = range(len(part.slopes))
    if isinstance(part, Outer) and part.written_out:
        return torch.stack([(part.slopes[row].T @ part.inputs[row]).square().sum() for row in rows])
    return torch.cat([_by_tokens(part, part, slice(row, row + 1), slice(row, row + 1))[0] for row in rows])


def _products(left: Sequence[Part], right: Sequence[Part]) -> Tensor:
    """[n, m] inner products of the gradients of one parameter."""
    total: Any = 0
    for first in left:
        for second in right:
            if isinstance(first, Vector) and isinstance(second, Vector):
                total = total + first.values @ second.values.T
            elif type(first) is type(second):
                total = total + _blocked(first, second)
    for outer, table in _ties(left, right):
        total = total + torch.stack([_tied(outer, table, row) for row in range(len(table.ids))], dim=1)
    for outer, table in _ties(right, left):
        total = total + torch.stack([_tied(outer, table, row) for row in range(len(table.ids))])
    return total


def _blocked(left: Any, right: Any) -> Tensor:
    """[n, m] of two parts of a kind, a few examples at a time."""
    if isinstance(left, Outer) and left.written_out:
        step, form = max(1, _ENTRIES // (left.slopes.shape[2] * left.inputs.shape[2])), _by_entries
    else:
        step, form = max(1, int((_ENTRIES / (left.slopes.shape[1] * right.slopes.shape[1])) ** 0.5)), _by_tokens
    columns = _ranges(len(right.slopes), step)
    return torch.cat(
        [
            torch.cat([form(left, right, rows, some) for some in columns], dim=1)
            for rows in _ranges(len(left.slopes), step)
        ]
    )


def _by_entries(left: Outer, right: Outer, rows: slice, columns: slice) -> Tensor:
    first, second = (
        torch.bmm(part.slopes[place].transpose(1, 2), part.inputs[place]).flatten(1)
        for part, place in ((left, rows), (right, columns))
    )
    return first @ second.T


def _by_tokens(left: Any, right: Any, rows: slice, columns: slice) -> Tensor:
    """[rows, columns] of two parts of a kind, outer products or tables, in the token form."""
    slopes, others = left.slopes[rows], right.slopes[columns]
    weight = slopes.flatten(0, 1) @ others.flatten(0, 1).T
    if isinstance(left, Table):
        weight *= left.ids[rows].reshape(-1, 1) == right.ids[columns].reshape(1, -1)
    else:
        weight *= left.inputs[rows].flatten(0, 1) @ right.inputs[columns].flatten(0, 1).T
    return weight.view(len(slopes), slopes.shape[1], len(others), others.shape[1]).sum(dim=(1, 3))


def _ties(left: Sequence[Part], right: Sequence[Part]) -> list[tuple[Outer, Table]]:
    """Pairs of a head on the left and the embedding that shares its weight on the right."""
    heads = [part for part in left if isinstance(part, Outer)]
    return [(head, part) for part in right if isinstance(part, Table) for head in heads]


def _tied(outer: Outer, table: Table, row: int, examples: slice = slice(None)) -> Tensor:
    """[examples] inner products of gradients of a head with those of an example's embedding, both of one weight."""
    met = outer.slopes[examples][:, :, table.ids[row]]
    return (met * (outer.inputs[examples] @ table.slopes[row].T)).sum(dim=(1, 2))


def _ranges(stop: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, stop)) for start in range(0, stop, step)]
