"""Pools hold what the trainer would train on: token for token as TRL prepares it, with invalid rows marked."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image
from transformers import DataCollatorForSeq2Seq

from hf_eff.engines.pooling import PadRows, RowFormat, make_pool
from hf_eff.errors import DataError, OptionError
from hf_eff.numerics.row_hash import row_hashes
from hf_eff.testing.tiny import tiny_model, tiny_pool, tiny_tokenizer

TEXTS = ["a short text", "another text that is a little longer", "ends already<eos>", "x"]
CHATS = [
    [{"role": "user", "content": f"question {i}?"}, {"role": "assistant", "content": f"answer {i * 100}"}] * (1 + i % 2)
    for i in range(4)
]
MARKED = (
    "{% for message in messages %}<|{{ message['role'] }}|>{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<eos>{% endgeneration %}{% else %}{{ message['content'] }}<eos>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
POOLS = {
    "text": Dataset.from_dict({"text": TEXTS, "source": ["a"] * 4}),
    "prompt_completion": Dataset.from_dict({"prompt": TEXTS, "completion": [" one", " two<eos>", " three", " 4"]}),
    "messages": Dataset.from_dict({"messages": CHATS}),
    "prompt_completion_chat": Dataset.from_dict(
        {"prompt": [c[:-1] for c in CHATS], "completion": [c[-1:] for c in CHATS]}
    ),
    "from_value": Dataset.from_dict(
        {"conversations": [[{"from": m["role"], "value": m["content"]} for m in c] for c in CHATS]}
    ),
    "tokenised": Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9], [10, 11, 12, 13]]}),
    "tokenised_mask": Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9]], "completion_mask": [[0, 1, 1], [0, 1]]}),
    "tokenised_labels": Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9]], "labels": [[-100, 6, 7], [8, -100]]}),
}
FORMATS = {
    "plain": {},
    "whole": {"completion_only_loss": False},
    "masked": {"completion_only_loss": True},
    "cut": {"max_length": 14},
    "cut_start": {"max_length": 14, "truncation_mode": "keep_end"},
    "uncut": {"max_length": None},
}


def trl_rows(dataset, tokenizer, tmp_path, **options):
    """What TRL's trainer trains on, with the number of each row it kept."""
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(
        output_dir=str(tmp_path), report_to=[], bf16=False, use_cpu=True, gradient_checkpointing=False, **options
    )
    numbered = dataset.add_column("number", list(range(len(dataset))))
    trainer = SFTTrainer(tiny_model(layers=2, width=16), args, train_dataset=numbered, processing_class=tokenizer)
    return {row["number"]: (row["input_ids"], row["labels"]) for row in trainer.train_dataset}


def assert_same_as_trl(dataset, tokenizer, tmp_path, options):
    expected = trl_rows(dataset, copy.deepcopy(tokenizer), tmp_path, **options)
    pool = make_pool(dataset, processing_class=tokenizer, row_format=RowFormat(**options))
    assert len(pool) == len(dataset)
    found = {i: (pool.rows[i]["input_ids"], pool.rows[i]["labels"]) for i in range(len(pool))}
    assert {i: row for i, row in found.items() if i in expected} == expected
    for i in set(found) - set(expected):
        assert set(found[i][1]) == {-100}  # TRL dropped it: nothing left to learn
    return pool


@pytest.mark.parametrize("options", FORMATS.values(), ids=list(FORMATS))
@pytest.mark.parametrize("name", list(POOLS))
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_rows_are_those_of_trl(name, options, tmp_path):
    assert_same_as_trl(POOLS[name], tiny_tokenizer(), tmp_path, options)


