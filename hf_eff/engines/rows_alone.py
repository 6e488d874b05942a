"""Some rows of a batch, as if they had been put together alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hf_eff.engines.row_split import IGNORED, num_rows, split_rows

_DECODER = ("labels", "decoder_")


def rows_alone(inputs: Mapping[str, Any], part: slice, *, two_stacks: bool = False) -> dict[str, Any]:
    """Some rows of a batch, padded as if they had been put together alone.

    Args:
        inputs: A batch with ``attention_mask`` [rows, length]; without one nothing is cut.
        part: Which rows.
        two_stacks: Whether labels and decoder inputs have a length of their own.

    Returns:
        Copies without the columns that are padding in all of the rows, at either end.

    Raises:
        PlanError: The rows cannot be told apart, as where several documents are packed into one.
    """
    rows = num_rows(inputs)
    split_rows(inputs, 2)  # refuses what cannot be taken apart
    taken = {name: value[part] if _begins_with(value, (rows,)) else value for name, value in inputs.items()}
    mask, labels = taken.get("attention_mask"), taken.get("labels")
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return taken
    used = mask.bool().any(dim=0)
    if not two_stacks and _begins_with(labels, mask.shape):
        used = used | (labels != IGNORED).any(dim=0)  # type: ignore[union-attr]
    places = used.nonzero().flatten().tolist() or [0]
    kept = slice(places[0], places[-1] + 1)
    cut = {
        name: value[:, kept].contiguous()
        for name, value in taken.items()
        if _begins_with(value, mask.shape) and not (two_stacks and name.startswith(_DECODER))
    }
    return {**taken, **cut}


def items_of(part: Mapping[str, Any], whole: Mapping[str, Any], num_items: Any) -> Any:
    """What a loss is divided by so that it is the mean over some rows of a batch.

    Args:
        part: Some rows of ``whole``.
        whole: A batch.
        num_items: What the loss of the whole batch is divided by, or None where models take the mean themselves.

    Returns:
        ``num_items`` times the part's share of the labels.
    """
    if num_items is None or not isinstance(whole.get("labels"), torch.Tensor):
        return num_items
    # The trainer counts labels as the model's loss does, which shifts them or not: it is the count that agrees.
    counts = [(_labels(part, start), _labels(whole, start)) for start in (1, 0)]
    of_part, of_whole = next((pair for pair in counts if pair[1] == int(num_items)), counts[0])
    return num_items if of_part in (0, of_whole) else num_items * of_part / of_whole


def _labels(inputs: Mapping[str, Any], start: int) -> int:
    labels: torch.Tensor = inputs["labels"]
    return int(((labels[..., start:] if labels.dim() >= 2 else labels) != IGNORED).sum())


def _begins_with(value: Any, shape: Sequence[int]) -> bool:
    return isinstance(value, torch.Tensor) and tuple(value.shape[: len(shape)]) == tuple(shape)
