"""A micro-batch done in parts of its rows: each part a forward and a backward of its own, with the same sum."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_eff.contracts.memory import StepContext
from hf_eff.engines.forward_only import forward_only
from hf_eff.errors import PlanError

IGNORED = -100
"""Label of a position without loss."""
_TOLERANCE = 1e-2
"""Relative: a loss in bf16 differs by a few parts in a thousand between two shapes of a batch."""
_FLATTENED = ("cu_seq_lens", "max_length_q", "max_length_k", "seq_idx")
_MEDIA = ("pixel_values", "image_", "video_", "input_features")
# Batches and rules of a model's loss: (how labels were given, whether a number of items was) -> rule. The models are
# held weakly, so that a method that is built anew for each micro-batch does not look again.
_KNOWN_RULES: weakref.WeakKeyDictionary[nn.Module, dict[tuple[int, bool], str]] = weakref.WeakKeyDictionary()


# -- batches --------------------------------------------------------------------------------------------------------


def num_rows(inputs: Mapping[str, Any]) -> int:
    """Rows of a batch: the first dimension of its token ids, embeddings or labels, else of its first tensor.

    Raises:
        PlanError: No tensor has rows.
    """
    named = (inputs[name] for name in ("input_ids", "inputs_embeds", "labels") if name in inputs)
    for value in (*named, *inputs.values()):
        if isinstance(value, torch.Tensor) and value.dim() >= 1:
            return value.shape[0]
    raise PlanError(f"a batch with {sorted(inputs)} has no tensor with rows and cannot be split by rows.")


def split_rows(inputs: Mapping[str, Any], parts: int) -> list[dict[str, Any]]:
    """Cut a batch into parts of almost equally many rows, in order.

    Args:
        inputs: The batch. Tensors whose first dimension is the rows are split (as views); everything else goes to
            every part as it is.
        parts: How many; at most the number of rows are made.

    Raises:
        PlanError: A row holds several documents, or a tensor of images lists them in another way than by rows.
    """
    rows = num_rows(inputs)
    count = max(1, min(parts, rows))
    if parts > 1:
        _refuse_unsplittable(inputs, rows)
    bounds = [round(rows * index / count) for index in range(count + 1)]
    return [_rows_of(inputs, slice(bounds[index], bounds[index + 1]), rows) for index in range(count)]


def trim_padding(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A batch without the columns at its right end that are padding in every row.

    The rest sees what it saw before; sums may round differently. A batch whose ``attention_mask`` is not
    [rows, length], or with a label on padding, is left as it is.
    """
    mask, labels = inputs.get("attention_mask"), inputs.get("labels")
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return dict(inputs)
    used = mask.bool().any(dim=0).nonzero()
    end = int(used[-1]) + 1 if len(used) else mask.shape[1]
    if isinstance(labels, torch.Tensor) and labels.shape == mask.shape and bool((labels[:, end:] != IGNORED).any()):
        return dict(inputs)
    cut = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    return {**inputs, **{name: value[:, :end] for name, value in cut.items() if value.shape[:2] == mask.shape}}


def _rows_of(inputs: Mapping[str, Any], part: slice | torch.Tensor, rows: int) -> dict[str, Any]:
    return {name: value[part] if _has_rows(value, rows) else value for name, value in inputs.items()}


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() >= 1 and value.shape[0] == rows


def _refuse_unsplittable(inputs: Mapping[str, Any], rows: int) -> None:
    if is_flattened(inputs):
        raise PlanError(
            "a row of this batch holds several documents (packing or padding_free), so that it cannot be split by "
            "rows; set packing=False and padding_free=False, or lower per_device_train_batch_size or max_length."
        )
    for name, value in inputs.items():
        if name.startswith(_MEDIA) and isinstance(value, torch.Tensor) and value.shape[:1] != (rows,):
            raise PlanError(
                f"{name} has {value.shape[0] if value.dim() else 0} entries for {rows} rows, so that this batch "
                "cannot be split by rows; lower per_device_train_batch_size and raise "
                "gradient_accumulation_steps instead."
            )


def is_flattened(inputs: Mapping[str, Any]) -> bool:
    """Whether a row of the batch holds several documents, by packing or ``padding_free``."""
    return any(name.startswith(_FLATTENED) for name in inputs) or (num_rows(inputs) == 1 and _restarts(inputs))


def _restarts(inputs: Mapping[str, Any]) -> bool:
    """Whether positions start again inside a row that no mask divides."""
    positions = inputs.get("position_ids")
    if not isinstance(positions, torch.Tensor) or positions.dim() != 2 or inputs.get("attention_mask") is not None:
        return False
    return bool((positions[:, 1:] != positions[:, :-1] + 1).any())


# -- how the losses of parts add up ---------------------------------------------------------------------------------


def _weigh_sum(parts: Sequence[Mapping[str, Any]]) -> list[float]:
    return [1.0] * len(parts)


def _weigh_rows(parts: Sequence[Mapping[str, Any]]) -> list[float]:
    return _shares([float(num_rows(part)) for part in parts])


def _weigh_tokens(parts: Sequence[Mapping[str, Any]]) -> list[float]:
    return _shares([float((part["labels"] != IGNORED).sum()) for part in parts])


def _weigh_predicted_tokens(parts: Sequence[Mapping[str, Any]]) -> list[float]:
    return _shares([float((part["labels"][..., 1:] != IGNORED).sum()) for part in parts])


def _shares(amounts: list[float]) -> list[float]:
    total = sum(amounts)
    return [amount / total if total else 1.0 / len(amounts) for amount in amounts]


