"""Prompt and answer of a row as text, whatever format the row came in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hf_eff.contracts.selection import Pool
from hf_eff.errors import DataError
from hf_eff.numerics.example_loss import IGNORE_INDEX

_PROMPTS = ("prompt", "instruction", "question")
_ANSWERS = ("completion", "response", "output", "answer")


class RowText(NamedTuple):
    """Text of one row. Plain text, which has no prompt, is all answer."""

    prompt: str
    answer: str

    @property
    def whole(self) -> str:
        """Both, a line apart."""
        return f"{self.prompt}\n{self.answer}" if self.prompt else self.answer


def row_texts(pool: Pool, tokenizer: Any = None) -> list[RowText]:
    """Text of every row of a pool.

    The user's own rows are read where the pool has them; of chats the last answer counts as the
    answer and all before it as the prompt. Rows that came as tokens are decoded: tokens that carry no
    loss are the prompt.

    Args:
        pool: The rows.
        tokenizer: Decodes rows that came as tokens.

    Raises:
        DataError: A row has no text and there is no tokenizer to decode it.
    """
    return [_of(pool, place, tokenizer) for place in range(len(pool))]


def _of(pool: Pool, place: int, tokenizer: Any) -> RowText:
    found = None if pool.examples is None else _from_example(pool.examples[place])
    return found or _decoded(pool.rows[place], tokenizer)


def _from_example(row: Mapping[str, Any]) -> RowText | None:
    """Text of a row as the user has it; None where it holds none."""
    turns = row.get("messages") or row.get("conversations")
    if turns:
        return _from_turns(turns)
    prompt = next((row[name] for name in _PROMPTS if row.get(name)), None)
    answer = next((row[name] for name in _ANSWERS if row.get(name)), None)
    if answer is not None:
        parts = [_plain(prompt), _plain(row.get("input"))]
        return RowText("\n".join(part for part in parts if part), _plain(answer))
    text = row.get("text")
    return RowText("", text) if isinstance(text, str) else None


def _from_turns(turns: Sequence[Mapping[str, Any]]) -> RowText:
    texts = [_content(turn) for turn in turns]
    return RowText("\n".join(texts[:-1]), texts[-1])


def _content(turn: Mapping[str, Any]) -> str:
    return str(turn.get("content", turn.get("value", "")) or "")


def _plain(value: Any) -> str:
    """Text of a string or of messages."""
    if value is None:
        return ""
    return value if isinstance(value, str) else "\n".join(_content(turn) for turn in value)


def _decoded(row: Mapping[str, Any], tokenizer: Any) -> RowText:
    if tokenizer is None:
        raise DataError("rows of token ids have no text; pass the tokenizer as processing_class=.")
    ids = row["input_ids"]
    labels = row["labels"] if isinstance(row.get("labels"), (list, tuple)) else ids
    prompt = [token for token, label in zip(ids, labels, strict=True) if label == IGNORE_INDEX]
    answer = [token for token, label in zip(ids, labels, strict=True) if label != IGNORE_INDEX]
    return RowText(*(tokenizer.decode(part, skip_special_tokens=True) for part in (prompt, answer)))