@pytest.mark.parametrize("name", ["messages", "prompt_completion_chat"])
def test_assistant_only_loss_is_that_of_trl(name, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = MARKED
    pool = assert_same_as_trl(POOLS[name], tokenizer, tmp_path, {"assistant_only_loss": True})
    whole = make_pool(POOLS[name], processing_class=tokenizer, row_format=RowFormat(completion_only_loss=False))
    assert (pool.loss_lengths < whole.loss_lengths).all()


def test_a_formatting_function_makes_text():
    rows = Dataset.from_dict({"q": ["one", "two"], "a": ["1", "2"]})
    row_format = RowFormat(formatting_func=lambda row: f"{row['q']}={row['a']}")
    pool = make_pool(rows, processing_class=tiny_tokenizer(), row_format=row_format)
    texts = Dataset.from_dict({"text": ["one=1", "two=2"]})
    assert pool.rows["input_ids"][:] == make_pool(texts, processing_class=tiny_tokenizer()).rows["input_ids"][:]


def test_measures_and_names():
    rows = tiny_pool(6)
    pool = make_pool(rows, processing_class=tiny_tokenizer())
    for i, row in enumerate(pool.rows):
        assert pool.lengths[i] == len(row["input_ids"])
        assert pool.loss_lengths[i] == sum(label != -100 for label in row["labels"][1:])
    assert pool.index.tolist() == list(range(6))
    assert pool.sources == pool.groups == rows["source"][:]
    assert pool.row_hash == row_hashes(rows)
    grouped = make_pool(rows.add_column("task", list("abcabc")), processing_class=tiny_tokenizer(), group_column="task")
    assert grouped.groups == list("abcabc")
    assert grouped.sources == rows["source"][:]


def test_rows_without_anything_to_learn_are_marked_invalid():
    rows = [
        {"input_ids": [5, 6, 7], "labels": [5, -100, -100]},  # the only label falls to the shift
        {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]},
        {"input_ids": [], "labels": []},
    ]
    pool = make_pool(rows)
    assert (pool.lengths.tolist(), pool.loss_lengths.tolist()) == ([3, 3, 0], [0, 1, 0])
    shifted = make_pool(rows, row_format=RowFormat(is_causal_lm=False))
    assert shifted.loss_lengths.tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"input_ids": [5, 6], "label": 1}, {"input_ids": [5], "label": -100}], [1, 0]),
        ([{"input_ids": [5, 6], "labels": 0.5}], [1]),
        ([{"input_ids": [5, 6], "labels": [1.0, 0.0, 1.0]}], [1]),
        ([{"input_ids": [5, 6], "labels": [7, 8, 9]}], [3]),
        ([{"input_ids": [5, 6], "start_positions": 0, "end_positions": 1}], [1]),
    ],
    ids=["classes", "regression", "multi_label", "seq2seq", "spans"],
)
def test_rows_of_other_tasks(rows, expected):
    pool = make_pool(rows, row_format=RowFormat(is_causal_lm=False))
    assert pool.loss_lengths.tolist() == expected
    batch = PadRows()([pool.rows[0]])
    assert batch["attention_mask"].shape == batch["input_ids"].shape
    assert ("labels" in batch) == ("start_positions" not in rows[0])


def test_the_collator_equals_that_of_transformers():
    tokenizer = tiny_tokenizer()
    rows = list(make_pool(tiny_pool(5), processing_class=tokenizer).rows)
    ours = PadRows.of(tokenizer)(rows)
    theirs = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)(copy.deepcopy(rows))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_a_transform_does_not_change_what_is_hashed_or_read():
    rows = tiny_pool(5)
    noisy = rows.with_transform(lambda batch: {"prompt": ["?"], "completion": [str(random.random())]})
    plain = make_pool(rows, processing_class=tiny_tokenizer())
    found = make_pool(noisy, processing_class=tiny_tokenizer())
    assert found.row_hash == plain.row_hash
    assert found.rows["labels"][:] == plain.rows["labels"][:]


def test_the_global_random_state_is_untouched():
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    make_pool(tiny_pool(5), processing_class=tiny_tokenizer())
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state[1:]  # noqa: NPY002


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (Dataset.from_list([]), "the pool is empty"),
        ([], "the pool is empty"),
        (tiny_pool(4).to_iterable_dataset(), "the pool is a stream"),
        ([1, 2], "must be a datasets.Dataset or a sequence of mappings"),
        (Dataset.from_dict({"a": ["x"]}), r"columns \['a'\] are in no known format; rows need 'input_ids'"),
        (Dataset.from_dict({"prompt": ["x"]}), "are in no known format"),
        (Dataset.from_dict({"text": ["x", None]}), "a row has None where text or messages are expected"),
        (Dataset.from_dict({"messages": [[]]}), r"a row has \[\] where"),
    ],
    ids=["empty", "empty_list", "stream", "numbers", "unknown", "prompt_only", "null", "no_messages"],
)
def test_unreadable_pools_are_named(rows, message):
    with pytest.raises(DataError, match=message):
        make_pool(rows, processing_class=tiny_tokenizer())


def test_missing_tokenizer_columns_and_bad_formats_are_named():
    with pytest.raises(DataError, match="rows of text need a tokenizer: pass processing_class="):
        make_pool(tiny_pool(4))
    with pytest.raises(DataError, match="group_column='nope' is not a column"):
        make_pool(tiny_pool(4), processing_class=tiny_tokenizer(), group_column="nope")
    with pytest.raises(OptionError, match="truncation_mode must be"):
        RowFormat(truncation_mode="middle")
    with pytest.raises(OptionError, match="max_length must be at least 1"):
        RowFormat(max_length=0)


def test_images_are_refused_unless_left_out_of_the_hash():
    features = Features({"text": tiny_pool(1).features["prompt"], "picture": Image(decode=False)})
    rows = Dataset.from_list([{"text": "x", "picture": {"bytes": b"x", "path": None}}], features=features)
    with pytest.raises(DataError, match="column 'picture' holds Image"):
        make_pool(rows, processing_class=tiny_tokenizer())
    assert len(make_pool(rows, processing_class=tiny_tokenizer(), columns=["text"])) == 1
