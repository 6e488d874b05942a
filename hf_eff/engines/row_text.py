"""Prompt and answer of a row as text, whatever format the row came in.

The user's own rows are read where the pool has them, in this order of preference:

    messages, conversations     chats, with ``role`` and ``content`` or ``from`` and ``value``
    prompt, instruction, question with completion, response, output, answer     text or messages;
                                ``input`` beside an instruction is part of the prompt
    text                        plain text, which has no prompt and is all answer

Rows that hold none of these are decoded from their tokens: tokens that carry no loss are the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hf_eff.contracts.selection import Pool, SelectionContext
from hf_eff.errors import DataError, ScoringStoppedError
from hf_eff.numerics.example_loss import IGNORE_INDEX

_PROMPTS = ("prompt", "instruction", "question")
_ANSWERS = ("completion", "response", "output", "answer")
_WRITERS = ("assistant", "gpt", "model", "bot", "chatgpt")
_SETTINGS = ("system", "developer")
_POLL = 1024
"""Rows read between two looks at ``stop_requested``."""


class RowText(NamedTuple):
    """Text of one row, or of one turn of a chat. Plain text, which has no prompt, is all answer."""

    prompt: str
    answer: str

    @property
    def whole(self) -> str:
        """Both, a line apart."""
        return f"{self.prompt}\n{self.answer}" if self.prompt else self.answer


def row_texts(pool: Pool, tokenizer: Any = None) -> list[RowText]:
    """Text of every row of a pool.

    Of chats the assistant's last turn is the answer and all before it the prompt, but for system
    messages, which many rows share and which say nothing about the row.

    Args:
        pool: The rows.
        tokenizer: Decodes rows that came as tokens.

    Raises:
        DataError: A row has no text and there is no tokenizer to decode it.
    """
    return [joined(turns_at(pool, place, tokenizer)) for place in range(len(pool))]


def row_turns(pool: Pool, tokenizer: Any = None) -> list[list[RowText]]:
    """Turns of every row of a pool: what was asked and what was answered, each time.

    Args:
        pool: The rows. All but chats have one turn.
        tokenizer: Decodes rows that came as tokens.

    Raises:
        DataError: A row has no text and there is no tokenizer to decode it.
    """
    return [turns_at(pool, place, tokenizer) for place in range(len(pool))]


def turns_at(pool: Pool, place: int, tokenizer: Any = None) -> list[RowText]:
    """Turns of one row; at least one.

    Raises:
        DataError: The row has no text and there is no tokenizer to decode it.
    """
    found = None if pool.examples is None else _from_example(pool.examples[place])
    return found or [_decoded(pool.rows[place], tokenizer)]


def joined(turns: Sequence[RowText]) -> RowText:
    r"""The last answer, and all before it as the prompt.

    >>> joined([RowText("Hi", "Hello"), RowText("Bye", "So long")])
    RowText(prompt='Hi\nHello\nBye', answer='So long')
    """
    before = [part for turn in turns[:-1] for part in turn]
    return RowText("\n".join(part for part in (*before, turns[-1].prompt) if part), turns[-1].answer)


def has_text(pool: Pool, tokenizer: Any = None) -> bool:
    """Whether the rows can be read as text."""
    if tokenizer is not None or not len(pool):
        return True
    return pool.examples is not None and _from_example(pool.examples[0]) is not None


def id_text(row: Mapping[str, Any]) -> RowText:
    """Token ids written as words, for rows that nothing can decode.

    >>> id_text({"input_ids": [7, 8, 9], "labels": [-100, -100, 9]})
    RowText(prompt='7 8', answer='9')
    """
    return RowText(*(" ".join(map(str, part)) for part in _parts(row)))


def reading(context: SelectionContext, places: Sequence[int], description: str) -> Iterator[int]:
    """Places of rows to read one by one, with a progress bar.

    Yields:
        One place after the other.

    Raises:
        ScoringStoppedError: ``context.stop_requested`` answered True.
    """
    for done, place in enumerate(context.progress(places, total=len(places), description=description)):
        if done % _POLL == 0 and context.stop_requested():
            raise ScoringStoppedError(f"{description}: stopped on request before all rows were read.")
        yield int(place)


def _from_example(row: Mapping[str, Any]) -> list[RowText] | None:
    """Turns of a row as the user has it; None where it holds no text."""
    messages = row.get("messages") or row.get("conversations")
    if messages:
        return _from_chat(messages)
    prompt = next((row[name] for name in _PROMPTS if row.get(name) is not None), None)
    answer = next((row[name] for name in _ANSWERS if row.get(name) is not None), None)
    if answer is not None:
        parts = [_plain(prompt), _plain(row.get("input"))]
        asked = prompt if isinstance(prompt, list) else [{"content": "\n".join(part for part in parts if part)}]
        return _from_chat([*asked, {"role": _WRITERS[0], "content": _plain(answer)}])
    text = row.get("text")
    return [RowText("", text)] if isinstance(text, str) else None


def _from_chat(messages: Sequence[Mapping[str, Any]]) -> list[RowText]:
    """Turns of a chat; what follows the last answer is left out."""
    heard = [(str(message.get("role", message.get("from", "")) or "").lower(), message) for message in messages]
    heard = [(role, message) for role, message in heard if role not in _SETTINGS]
    if not any(role in _WRITERS for role, _ in heard):
        texts = [_content(message) for _, message in heard]
        return [RowText("\n".join(texts[:-1]), texts[-1])] if texts else [RowText("", "")]
    turns: list[RowText] = []
    asked: list[str] = []
    for role, message in heard:
        if role not in _WRITERS:
            asked.append(_content(message))
        elif turns and not asked:  # the assistant goes on
            turns[-1] = RowText(turns[-1].prompt, f"{turns[-1].answer}\n{_content(message)}")
        else:
            turns.append(RowText("\n".join(part for part in asked if part), _content(message)))
            asked = []
    return turns


def _content(message: Mapping[str, Any]) -> str:
    """Text of one message, whose content may come in parts."""
    content = message.get("content", message.get("value"))
    if isinstance(content, (list, tuple)):
        return "\n".join(str(part.get("text") or "") if isinstance(part, Mapping) else str(part) for part in content)
    return "" if content is None else str(content)


def _plain(value: Any) -> str:
    """Text of a string or of messages."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, (list, tuple)):
        return "\n".join(_content(message) if isinstance(message, Mapping) else str(message) for message in value)
    return str(value)


