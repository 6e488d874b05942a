import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_eff.engines.prompted_rows import left_padded, prompted_rows
from hf_eff.errors import DataError

TOKENS = st.lists(st.integers(3, 9), min_size=1, max_size=5)


def batch(rows, side):
    """Rows of (prompt, answer) padded with 0 on one side, as a collator makes them."""
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, labels, mask = [], [], []
    for prompt, answer in rows:
        gap = [0] * (longest - len(prompt) - len(answer))
        parts = (prompt + answer, [-100] * len(prompt) + answer, [1] * len(prompt + answer))
        pads = (gap, [-100] * len(gap), gap)
        for column, part, pad in zip((ids, labels, mask), parts, pads, strict=True):
            column.append(pad + part if side == "left" else part + pad)
    names = ("input_ids", "labels", "attention_mask")
    return {name: torch.tensor(column) for name, column in zip(names, (ids, labels, mask), strict=True)}


@given(st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=4), st.sampled_from(["left", "right"]))
def test_prompts_and_answers_come_back(rows, side):
    found = prompted_rows(batch(rows, side))
    assert [(row.prompt.tolist(), row.answer.tolist()) for row in found] == rows


@given(st.lists(TOKENS, min_size=1, max_size=4))
def test_left_padding_ends_every_row_alike(rows):
    ids, mask = left_padded([torch.tensor(row) for row in rows], pad=0)
    assert ids.shape == mask.shape == (len(rows), max(map(len, rows)))
    for row, found, real in zip(rows, ids, mask, strict=True):
        assert found[-len(row) :].tolist() == row
        assert found[: -len(row)].tolist() == [0] * (ids.shape[1] - len(row))
        assert real.tolist() == [0] * (ids.shape[1] - len(row)) + [1] * len(row)


def test_the_first_answer_of_a_chat_counts():
    labels = torch.tensor([[-100, -100, 5, 6, -100, 8]])
    (row,) = prompted_rows({"input_ids": torch.tensor([[3, 4, 5, 6, 7, 8]]), "labels": labels})
    assert (row.prompt.tolist(), row.answer.tolist()) == ([3, 4], [5, 6])


def test_a_row_cut_off_before_its_answer_is_left_out():
    inputs = batch([([3, 4], [5]), ([6, 7], [8])], "right")
    inputs["labels"][0] = -100
    assert [row.answer.tolist() for row in prompted_rows(inputs)] == [[8]]
    inputs["labels"][:] = -100
    with pytest.raises(DataError, match="no row of the batch has an answer"):
        prompted_rows(inputs)


def test_an_encoder_decoder_has_its_prompt_in_the_source():
    inputs = {
        "input_ids": torch.tensor([[3, 4, 0]]),
        "attention_mask": torch.tensor([[1, 1, 0]]),
        "labels": torch.tensor([[5, 6, 1, -100]]),
    }
    (row,) = prompted_rows(inputs, is_encoder_decoder=True)
    assert (row.prompt.tolist(), row.answer.tolist()) == ([3, 4], [5, 6, 1])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"labels": torch.tensor([[3, 4, 5]])}, r"has no prompt: .*\(completion_only_loss=True, or"),
        ({"labels": torch.tensor([1])}, "needs input_ids and labels of shape"),
        ({"cu_seq_lens_q": torch.tensor([0, 3])}, "packing=False and padding_free=False"),
        ({"position_ids": torch.tensor([[0, 1, 0]])}, "packing=False and padding_free=False"),
    ],
)
def test_batches_without_prompts_are_refused(changes, sentence):
    inputs = {"input_ids": torch.tensor([[3, 4, 5]]), "labels": torch.tensor([[-100, 4, 5]]), **changes}
    with pytest.raises(DataError, match=sentence):
        prompted_rows(inputs)
