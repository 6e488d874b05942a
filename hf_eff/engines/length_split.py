"""A batch cut along its length: shorter segments, every label still predicted once, attention inside a segment only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def split_length(inputs: Mapping[str, Any], limit: int) -> list[dict[str, Any]]:
    """Segments of at most ``limit`` tokens.

    Neighbours share one token: it is the last of one segment and the first of the next, where a causal language model
    does not predict it. So each label is predicted exactly once, from the context that its segment holds.

    Args:
        inputs: Batch of a causal language model; every tensor of shape [rows, length] is cut, others go to all.
        limit: Tokens of a segment, at least 2.

    Returns:
        One batch a segment, in order; the batch itself where it is short enough. ``position_ids`` start at 0 in each.
        Segments in which no label is left are dropped, but for one where that would leave none.
    """
    shape = inputs["input_ids"].shape
    length = shape[1]
    if length <= limit:
        return [dict(inputs)]
    starts = range(0, length - 1, limit - 1)
    segments = [_cut(inputs, shape, slice(start, start + limit)) for start in starts]
    return [segment for segment in segments if _has_labels(segment)] or segments[:1]


def _cut(inputs: Mapping[str, Any], shape: torch.Size, part: slice) -> dict[str, Any]:
    segment = {name: value[:, part] if _is_cut(value, shape) else value for name, value in inputs.items()}
    positions = segment.get("position_ids")
    if isinstance(positions, torch.Tensor) and _is_cut(inputs["position_ids"], shape):
        segment["position_ids"] = positions - positions[:, :1]
    return segment


def _is_cut(value: Any, shape: torch.Size) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == shape


def _has_labels(segment: Mapping[str, Any]) -> bool:
    labels = segment.get("labels")
    return not isinstance(labels, torch.Tensor) or bool((labels[:, 1:] != -100).any())
