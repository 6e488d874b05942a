"""The same two texts come out of every format a row may have."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_eff.contracts.selection import Pool
from hf_eff.engines.pooling import make_pool
from hf_eff.engines.row_text import RowText, has_text, id_text, joined, reading, row_texts, row_turns
from hf_eff.errors import DataError, ScoringStoppedError
from hf_eff.registry import get_method
from hf_eff.testing.selection_scene import make_context, toy_pool
from hf_eff.testing.tiny import tiny_tokenizer

ASKED, TOLD = "What is 2 + 3?", "It is 5."


def pool_of(*examples, rows=None):
    size = len(rows if examples == () else examples)
    lengths = np.full(size, 4)
    return Pool(rows=rows, index=np.arange(size), lengths=lengths, loss_lengths=lengths, examples=examples or None)


def chat(*texts, roles=("user", "assistant"), names=("role", "content")):
    return [dict(zip(names, (roles[place % 2], text), strict=True)) for place, text in enumerate(texts)]


SYSTEM = {"role": "system", "content": "You are a calculator."}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": chat(ASKED, TOLD)},
        {"messages": [SYSTEM, *chat(ASKED, TOLD)]},
        {"messages": [*chat(ASKED, TOLD), {"role": "user", "content": "Thanks!"}]},
        {"conversations": chat(ASKED, TOLD, roles=("human", "gpt"), names=("from", "value"))},
        {"messages": chat([{"type": "text", "text": ASKED}], [{"type": "text", "text": TOLD}])},
        {"prompt": ASKED, "completion": TOLD},
        {"prompt": chat(ASKED), "completion": [{"role": "assistant", "content": TOLD}]},
        {"prompt": [SYSTEM, *chat(ASKED)], "completion": [{"role": "assistant", "content": TOLD}]},
        {"instruction": ASKED, "input": "", "output": TOLD},
        {"instruction": "What is", "input": "2 + 3?", "output": TOLD, "text": "a rendered template"},
        {"question": ASKED, "answer": TOLD, "messages": None},
    ],
)
def test_every_format_gives_prompt_and_answer(row):
    [text] = row_texts(pool_of(row))
    assert text.prompt.replace("\n", " ") == ASKED
    assert text.answer == TOLD


def test_plain_text_is_all_answer():
    [text] = row_texts(pool_of({"text": TOLD}))
    assert text == RowText("", TOLD)
    assert text.whole == TOLD
    assert RowText(ASKED, TOLD).whole == f"{ASKED}\n{TOLD}"


def test_an_empty_answer_is_an_answer():
    assert row_texts(pool_of({"prompt": ASKED, "completion": ""})) == [RowText(ASKED, "")]


def test_a_chat_has_one_text_a_turn():
    [turns] = row_turns(pool_of({"messages": [SYSTEM, *chat("a", "b", "c", "d")]}))
    assert turns == [RowText("a", "b"), RowText("c", "d")]
    assert joined(turns) == RowText("a\nb\nc", "d")


def test_two_answers_in_a_row_are_one_turn():
    messages = [*chat("a", "b"), {"role": "assistant", "content": "c"}]
    assert row_turns(pool_of({"messages": messages})) == [[RowText("a", "b\nc")]]


def test_a_tool_call_without_text_is_no_text():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": ["f"]}]
    assert row_texts(pool_of({"messages": messages})) == [RowText("a", "")]


def test_messages_without_known_roles_end_in_the_answer():
    assert row_texts(pool_of({"messages": [{"content": "a"}, {"content": "b"}]})) == [RowText("a", "b")]
    assert row_texts(pool_of({"messages": [SYSTEM]})) == [RowText("", "")]


def test_tokens_are_decoded_by_their_labels():
    tokenizer = tiny_tokenizer()
    prompt, answer = (tokenizer(text)["input_ids"] for text in (ASKED, TOLD))
    row = {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
    padded = {name: [*values, 0 if name == "input_ids" else -100] for name, values in row.items()}
    padded["attention_mask"] = [1] * len(row["input_ids"]) + [0]
    tensors = {name: torch.tensor(values) for name, values in row.items()}
    for each in (row, padded, tensors):
        assert row_texts(pool_of(rows=[each]), tokenizer) == [RowText(ASKED, TOLD)]


def test_labels_that_are_no_tokens_make_no_prompt():
    tokenizer = tiny_tokenizer()
    ids = tokenizer(TOLD)["input_ids"]
    for labels in (None, 1, torch.tensor(1), [0.0, 1.0]):
        assert row_texts(pool_of(rows=[{"input_ids": ids, "labels": labels}]), tokenizer) == [RowText("", TOLD)]


def test_encoder_and_decoder_are_prompt_and_answer():
    tokenizer = tiny_tokenizer()
    row = {"input_ids": tokenizer(ASKED)["input_ids"], "labels": [*tokenizer(TOLD)["input_ids"], -100]}
    assert row_texts(pool_of(rows=[row]), tokenizer) == [RowText(ASKED, TOLD)]


def test_a_row_cut_inside_a_character_does_not_end_in_a_broken_one():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("naïve é")["input_ids"][:-1]
    assert row_texts(pool_of(rows=[{"input_ids": ids, "labels": ids}]), tokenizer) == [RowText("", "naïve ")]


def test_examples_without_text_fall_back_to_tokens():
    tokenizer = tiny_tokenizer()
    ids = tokenizer(TOLD)["input_ids"]
    pool = make_pool([{"input_ids": ids, "labels": ids}])
    assert row_texts(pool, tokenizer) == [RowText("", TOLD)]
    assert not has_text(pool)
    with pytest.raises(DataError, match="pass the tokenizer as processing_class"):
        row_texts(pool)
    assert id_text(pool.rows[0]).answer.split() == [str(token) for token in ids]


def test_pools_made_from_text_need_no_tokenizer_to_be_read():
    rows = [{"prompt": ASKED, "completion": TOLD}, {"prompt": "b", "completion": "c"}]
    pool = make_pool(rows, processing_class=tiny_tokenizer())
    assert has_text(pool)
    assert row_texts(pool) == [RowText(ASKED, TOLD), RowText("b", "c")]
    assert row_texts(pool.take([1])) == [RowText("b", "c")]


def test_reading_shows_progress_and_stops():
    spec, seen = get_method("selection", "length"), []

    def progress(iterable, total, description):
        seen.append((total, description))
        return iterable

    context = make_context(spec, pool=toy_pool(4), progress=progress)
    assert list(reading(context, range(4), "Reading")) == [0, 1, 2, 3]
    assert seen == [(4, "Reading")]
    stopped = make_context(spec, pool=toy_pool(4), stop_requested=lambda: True)
    with pytest.raises(ScoringStoppedError, match="Reading: stopped on request"):
        list(reading(stopped, range(4), "Reading"))
