"""Prompt and answer of each row of a batch, as tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_eff.engines.row_split import IGNORED, is_flattened
from hf_eff.errors import DataError


class PromptedRow(NamedTuple):
    """Token ids [prompt tokens] and [answer tokens] on the CPU, without padding."""

    prompt: Tensor
    answer: Tensor


def prompted_rows(inputs: Mapping[str, Any], *, is_encoder_decoder: bool = False) -> list[PromptedRow]:
    """Split rows where their labels begin.

    Args:
        inputs: ``input_ids`` and ``labels`` [rows, length], the latter -100 on prompt and padding; ``attention_mask``
            where there is padding on the left.
        is_encoder_decoder: Whether the prompt is all of ``input_ids`` and the answer all of ``labels``.

    Returns:
        Rows in order. Of several answers in a row, such as the turns of a chat, the first one counts. Rows without an
        answer, cut off by truncation, are left out.

    Raises:
        DataError: The batch has no tokens or labels, several documents in a row, a row without a prompt, or no answer
            at all.
    """
    ids, labels = inputs.get("input_ids"), inputs.get("labels")
    if not isinstance(ids, Tensor) or not isinstance(labels, Tensor) or ids.dim() != 2 or labels.dim() != 2:
        raise DataError(
            f"the objective needs input_ids and labels of shape [rows, length], with labels -100 on the prompt; the "
            f"batch has {sorted(inputs)}."
        )
    if is_flattened(inputs):
        raise DataError("the objective needs one example a row; set packing=False and padding_free=False.")
    mask = inputs.get("attention_mask")
    real = mask.bool().cpu() if isinstance(mask, Tensor) else torch.ones(ids.shape, dtype=torch.bool)
    split = _source_and_target if is_encoder_decoder else _before_and_after
    rows = [split(*row) for row in zip(ids.cpu(), labels.cpu(), real, strict=True)]
    rows = [row for row in rows if len(row.answer)]
    if not rows:
        raise DataError("no row of the batch has an answer: labels must not be -100 on its tokens.")
    if any(len(row.prompt) == 0 for row in rows):
        raise DataError(
            "a row of the batch has no prompt: labels must be -100 on its tokens (completion_only_loss=True, or "
            "prompt and completion columns)."
        )
    return rows


def left_padded(rows: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """Rows of token ids as one batch that ends alike, and its attention mask: [rows, longest] each."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, longest - len(row) :] = row
        mask[place, longest - len(row) :] = 1
    return ids, mask


def _before_and_after(ids: Tensor, labels: Tensor, real: Tensor) -> PromptedRow:
    answered = labels != IGNORED
    if not bool(answered.any()):
        return PromptedRow(ids[:0], ids[:0])
    start = int(answered.int().argmax())
    length = int((~answered[start:]).int().argmax()) if not bool(answered[start:].all()) else len(ids) - start
    return PromptedRow(ids[:start][real[:start]], labels[start : start + length])


def _source_and_target(ids: Tensor, labels: Tensor, real: Tensor) -> PromptedRow:
    return PromptedRow(ids[real], labels[labels != IGNORED])
