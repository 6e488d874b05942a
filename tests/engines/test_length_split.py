import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_eff.engines.length_split import split_length
from hf_eff.testing.tiny import tiny_model


def batch(rows=2, length=10, masked=0):
    ids = torch.arange(3, 3 + rows * length).reshape(rows, length)
    labels = ids.clone()
    labels[:, :masked] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "flag": 7}


def predicted(inputs):
    """Labels that a causal language model predicts: all but the first of each row."""
    labels = inputs["labels"][:, 1:]
    return labels[labels != -100].tolist()


@given(length=st.integers(2, 60), limit=st.integers(2, 40), masked=st.integers(0, 60), rows=st.integers(1, 3))
def test_every_label_is_predicted_once(length, limit, masked, rows):
    whole = batch(rows, length, min(masked, length))
    parts = split_length(whole, limit)
    assert sorted(label for part in parts for label in predicted(part)) == sorted(predicted(whole))
    assert all(part["input_ids"].shape[1] <= limit for part in parts)
    assert parts
    assert all(part["flag"] == 7 for part in parts)


def test_a_short_batch_stays_whole():
    (only,) = split_length(batch(length=10), 10)
    assert torch.equal(only["input_ids"], batch(length=10)["input_ids"])


def test_positions_start_anew():
    whole = {**batch(length=9), "position_ids": torch.arange(9).expand(2, 9)}
    first, second = split_length(whole, 5)
    assert first["position_ids"].tolist() == second["position_ids"].tolist() == [[0, 1, 2, 3, 4]] * 2
    assert first["input_ids"][:, -1].tolist() == second["input_ids"][:, 0].tolist()


def test_losses_are_those_of_the_segments_alone():
    """A literal reference: cut by hand, sum the token losses."""
    model = tiny_model().eval()
    whole = batch(rows=2, length=9)
    whole.pop("flag")

    def total(ids):
        logits = model(input_ids=ids).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")

    ids = whole["input_ids"]
    by_hand = total(ids[:, :5]) + total(ids[:, 4:])
    ours = sum(total(part["input_ids"]) for part in split_length(whole, 5))
    assert ours.item() == pytest.approx(by_hand.item(), rel=1e-6)
    assert ours.item() != pytest.approx(total(ids).item(), rel=1e-4)  # context is lost: this rung is not exact
