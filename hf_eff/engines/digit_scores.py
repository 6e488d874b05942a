"""Asking a language model for a mark: the expected digit at the place where it would write one."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from hf_eff.contracts.selection import SelectionContext
from hf_eff.engines.module_tree import contiguous_head
from hf_eff.engines.pool_pass import token_batches
from hf_eff.engines.pooling import PadRows
from hf_eff.engines.row_text import RowText
from hf_eff.engines.scoring import scoring_mode
from hf_eff.errors import ScoringStoppedError
from hf_eff.numerics.water_filling import water_fill

DIGITS = (1, 2, 3, 4, 5, 6)
NO_MARK = 3.0
"""Mark where the tokenizer has no single token for some digit: the model cannot be asked."""
PIECES = ("instruction", "answer")
"""Names in braces that a prompt may hold."""
_CUE = "\n\nDigit:\n"
"""End of a prompt without a chat template: a digit that begins a line is a token of its own."""
_SHARD = 4096
"""Prompts held as tokens at once."""

_Item = TypeVar("_Item")


def digit_tokens(tokenizer: Any) -> list[int] | None:
    """[6] token of each of ``DIGITS`` at the beginning of a line; None where one takes several tokens."""
    before = _tokens(tokenizer, "\n")
    found = [_tokens(tokenizer, f"\n{digit}") for digit in DIGITS]
    last = [ids[-1] for ids in found if len(ids) == len(before) + 1 and ids[:-1] == before]
    return last if len(set(last)) == len(DIGITS) else None


def expected_digit(logits: Tensor) -> Tensor:
    """Mean digit under the softmax of the digits' logits, NaN where a logit is not finite.

    Args:
        logits: [B, 6].

    Returns:
        [B] float64 in [1, 6].

    >>> expected_digit(torch.zeros(1, 6)).item()
    3.5
    """
    shares = logits.double().softmax(dim=-1)
    marks = shares @ torch.tensor(DIGITS, dtype=torch.float64, device=logits.device)
    return torch.where(torch.isfinite(logits).all(dim=-1), marks, torch.nan)


def prompt_tokens(tokenizer: Any, template: str, text: RowText, max_tokens: int) -> list[int]:
    """Tokens of a prompt that asks for a mark, in the tokenizer's chat format where it has one.

    Args:
        tokenizer: The model's.
        template: Text with ``{instruction}`` and, where an answer is judged, ``{answer}``.
        text: What is put there. Plain text, which has no prompt, stands for both.
        max_tokens: Tokens of the whole; a longer instruction or answer is cut at its end, the
            template never.
    """
    pieces = {"instruction": text.prompt or text.answer, "answer": text.answer}
    ids = _rendered(tokenizer, template, pieces)
    if len(ids) <= max_tokens:
        return ids
    room = max(0, max_tokens - len(_rendered(tokenizer, template, dict.fromkeys(pieces, ""))))
    used = [name for name in PIECES if f"{{{name}}}" in template]
    shares = water_fill([len(_tokens(tokenizer, pieces[name])) for name in used], room)
    pieces |= {name: _cut(tokenizer, pieces[name], int(share)) for name, share in zip(used, shares, strict=True)}
    return _rendered(tokenizer, template, pieces)


def expected_digits(
    context: SelectionContext,
    items: Sequence[_Item],
    encode: Callable[[_Item], list[int]],
    digits: Sequence[int] | None,
    description: str = "Marks",
) -> np.ndarray:
    """Mark of every item: the expected digit as the next token after its prompt.

    Only the logits at the last position are computed where the model allows that; the whole forward
    is charged. Rows are padded on the right, so that a causal model's result does not depend on what
    it is batched with.

    Args:
        context: Model, tokenizer, limits and progress bar. The model is left as found.
        items: What is judged, in an order that depends on content alone.
        encode: Gives an item's prompt as tokens.
        digits: See ``digit_tokens``; None marks every item ``NO_MARK`` without computing anything.
        description: Text of the progress bar.

    Returns:
        [M] float64 in [1, 6]; NaN where the model's output is not finite.

    Raises:
        BudgetExceededError: The next batch would pass a limit; it was not computed.
        ScoringStoppedError: A stop was requested.
    """
    if digits is None:
        return np.full(len(items), NO_MARK)
    marks = np.full(len(items), np.nan)
    collate = PadRows.of(context.tokenizer)
    with scoring_mode(context.model), torch.no_grad():
        for places, prompts in _batches(context, items, encode, description):
            width = max(map(len, prompts))
            context.spend(context.forward_flops(len(prompts), width), float(len(prompts) * width))
            logits = _next_logits(context, collate([{"input_ids": ids} for ids in prompts]))
            marks[places] = expected_digit(logits[:, list(digits)].cpu()).numpy()
    return marks


def _batches(
    context: SelectionContext, items: Sequence[_Item], encode: Callable[[_Item], list[int]], description: str
) -> Iterator[tuple[np.ndarray, list[list[int]]]]:
    """Batches of prompts of similar length; only a shard's prompts are held at once.

    Yields:
        places: [B] places in ``items``.
        prompts: Token ids of each.
    """
    starts = range(0, len(items), _SHARD)
    for start in context.progress(starts, total=len(starts), description=description):
        prompts = [encode(item) for item in items[start : start + _SHARD]]
        for batch in token_batches([len(ids) for ids in prompts], context.batch_tokens, ties=_digests(prompts)):
            if context.stop_requested():
                raise ScoringStoppedError(f"{description}: stopped on request before all rows were scored.")
            yield start + batch, [prompts[place] for place in batch]


def _next_logits(context: SelectionContext, rows: Mapping[str, Tensor]) -> Tensor:
    """[B, V] float32 logits after the last real token of each row."""
    inputs: dict[str, Any] = {name: values.to(context.device) for name, values in rows.items()}
    last = inputs["attention_mask"].sum(dim=1) - 1
    core: nn.Module = context.model.get_base_model() if hasattr(context.model, "get_base_model") else context.model
    accepted = inspect.signature(type(core).forward).parameters
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    places = last
    if "logits_to_keep" in accepted:  # [B, T, V] of a large vocabulary is the largest tensor of all
        kept, places = torch.unique(last, return_inverse=True)
        inputs["logits_to_keep"] = kept
    with contiguous_head(context.model):
        outputs = context.model(**inputs)
    logits: Tensor = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    return logits[torch.arange(len(last), device=logits.device), places.to(logits.device)].float()


def _rendered(tokenizer: Any, template: str, pieces: Mapping[str, str]) -> list[int]:
    # One pass: braces in a piece are its own.
    text = re.sub(r"\{(instruction|answer)\}", lambda found: pieces[found[1]], template)
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": text}]
        found = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
        return list(found["input_ids"])
    return list(tokenizer(text + _CUE)["input_ids"])


def _cut(tokenizer: Any, text: str, tokens: int) -> str:
    ids = _tokens(tokenizer, text)
    return text if len(ids) <= tokens else str(tokenizer.decode(ids[:tokens], skip_special_tokens=True))


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _digests(prompts: Sequence[Sequence[int]]) -> list[str]:
    return [hashlib.blake2b(repr(list(ids)).encode(), digest_size=8).hexdigest() for ids in prompts]
