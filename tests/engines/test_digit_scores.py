"""The mark is the expectation over the digits' logits, whatever the prompt is batched with."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_eff.engines.digit_scores import DIGITS, digit_tokens, expected_digit, expected_digits, prompt_tokens
from hf_eff.engines.row_text import RowText
from hf_eff.errors import BudgetExceededError, ScoringStoppedError
from hf_eff.registry import get_method
from hf_eff.testing.selection_scene import make_context
from hf_eff.testing.tiny import tiny_model, tiny_tokenizer

SPEC = get_method("selection", "perplexity")
TEMPLATE = "Asked: {instruction}\nTold: {answer}\nMark?"
TEXTS = [RowText("a" * (3 * i % 17 + 1), "b" * (5 * i % 23)) for i in range(12)]


def context_with(**changes):
    model = tiny_model(layers=2, width=32, attn_implementation="eager")
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # marks that differ by more than rounding
    return make_context(SPEC, **{"model": model, **changes})


def marks(context, texts=TEXTS, **changes):
    tokenizer = tiny_tokenizer()
    options = {"digits": digit_tokens(tokenizer), **changes}
    return expected_digits(context, texts, lambda text: prompt_tokens(tokenizer, TEMPLATE, text, 200), **options)


def test_the_expectation_is_the_enumeration():
    logits = torch.randn(7, 6, generator=torch.Generator().manual_seed(0)) * 5
    for row, found in zip(logits.double().tolist(), expected_digit(logits).tolist(), strict=True):
        weights = [math.exp(value) for value in row]
        assert found == pytest.approx(sum(d * w for d, w in zip(range(1, 7), weights, strict=True)) / sum(weights))


def test_a_sure_model_gives_its_digit_and_a_broken_one_none():
    logits = torch.full((3, 6), -1e4)
    logits[0, 4] = 1e4
    logits[1, 0] = float("nan")
    logits[2, 5] = float("inf")
    found = expected_digit(logits)
    assert found[0] == 5
    assert torch.isnan(found[1:]).all()


def test_marks_are_those_of_the_full_logits_row_by_row():
    context, tokenizer = context_with(), tiny_tokenizer()
    ids = digit_tokens(tokenizer)
    expected = []
    for text in TEXTS:
        with torch.no_grad():
            row = context.model(input_ids=torch.tensor([prompt_tokens(tokenizer, TEMPLATE, text, 200)])).logits[0, -1]
        shares = row[ids].double().softmax(0).tolist()
        expected.append(sum(digit * share for digit, share in zip(DIGITS, shares, strict=True)))
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(marks(context), expected, rtol=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 150, 100_000])
def test_the_batch_does_not_matter(batch_tokens):
    alone = marks(context_with(batch_tokens=1))
    np.testing.assert_allclose(marks(context_with(batch_tokens=batch_tokens)), alone, rtol=1e-5)
    np.testing.assert_allclose(marks(context_with(batch_tokens=batch_tokens), TEXTS[::-1])[::-1], alone, rtol=1e-5)


def test_a_model_that_cannot_drop_logits_gives_the_same():
    plain = context_with()

    class Old(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.config = model, model.config

        def forward(self, input_ids, attention_mask):
            return {"logits": self.model(input_ids=input_ids, attention_mask=attention_mask).logits}

    np.testing.assert_allclose(marks(context_with(model=Old(plain.model))), marks(plain), rtol=1e-5)


def test_every_batch_is_charged_before_it_is_computed():
    bills, seen = [], []
    context = context_with(spend=lambda flops, tokens: bills.append(tokens), batch_tokens=200)
    context.model.register_forward_pre_hook(lambda *_: seen.append(len(bills)))
    marks(context)
    assert seen == list(range(1, len(bills) + 1))
    assert sum(bills) >= sum(len(prompt_tokens(tiny_tokenizer(), TEMPLATE, text, 200)) for text in TEXTS)

    def refuse(flops, tokens):
        raise BudgetExceededError("nothing left")

    with pytest.raises(BudgetExceededError):
        marks(context_with(spend=refuse))


def test_it_stops_between_batches():
    asked = []

    def stop():
        asked.append(1)
        return len(asked) > 2

    context, calls = context_with(stop_requested=stop, batch_tokens=1), []
    context.model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ScoringStoppedError, match="Marks: stopped on request"):
        marks(context)
    assert len(calls) == 2


def test_without_digit_tokens_nothing_is_computed():
    context = context_with(model=None)
    assert marks(context, digits=None).tolist() == [3.0] * len(TEXTS)


def test_a_broken_model_gives_no_mark():
    context = context_with()
    torch.nn.init.constant_(context.model.model.norm.weight, float("nan"))
    assert np.isnan(marks(context)).all()


class Stub:
    """Tokenizer of characters, in which one may take two tokens."""

    chat_template = None

    def __init__(self, split=""):
        self.split = split

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [token for c in text for token in ([0, ord(c)] if c in self.split else [ord(c)])]}

    def decode(self, ids, skip_special_tokens=True):
        return "".join(map(chr, ids))


def test_digit_tokens_are_single_or_none():
    assert digit_tokens(Stub()) == [ord(str(digit)) for digit in DIGITS]
    assert digit_tokens(Stub(split="4")) is None
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(digit_tokens(tokenizer)) == "123456"


def text_of(template, text, room, tokenizer=None):
    return (tokenizer or Stub()).decode(prompt_tokens(tokenizer or Stub(), template, text, room))


def test_prompts_hold_the_pieces_as_they_are():
    found = text_of(TEMPLATE, RowText("{answer} {x}", "why {instruction}?"), 1000)
    assert found == "Asked: {answer} {x}\nTold: why {instruction}?\nMark?\n\nDigit:\n"
    assert text_of("Q {instruction}?", RowText("", "plain"), 1000) == "Q plain?\n\nDigit:\n"


def test_a_chat_template_is_used_where_there_is_one():
    tokenizer = tiny_tokenizer()
    found = tokenizer.decode(prompt_tokens(tokenizer, "Q {instruction}?", RowText("x", "y"), 100))
    assert found == "<|user|>Q x?<eos><|assistant|>"


@pytest.mark.parametrize(
    ("sizes", "kept"), [((50, 5), (25, 5)), ((5, 50), (5, 25)), ((50, 50), (15, 15)), ((10, 10), (10, 10))]
)
def test_long_pieces_are_cut_and_the_question_is_not(sizes, kept):
    own = len(text_of(TEMPLATE, RowText("", ""), 10**6))
    found = text_of(TEMPLATE, RowText("a" * sizes[0], "b" * sizes[1]), own + 30)
    assert found == text_of(TEMPLATE, RowText("a" * kept[0], "b" * kept[1]), 10**6)
    assert len(found) <= own + 30


def test_a_question_longer_than_the_limit_is_asked_about_nothing():
    assert text_of(TEMPLATE, RowText("abc", "def"), 1) == text_of(TEMPLATE, RowText("", ""), 10**6)
