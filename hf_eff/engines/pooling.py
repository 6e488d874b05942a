"""From the rows a user has to a pool: tokens, loss mask, lengths, content hashes.

Text, prompt-completion and chat rows are tokenised and masked as TRL's ``SFTTrainer`` prepares them,
so that what is scored is what is trained on. Unlike there, a row that has nothing left to learn after
truncation is kept and marked invalid, so that positions in the pool are positions in the dataset.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_eff.contracts.selection import Pool
from hf_eff.errors import DataError, MissingDependencyError, OptionError
from hf_eff.numerics.example_loss import IGNORE_INDEX
from hf_eff.numerics.row_hash import row_hashes

if TYPE_CHECKING:
    from datasets import Dataset

_MASKS = ("completion_mask", "assistant_masks")
_LABELS = ("labels", "label", "label_ids")
_TOKENISED = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "decoder_input_ids")
_SPANS = ("start_positions", "end_positions")


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """How a row becomes tokens. The defaults are those of TRL's ``SFTConfig``.

    Attributes:
        max_length: Tokens to truncate to, or None to keep all.
        truncation_mode: Which end survives: ``"keep_start"`` or ``"keep_end"``.
        text_field: Column of plain-text rows.
        completion_only_loss: Whether prompts carry no loss; None means yes for rows that have a
            prompt and a completion, and no for tokenised rows with a completion mask.
        assistant_only_loss: Whether only the assistant's turns carry loss.
        formatting_func: Turns a row into text, or None.
        is_causal_lm: Whether labels are shifted by one.

    Raises:
        OptionError: ``truncation_mode`` or ``max_length`` is not allowed.
    """

    max_length: int | None = 1024
    truncation_mode: str = "keep_start"
    text_field: str = "text"
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    formatting_func: Callable[[Any], str] | None = None
    is_causal_lm: bool = True

    def __post_init__(self) -> None:
        """Check values."""
        if self.truncation_mode not in ("keep_start", "keep_end"):
            raise OptionError(f"truncation_mode must be 'keep_start' or 'keep_end', got {self.truncation_mode!r}.")
        if self.max_length is not None and self.max_length < 1:
            raise OptionError(f"max_length must be at least 1 or None, got {self.max_length}.")


def make_pool(
    dataset: Any,
    *,
    processing_class: Any = None,
    row_format: RowFormat | None = None,
    columns: Sequence[str] | None = None,
    source_column: str = "source",
    group_column: str | None = None,
) -> Pool:
    """Tokenise, measure and hash the rows of a dataset.

    Args:
        dataset: ``datasets.Dataset`` or a sequence of mappings. A row holds ``text``, ``prompt``
            and ``completion`` (text or messages), ``messages``, ``conversations``, or is
            already tokenised (``input_ids``, optionally ``labels``).
        processing_class: Tokenizer; not needed for tokenised rows.
        row_format: Truncation and masking.
        columns: Columns whose content identifies a row; all of them without. Images and sound
            cannot be among them.
        source_column: Where the name of a row's source is, if anywhere.
        group_column: Where the sub-task of a target row is; None for ``"group"`` or, without
            such a column, the sources.

    Returns:
        A pool with one entry for every row, in order; ``loss_lengths`` is 0 for rows that cannot
        be trained on.

    Raises:
        DataError: The dataset is empty, a stream, or not in a known format.
    """
    rows = _as_dataset(dataset)
    if not len(rows):
        raise DataError("the pool is empty: the dataset has 0 rows.")
    if group_column is not None and group_column not in rows.column_names:
        raise DataError(f"group_column={group_column!r} is not a column of the dataset: {rows.column_names}.")
    chosen_format = row_format or RowFormat()
    encoded = _encode(rows, processing_class, chosen_format)
    lengths, loss_lengths = _measure(encoded, is_causal_lm=chosen_format.is_causal_lm)
    sources = _names(rows, source_column)
    return Pool(
        rows=encoded,
        index=np.arange(len(rows)),
        lengths=lengths,
        loss_lengths=loss_lengths,
        sources=sources,
        groups=_names(rows, group_column or "group") or sources,
        row_hash=row_hashes(dataset, columns),
        examples=rows,
    )


@dataclass(frozen=True)
class PadRows:
    """Collator for rows of token ids: pads on the right, masks the padding, ignores it in the loss."""

    pad_token_id: int = 0

    @classmethod
    def of(cls, processing_class: Any) -> PadRows:
        """Collator that pads as a tokenizer or processor does; any token will do where there is none."""
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        return cls(getattr(tokenizer, "pad_token_id", None) or 0)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Batch of tensors; scalars are stacked, lists padded to the longest."""
        batch = {}
        fill = {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX}
        for name in rows[0]:
            values = [torch.as_tensor(row[name]) for row in rows]
            batch[name] = (
                torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill.get(name, 0))
                if values[0].dim()
                else torch.stack(values)
            )
        if "attention_mask" not in batch:
            ones = [torch.ones(len(row["input_ids"]), dtype=torch.long) for row in rows]
            batch["attention_mask"] = torch.nn.utils.rnn.pad_sequence(ones, batch_first=True)
        return batch