_RULES: dict[str, Callable[[Sequence[Mapping[str, Any]]], list[float]]] = {
    "sum": _weigh_sum,
    "predicted tokens": _weigh_predicted_tokens,
    "tokens": _weigh_tokens,
    "rows": _weigh_rows,
}


def loss_rule(context: StepContext) -> str:
    """How the loss of a batch follows from the losses of its rows: their sum, or a mean over tokens or rows.

    Found by trying, on the two rows with the most and the fewest labels, without gradients; a model is asked once.

    Args:
        context: A micro-batch. With ``num_items`` most losses are sums, but some models take a mean all the same.

    Raises:
        PlanError: It follows from none: rows are compared with each other, as in contrastive losses.
    """
    candidates = _candidates(context)
    labels = context.inputs.get("labels")
    key = (labels.dim() if isinstance(labels, torch.Tensor) else -1, context.num_items is None)
    known = _KNOWN_RULES.setdefault(context.unwrapped, {})
    if key not in known:
        pair = _telling_pair(context.inputs)
        if pair is None:
            return candidates[0]
        known[key] = _tried(context, pair, candidates)
    return known[key]


def _candidates(context: StepContext) -> list[str]:
    labels = context.inputs.get("labels")
    by_token = isinstance(labels, torch.Tensor) and labels.dim() >= 2 and not labels.is_floating_point()
    means = ["predicted tokens", "tokens", "rows"] if by_token else ["rows"]
    return means if context.num_items is None else ["sum", *means]


def _telling_pair(inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Two rows with loss, as different as the batch has them; None where there are no two."""
    rows, labels = num_rows(inputs), inputs.get("labels")
    counts = torch.ones(rows)
    if isinstance(labels, torch.Tensor) and _has_rows(labels, rows):
        counts = (labels.reshape(rows, -1) != IGNORED).sum(dim=1).cpu()
    usable = counts.nonzero().flatten()
    if len(usable) < 2:
        return None
    order = usable[counts[usable].argsort(stable=True)]
    return _rows_of(inputs, torch.stack([order[-1], order[0]]), rows)


def _tried(context: StepContext, pair: Mapping[str, Any], candidates: Sequence[str]) -> str:
    halves = split_rows(pair, 2)
    with forward_only(context.unwrapped):
        whole, *parts = (float(context.loss(context.unwrapped, batch, context.num_items)) for batch in (pair, *halves))

    def error(rule: str) -> float:
        return abs(whole - sum(w * part for w, part in zip(_RULES[rule](halves), parts, strict=True)))

    best = min(candidates, key=error)
    if not error(best) <= _TOLERANCE * abs(whole) + 1e-7:
        raise PlanError(
            f"the loss of two rows ({whole:.6g}) is neither the sum nor a mean of the losses of each alone "
            f"({parts[0]:.6g} and {parts[1]:.6g}), so that a batch cannot be done in parts; lower "
            "per_device_train_batch_size and raise gradient_accumulation_steps if the loss allows that."
        )
    return best


# -- training -------------------------------------------------------------------------------------------------------


def train_in_parts(
    context: StepContext, parts: Sequence[Mapping[str, Any]], numbers: int | None = None
) -> torch.Tensor:
    """One forward and backward for each part; gradients and the loss returned are those of the whole micro-batch.

    Args:
        context: The micro-batch; its ``stock`` trains a part, whatever methods come below.
        parts: Its rows in parts, as ``split_rows`` makes them.
        numbers: How many micro-batches this one counts as, at least as many as there are parts; None for just as
            many. Parts are numbered in order, and the last has the last number.

    Returns:
        The detached loss of the micro-batch.
    """
    numbers = numbers or len(parts)
    weights = _RULES[loss_rule(context)](parts) if len(parts) > 1 else [1.0]
    kept = [(part, weight) for part, weight in zip(parts, weights, strict=True) if weight > 0]
    losses = []
    for index, (part, weight) in enumerate(kept):
        last = index == len(kept) - 1
        changes = {
            "micro_step": context.micro_step * numbers + (numbers - 1 if last else index),
            "micro_steps": context.micro_steps * numbers,
        }
        with contextlib.nullcontext() if last else _alone(context.model):
            losses.append(_weighted_step(context, part, weight, changes))
    return torch.stack([loss.detach().float() for loss in losses]).sum()


def _alone(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """DDP exchanges gradients after the last part only; whether then depends on the accumulation around it."""
    no_sync = getattr(model, "no_sync", None)
    return no_sync() if callable(no_sync) else contextlib.nullcontext()


def _weighted_step(
    context: StepContext, part: Mapping[str, Any], weight: float, changes: Mapping[str, int]
) -> torch.Tensor:
    if weight == 1:
        return context.stock(context.model, part, context.num_items, **changes)
    weighed_already = False

    def loss(model: nn.Module, inputs: Any, num_items: Any) -> torch.Tensor:
        """What a method below asks for: weighted here where no gradient will be."""
        nonlocal weighed_already
        value = context.loss(model, inputs, num_items)
        if value.requires_grad:
            return value
        weighed_already = True
        return weight * value

    with _scaled_gradients(context.unwrapped, weight):
        value = context.stock(context.model, part, context.num_items, loss=loss, **changes)
    return value if weighed_already else weight * value


@contextlib.contextmanager
def _scaled_gradients(model: nn.Module, factor: float) -> Iterator[None]:
    """Every gradient is multiplied on its way into ``.grad``, before any hook that uses it and any exchange."""
    scale = functools.partial(torch.mul, other=factor)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = [parameter.register_hook(scale) for parameter in trained]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
