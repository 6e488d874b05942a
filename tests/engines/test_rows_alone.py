"""Some rows of a batch look as if they had been put together alone, and their loss is their own mean."""

import pytest
import torch

from hf_eff.engines.rows_alone import items_of, rows_alone
from hf_eff.errors import PlanError
from hf_eff.testing.rehearsal import token_loss
from hf_eff.testing.tiny import collator, tiny_model, tiny_tokenizer

LENGTHS = (3, 5, 9, 7)


def rows():
    generator = torch.Generator().manual_seed(0)
    made = [torch.randint(6, 200, (size,), generator=generator).tolist() for size in LENGTHS]
    return [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in made]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("part", [slice(2), slice(2, 4), slice(4)])
def test_rows_are_padded_as_the_collator_pads_them_alone(side, part):
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    collate = collator(tokenizer)
    whole, alone = collate(rows()), collate(rows()[part])
    found = rows_alone(dict(whole), part)
    assert set(found) == set(alone)
    for name, tensor in alone.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].is_contiguous()


def test_what_is_no_row_is_passed_on_and_without_a_mask_nothing_is_cut():
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "scale": torch.tensor(2.0), "name": "x"}
    found = rows_alone(batch, slice(1))
    assert found["input_ids"].shape == (1, 4)
    assert found["name"] == "x"
    assert float(found["scale"]) == 2.0


def test_a_label_on_padding_is_not_cut_off():
    ids = torch.ones(2, 4, dtype=torch.long)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    labels = torch.tensor([[-100, 5, 6, -100], [5, 5, 5, 5]])
    found = rows_alone({"input_ids": ids, "attention_mask": mask, "labels": labels}, slice(1))
    assert found["labels"].tolist() == [[-100, 5, 6]]


def test_an_all_masked_part_keeps_a_column():
    mask = torch.tensor([[0, 0], [1, 1]])
    assert rows_alone({"input_ids": mask + 3, "attention_mask": mask}, slice(1))["input_ids"].shape == (1, 1)


def test_labels_of_two_stacks_keep_their_own_length():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    batch = {"input_ids": mask.clone(), "attention_mask": mask, "labels": torch.full((2, 3), 7)}
    found = rows_alone(batch, slice(1), two_stacks=True)
    assert found["input_ids"].shape == (1, 2)
    assert found["labels"].shape == (1, 3)


def test_packed_rows_are_refused():
    positions = torch.tensor([[0, 1, 0, 1]])
    with pytest.raises(PlanError, match="several documents"):
        rows_alone({"input_ids": torch.ones(1, 4, dtype=torch.long), "position_ids": positions}, slice(1))


@pytest.mark.parametrize("number", [int, torch.tensor])
def test_the_loss_of_a_part_is_its_own_mean(number):
    model, whole = tiny_model(layers=2, width=32), dict(collator()(rows()))
    num_items = number(int((whole["labels"][:, 1:] != -100).sum()))
    for part in (slice(2), slice(2, 4), slice(4)):
        alone = rows_alone(whole, part)
        items = items_of(alone, whole, num_items)
        assert float(items) == int((alone["labels"][:, 1:] != -100).sum())
        assert torch.equal(token_loss(model, alone, items), token_loss(model, alone)), part


def test_labels_are_counted_as_the_trainer_does():
    unshifted = {"labels": torch.tensor([[5, 6], [7, -100]])}
    assert items_of({"labels": unshifted["labels"][:1]}, unshifted, 3) == 2  # every label counts
    assert items_of({"labels": unshifted["labels"][:1]}, unshifted, 1) == 1  # the first of a row does not
    assert items_of({"labels": torch.tensor([1])}, {"labels": torch.tensor([1, 0, 2])}, 3) == 1
    assert items_of({}, {}, 3) == 3
    assert items_of(unshifted, unshifted, None) is None


def test_a_part_without_labels_keeps_a_divisor_above_zero():
    whole = {"labels": torch.tensor([[-100, -100], [-100, 7]])}
    assert items_of({"labels": whole["labels"][:1]}, whole, 1) == 1