def _as_dataset(rows: Any) -> Dataset:
    from datasets import Dataset

    if isinstance(rows, Dataset):
        # A transform may draw random numbers; content is what lies below it.
        return rows.with_format(None)
    if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        raise DataError(
            f"the pool is a stream ({type(rows).__name__}) of unknown length; pass a datasets.Dataset or a list."
        )
    try:
        return Dataset.from_list([dict(rows[i]) for i in range(len(rows))])
    except (TypeError, ValueError, KeyError) as error:
        raise DataError(f"the pool must be a datasets.Dataset or a sequence of mappings: {error}.") from error


def _encode(rows: Dataset, processing_class: Any, row_format: RowFormat) -> Dataset:
    if "input_ids" in rows.column_names:
        keep = [name for name in rows.column_names if name in (*_TOKENISED, *_LABELS, *_SPANS, *_MASKS)]
        return rows.select_columns(keep).map(
            _encode_tokenised, fn_kwargs={"row_format": row_format}, remove_columns=keep, desc="Reading rows"
        )
    columns = set(rows.column_names)
    known = {row_format.text_field, "messages", "conversations"} & columns or {"prompt", "completion"} <= columns
    if not known and row_format.formatting_func is None:
        raise DataError(
            f"the dataset's columns {rows.column_names} are in no known format; rows need 'input_ids', "
            f"{row_format.text_field!r}, 'prompt' and 'completion', or 'messages'."
        )
    if processing_class is None:
        raise DataError("rows of text need a tokenizer: pass processing_class=.")
    arguments = {
        "tokenizer": getattr(processing_class, "tokenizer", processing_class),
        "row_format": row_format,
        "template": _training_template(processing_class) if row_format.assistant_only_loss else None,
    }
    return rows.map(_encode_text, fn_kwargs=arguments, remove_columns=rows.column_names, desc="Tokenising rows")


def _training_template(processing_class: Any) -> str | None:
    """Template that marks the assistant's tokens, when the tokenizer's own does not."""
    if "{% generation" in (processing_class.chat_template or "").replace("{%-", "{%"):
        return None
    try:
        from trl.chat_template_utils import get_training_chat_template
    except ImportError:
        raise MissingDependencyError(
            "assistant_only_loss with a chat template that has no {% generation %} marks needs the package 'trl'; "
            "install it with: pip install 'hf_eff[sft]'"
        ) from None
    template: str | None = get_training_chat_template(processing_class)
    return template


def _encode_tokenised(row: dict[str, Any], row_format: RowFormat) -> dict[str, Any]:
    length = len(row["input_ids"])
    label = next((row[name] for name in _LABELS if name in row), None)
    if label is None and not any(name in row for name in _SPANS):
        # As in TRL, whose default looks for a prompt column, which tokenised rows do not have.
        masks = _MASKS if row_format.completion_only_loss else _MASKS[1:]
        label = _labels(row["input_ids"], [row[name] for name in masks if name in row])
    encoded = {name: value for name, value in row.items() if name not in (*_LABELS, *_MASKS)}
    if label is not None:
        encoded["labels"] = label
    return {
        name: _cut(value, row_format) if isinstance(value, list) and len(value) == length else value
        for name, value in encoded.items()
    }


