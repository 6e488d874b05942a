from __future__ import annotations

import json

import pytest
from datasets import Dataset, DatasetDict

from hf_eff.cli.columns import name_columns, tokenise
from hf_eff.cli.sources import load_config, load_model, load_rows
from hf_eff.errors import DataError, OptionError
from hf_eff.testing.tiny import tiny_model, tiny_tokenizer

ROWS = [{"prompt": f"{n} + 1 =", "completion": f" is {n + 1}"} for n in range(5)]


@pytest.fixture
def written(tmp_path):
    data = Dataset.from_list(ROWS)
    data.to_json(tmp_path / "rows.jsonl")
    data.to_csv(tmp_path / "rows.csv")
    data.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    data.save_to_disk(tmp_path / "saved")
    DatasetDict({"fit": data, "held": data.select([0])}).save_to_disk(tmp_path / "parts")
    return tmp_path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "saved"])
def test_every_local_format_gives_the_same_rows(written, name):
    assert load_rows(str(written / name)).to_list() == ROWS


def test_an_arrow_file_is_read(written):
    arrow = next((written / "saved").glob("*.arrow"))
    assert load_rows(str(arrow)).to_list() == ROWS


def test_a_saved_dictionary_needs_one_of_its_splits(written):
    assert len(load_rows(str(written / "parts"), split="held")) == 1
    with pytest.raises(DataError, match=r"has no split 'train'; it has \['fit', 'held'\]"):
        load_rows(str(written / "parts"))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("none.jsonl", None, "does not exist"),
        ("rows.txt", "x", "file of unknown format; use one of"),
        ("broken.json", '[{"a": ', "cannot be read"),
        ("broken.parquet", "not parquet", "cannot be read"),
        ("empty.jsonl", "", "has no rows"),
        ("empty.csv", "prompt,completion\n", "no data"),
        ("none/", None, "does not exist"),
    ],
)
def test_unreadable_rows_are_one_sentence(tmp_path, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=sentence) as caught:
        load_rows(f"{tmp_path}/{name}")
    assert "\n" not in str(caught.value)


def test_a_dataset_that_the_hub_cannot_give_is_one_sentence():
    with pytest.raises(DataError, match="dataset='nobody/nothing' cannot be read"):
        load_rows("nobody/nothing")


def test_zero_rows_are_refused(tmp_path):
    Dataset.from_dict({"text": []}).save_to_disk(tmp_path / "empty")
    with pytest.raises(DataError, match="has no rows"):
        load_rows(str(tmp_path / "empty"))


def test_embedded_rows_and_their_held_out_side_share_no_question():
    pool = load_rows("reasoning-gym:chain_sum")
    target = load_rows("reasoning-gym:chain_sum", held_out=True)
    assert set(pool["source"]) == set(target["source"]) == {"chain_sum"}
    assert not set(pool["prompt"]) & set(target["prompt"])
    with pytest.raises(DataError, match="as target needs a family"):
        load_rows("reasoning-gym", held_out=True)
    with pytest.raises(DataError, match="no family 'nonsense'"):
        load_rows("reasoning-gym:nonsense")


def test_a_model_folder_gives_model_and_tokenizer_that_can_pad(tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.pad_token = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, words = load_model(str(tmp_path))
    assert loaded.config.hidden_size == model.config.hidden_size
    assert words.pad_token == words.eos_token
    assert load_config(str(tmp_path)).num_hidden_layers == 4


def test_a_model_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(OptionError, match="give a Hub id, a folder or 'smollm2'") as caught:
        load_model(str(tmp_path / "none"))
    assert "\n" not in str(caught.value)


PAIR = {"text": None, "prompt": "q", "completion": "a"}


def test_columns_are_renamed_and_checked():
    rows = Dataset.from_list([{"q": "1 + 1 =", "a": " 2", "prompt": "other"}])
    named = name_columns(rows, PAIR, "d")
    assert named.to_list() == [{"prompt": "1 + 1 =", "completion": " 2"}]
    with pytest.raises(DataError, match=r"has no column 'question'; it has \['q', 'a', 'prompt'\]"):
        name_columns(rows, {**PAIR, "prompt": "question"}, "d")
    with pytest.raises(DataError, match="it needs 'messages', 'prompt' and 'completion'"):
        name_columns(rows, {}, "d")


def test_numbers_become_text():
    rows = name_columns(Dataset.from_list([{"prompt": 12, "completion": 3}]), {}, "d")
    assert rows.to_list() == [{"prompt": "12", "completion": "3"}]


def test_tokenised_rows_carry_loss_on_the_answer_only(tokenizer):
    rows = tokenise(Dataset.from_list([{**ROWS[0], "source": "sum"}]), tokenizer, 64)
    row = rows[0]
    prompt = tokenizer(ROWS[0]["prompt"])["input_ids"]
    answer = [*tokenizer(ROWS[0]["completion"])["input_ids"], tokenizer.eos_token_id]
    assert row == {"source": "sum", "input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
    assert len(tokenise(Dataset.from_list(ROWS), tokenizer, 4)[0]["input_ids"]) == 4


def test_texts_and_chats_carry_loss_everywhere(tokenizer):
    text = tokenise(Dataset.from_list([{"text": "ab"}]), tokenizer, 64)
    assert text[0]["labels"] == text[0]["input_ids"] == [*tokenizer("ab")["input_ids"], tokenizer.eos_token_id]
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    chat = tokenise(Dataset.from_list([{"messages": talk}]), tokenizer, 64)
    assert tokenizer.decode(chat[0]["labels"]) == "<|user|>hi<eos><|assistant|>yo<eos>"


def test_a_chat_split_in_prompt_and_answer_masks_the_prompt(tokenizer):
    row = {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "yo"}]}
    encoded = tokenise(Dataset.from_list([row]), tokenizer, 64)[0]
    assert tokenizer.decode(encoded["input_ids"]) == "<|user|>hi<eos><|assistant|>yo<eos>"
    assert tokenizer.decode([token for token in encoded["labels"] if token != -100]) == "yo<eos>"


def test_an_encoder_decoder_model_gets_source_and_target(tokenizer):
    row = tokenise(Dataset.from_list(ROWS), tokenizer, 64, seq2seq=True)[0]
    assert tokenizer.decode(row["input_ids"]) == ROWS[0]["prompt"]
    assert tokenizer.decode(row["labels"]) == ROWS[0]["completion"]
    with pytest.raises(DataError, match="needs the columns 'prompt' and 'completion'"):
        tokenise(Dataset.from_list([{"text": "x"}]), tokenizer, 64, seq2seq=True)