def _decoded(row: Mapping[str, Any], tokenizer: Any) -> RowText:
    if tokenizer is None:
        raise DataError("rows of token ids have no text; pass the tokenizer as processing_class=.")
    # A row cut inside a character ends in the sign for a broken one.
    prompt, answer = (tokenizer.decode(part, skip_special_tokens=True).rstrip("\ufffd") for part in _parts(row))
    return RowText(prompt, answer)


def _parts(row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Token ids of prompt and answer, without padding."""
    ids = [int(token) for token in row["input_ids"]]
    given: Any = row.get("labels")
    is_list = isinstance(given, (list, tuple)) or getattr(given, "ndim", 0) == 1
    has_tokens = is_list and not any(isinstance(label, float) for label in given)
    labels = [int(label) for label in given] if has_tokens else ids
    if len(labels) != len(ids):  # encoder and decoder: the answer is a sequence of its own
        return ids, [label for label in labels if label != IGNORE_INDEX]
    mask = row.get("attention_mask")
    seen = [True] * len(ids) if mask is None or len(mask) != len(ids) else [bool(bit) for bit in mask]
    prompt = [token for token, label, real in zip(ids, labels, seen, strict=True) if real and label == IGNORE_INDEX]
    answer = [token for token, label, real in zip(ids, labels, seen, strict=True) if real and label != IGNORE_INDEX]
    return prompt, answer