def _encode_text(
    row: dict[str, Any], tokenizer: Any, row_format: RowFormat, template: str | None
) -> dict[str, list[int]]:
    if row_format.formatting_func is not None:
        row = {row_format.text_field: row_format.formatting_func(row)}
    row = {name: _chat(value) for name, value in row.items()}
    row.setdefault("messages", row.pop("conversations", None))
    tokens = _Tokens(tokenizer, row, template, assistant_mask=row_format.assistant_only_loss)
    if row.get("prompt") is not None:
        ids, masks = tokens.prompt_completion()
        if row_format.completion_only_loss is False:
            masks = masks[1:]
    else:
        ids, masks = tokens.whole(row["messages"] if row["messages"] is not None else row[row_format.text_field])
    return {"input_ids": _cut(ids, row_format), "labels": _cut(_labels(ids, masks), row_format)}


@dataclass(frozen=True)
class _Tokens:
    """Token ids and masks of one row."""

    tokenizer: Any
    row: Mapping[str, Any]
    template: str | None
    assistant_mask: bool

    def whole(self, content: Any) -> tuple[list[int], list[list[int]]]:
        """Ids of a text or a conversation, and the assistant's mask where one is asked for."""
        return self._ids(self._closed(content))

    def prompt_completion(self) -> tuple[list[int], list[list[int]]]:
        """Ids of prompt and completion; the first mask marks the completion."""
        prompt, completion = self.row["prompt"], self._closed(self.row["completion"])
        start, _ = self._ids(prompt, add_generation_prompt=True)
        ids, masks = self._ids(prompt + completion)
        # A template or a merge across the border may tokenise the prompt differently on its own;
        # the completion starts where the two part.
        shared = next(
            (i for i, (a, b) in enumerate(zip(start, ids, strict=False)) if a != b), min(len(start), len(ids))
        )
        return ids, [[0] * shared + [1] * (len(ids) - shared), *masks]

    def _closed(self, content: Any) -> Any:
        """Text that ends in the end-of-sequence token; templates close conversations themselves."""
        end = self.tokenizer.eos_token
        return content + end if isinstance(content, str) and end and not content.endswith(end) else content

    def _ids(self, content: Any, *, add_generation_prompt: bool = False) -> tuple[list[int], list[list[int]]]:
        if not isinstance(content, (str, list)) or content == []:
            raise DataError(f"a row has {content!r} where text or messages are expected; remove such rows.")
        if isinstance(content, str):
            return list(self.tokenizer(text=content)["input_ids"]), []
        tools = self.row.get("tools")
        mask = self.assistant_mask and not add_generation_prompt
        result = self.tokenizer.apply_chat_template(
            content,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=add_generation_prompt,
            chat_template=self.template,
            tools=json.loads(tools) if isinstance(tools, str) else tools,
            return_assistant_tokens_mask=mask,
            **(self.row.get("chat_template_kwargs") or {}),
        )
        return list(result["input_ids"]), [list(result["assistant_masks"])] if mask else []


def _chat(value: Any) -> Any:
    """Messages with ``role`` and ``content`` where they came with ``from`` and ``value``."""
    if not (isinstance(value, list) and value and isinstance(value[0], dict)):
        return value
    names = {"from": "role", "value": "content"}
    return [{names.get(key, key): item for key, item in message.items()} for message in value]


def _labels(ids: Sequence[int], masks: Sequence[Sequence[int]]) -> list[int]:
    return [token if all(bits) else IGNORE_INDEX for token, *bits in zip(ids, *masks, strict=True)]


def _cut(values: list[Any], row_format: RowFormat) -> list[Any]:
    if row_format.max_length is None:
        return values
    return (
        values[: row_format.max_length]
        if row_format.truncation_mode == "keep_start"
        else values[-row_format.max_length :]
    )


def _measure(rows: Any, *, is_causal_lm: bool) -> tuple[np.ndarray, np.ndarray]:
    """[N] tokens and [N] loss positions of each row."""
    lengths, loss_lengths = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
    for position, row in enumerate(rows):
        lengths[position] = len(row["input_ids"])
        if lengths[position]:
            loss_lengths[position] = _loss_positions(row.get("labels"), is_causal_lm=is_causal_lm)
    return lengths, loss_lengths


def _loss_positions(labels: Any, *, is_causal_lm: bool) -> int:
    if not isinstance(labels, list):
        return int(labels != IGNORE_INDEX)
    if labels and isinstance(labels[0], float):
        return 1
    return sum(label != IGNORE_INDEX for label in labels[1 if is_causal_lm else 0 :])


def _names(rows: Dataset, column: str) -> list[str] | None:
    if column not in rows.column_names:
        return None
    return ["" if value is None else str(value) for value in rows[column]]
