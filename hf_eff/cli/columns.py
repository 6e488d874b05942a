"""Rows in the columns that trainers expect, and tokenised for the plain Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_eff.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_SHAPES = (("input_ids",), ("messages",), ("conversations",), ("prompt", "completion"), ("text",))


def name_columns(rows: Dataset, names: dict[str, str | None], dataset: str) -> Dataset:
    """Rename columns, and check that the rows then have a known shape.

    Args:
        rows: Any rows.
        names: ``text``, ``prompt`` or ``completion`` to the column that holds it, or None.
        dataset: What the user typed, for messages.

    Raises:
        DataError: A named column is missing, or no known shape is there.
    """
    for name, column in names.items():
        if column is None or column == name:
            continue
        if column not in rows.column_names:
            raise DataError(f"dataset={dataset!r} has no column {column!r}; it has {rows.column_names}.")
        if name in rows.column_names:
            rows = rows.remove_columns(name)
        rows = rows.rename_column(column, name)
    if not any(set(shape) <= set(rows.column_names) for shape in _SHAPES):
        raise DataError(
            f"dataset={dataset!r} has the columns {rows.column_names}; it needs 'messages', 'prompt' and 'completion', "
            "'text' or 'input_ids' (--text_column, --prompt_column and --completion_column name other ones)."
        )
    return _numbers_as_text(rows)


def _numbers_as_text(rows: Dataset) -> Dataset:
    """Answers such as ``42`` come out of CSV and JSON as numbers."""
    from datasets import Value

    for name in ("text", "prompt", "completion"):
        kind = rows.features.get(name)
        if isinstance(kind, Value) and kind.dtype not in ("string", "large_string"):
            rows = rows.cast_column(name, Value("string"))
    return rows


def tokenise(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None, *, seq2seq: bool = False
) -> Dataset:
    """Rows as ``input_ids`` and ``labels``, with ``source`` where there is one; no loss on prompts.

    Args:
        rows: Rows of a shape that ``name_columns`` accepts.
        tokenizer: Tokenizer of the model.
        max_tokens: Length at which rows are cut, or None.
        seq2seq: The prompt goes to an encoder and the answer to a decoder.

    Raises:
        DataError: An encoder-decoder model meets rows without prompts.
    """
    from hf_eff.selection import RowFormat, make_pool

    if not seq2seq:
        encoded = make_pool(rows, processing_class=tokenizer, row_format=RowFormat(max_length=max_tokens)).rows
    elif {"prompt", "completion"} <= set(rows.column_names):
        encoded = rows.map(lambda row: _pair(row, tokenizer, max_tokens), remove_columns=rows.column_names)
    else:
        raise DataError("an encoder-decoder model needs the columns 'prompt' and 'completion'.")
    return encoded.add_column("source", rows["source"][:]) if "source" in rows.column_names else encoded


def _pair(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_tokens: int | None) -> dict[str, list[int]]:
    source, target = tokenizer(row["prompt"])["input_ids"], tokenizer(text_target=row["completion"])["input_ids"]
    return {"input_ids": source[:max_tokens], "labels": target[:max_tokens]}
