"""Parts of a micro-batch: every row in exactly one, and gradients that add up to those of the whole."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_eff.contracts.memory import StepContext
from hf_eff.engines.row_split import loss_rule, num_rows, split_rows, train_in_parts, trim_padding
from hf_eff.errors import PlanError
from hf_eff.testing.tiny import tiny_model


def rows_of(count, length=6, seed=0):
    ids = torch.randint(3, 200, (count, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


# -- splitting


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 12), parts=st.integers(1, 15))
def test_parts_hold_every_row_once_in_order_and_differ_by_one_at_most(rows, parts):
    batch = rows_of(rows)
    pieces = split_rows(batch, parts)
    sizes = [num_rows(piece) for piece in pieces]
    assert len(pieces) == min(rows, parts)
    assert max(sizes) - min(sizes) <= 1
    for name, whole in batch.items():
        assert torch.equal(torch.cat([piece[name] for piece in pieces]), whole)


def test_other_values_go_to_every_part_as_they_are():
    shared = {
        "mask": torch.ones(6, 6),
        "positions": torch.arange(6)[None],
        "nested": {"x": torch.ones(4)},
        "flag": True,
    }
    for piece in split_rows({**rows_of(4), **shared}, 2):
        assert all(piece[name] is shared[name] for name in shared)


def test_rows_are_views_and_the_batch_is_left_alone():
    batch = rows_of(4)
    piece = split_rows(batch, 2)[1]
    assert piece["input_ids"].data_ptr() == batch["input_ids"][2:].data_ptr()
    assert num_rows(batch) == 4


def test_packed_rows_are_refused():
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    flat = {"input_ids": torch.ones(1, 6, dtype=torch.long), "position_ids": positions}
    assert len(split_rows(flat, 1)) == 1
    with pytest.raises(PlanError, match="several documents"):
        split_rows(flat, 2)
    with pytest.raises(PlanError, match="several documents"):
        split_rows({**rows_of(2), "cu_seq_lens_q": torch.tensor([0, 6, 12])}, 2)
    one_row = {**flat, "position_ids": torch.arange(6)[None]}
    assert len(split_rows(one_row, 2)) == 1


def test_images_that_are_not_listed_by_rows_are_refused():
    assert len(split_rows({**rows_of(4), "pixel_values": torch.ones(4, 3, 8, 8)}, 2)) == 2
    with pytest.raises(PlanError, match="pixel_values has 30 entries for 4 rows"):
        split_rows({**rows_of(4), "pixel_values": torch.ones(30, 3)}, 2)


def test_a_batch_without_tensors_is_refused():
    with pytest.raises(PlanError, match="no tensor with rows"):
        num_rows({"text": ["a"]})


def test_trimming_cuts_columns_that_are_padding_in_every_row():
    batch = rows_of(2)
    batch["attention_mask"][0, 4:] = 0
    batch["attention_mask"][1, 5:] = 0
    batch["labels"][batch["attention_mask"] == 0] = -100
    short = trim_padding(batch)
    assert {name: tuple(value.shape) for name, value in short.items()} == dict.fromkeys(batch, (2, 5))
    model = tiny_model(layers=1, width=32)
    assert model(**short).loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-6)
    left = {**batch, "attention_mask": batch["attention_mask"].flip(1)}
    assert trim_padding(left)["input_ids"].shape == (2, 6)


def test_trimming_keeps_labels_and_masks_of_other_shapes():
    batch = rows_of(2)
    batch["attention_mask"][:, 5:] = 0  # but the labels there count
    assert trim_padding(batch)["input_ids"].shape == (2, 6)
    assert trim_padding({"input_ids": batch["input_ids"]})["input_ids"].shape == (2, 6)


# -- training in parts


class Regression(nn.Module):
    """Linear regression whose mean squared error ignores any number of items."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)
        nn.init.normal_(self.linear.weight, generator=torch.Generator().manual_seed(0))

    def forward(self, features, labels):
        return ((self.linear(features).squeeze(1) - labels) ** 2).mean()


def model_loss(model, inputs, num_items=None):
    extra = {} if num_items is None else {"num_items_in_batch": num_items}
    return model(**inputs, **extra).loss


def regression_loss(model, inputs, _num_items):
    return model(**inputs)


def contrast_loss(model, inputs, _num_items):
    states = model(input_ids=inputs["input_ids"]).logits.mean(dim=1)
    return -(states @ states.T).log_softmax(dim=1).diagonal().mean()


def stock_of(loss):
    def stock(model, inputs, num_items, **_changes):
        value = loss(model, inputs, num_items)
        value.backward()
        return value.detach()

    return stock


def context_of(model, inputs, loss=model_loss, num_items=None, **fields):
    known = {
        "model": model,
        "unwrapped": model,
        "inputs": inputs,
        "num_items": num_items,
        "micro_step": 0,
        "micro_steps": 1,
        "global_step": 0,
        "stock": stock_of(loss),
        "loss": loss,
        "mean_over_ranks": lambda value: value,
    }
    return StepContext(**{**known, **fields})


def uneven(rows=5, length=8):
    batch = rows_of(rows, length)
    for row in range(rows):
        batch["labels"][row, : row + 1] = -100
    return batch


def gradients(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def expect_same(model, context, parts):
    whole_model, part_model = copy.deepcopy(model), copy.deepcopy(model)
    whole = context.stock(whole_model, context.inputs, context.num_items)
    split = context_of(part_model, context.inputs, context.loss, context.num_items)
    found = train_in_parts(split, split_rows(context.inputs, parts))
    assert found.item() == pytest.approx(whole.item(), rel=1e-6)
    apart = (gradients(whole_model) - gradients(part_model)).norm() / gradients(whole_model).norm()
    assert apart < 1e-6
    assert not any(parameter._backward_hooks for parameter in part_model.parameters())


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
@pytest.mark.parametrize("num_items", [None, 17])
def test_gradient_of_the_parts_is_that_of_the_whole(parts, num_items):
    model, batch = tiny_model(layers=2, width=32), uneven()
    context = context_of(model, batch, num_items=num_items)
    assert loss_rule(context) == ("sum" if num_items else "predicted tokens")
    expect_same(model, context, parts)


@pytest.mark.parametrize("num_items", [None, 5])
def test_a_mean_over_rows_is_noticed_whatever_the_trainer_says(num_items):
    generator = torch.Generator().manual_seed(0)
    batch = {"features": torch.randn(5, 3, generator=generator), "labels": torch.randn(5, generator=generator)}
    model = Regression()
    context = context_of(model, batch, regression_loss, num_items)
    assert loss_rule(context) == "rows"
    expect_same(model, context, 2)


def test_parts_without_loss_are_left_out_of_a_mean():
    model, batch = tiny_model(layers=1, width=32), uneven(4)
    batch["labels"][2:] = -100
    seen = []

    def stock(model, inputs, num_items, **changes):
        seen.append(inputs)
        return stock_of(model_loss)(model, inputs, num_items)

    expect_same(model, context_of(model, batch), 2)
    loss = train_in_parts(context_of(model, batch, stock=stock), split_rows(batch, 2))
    assert len(seen) == 1
    assert torch.isfinite(loss)


def test_a_loss_that_compares_rows_is_refused():
    model = tiny_model(layers=1, width=32)
    with pytest.raises(PlanError, match="neither the sum nor a mean"):
        train_in_parts(context_of(model, rows_of(4), contrast_loss), split_rows(rows_of(4), 2))


def test_a_model_is_asked_once_and_not_at_all_for_one_part():
    model, batch, asked = tiny_model(layers=1, width=32), uneven(), []

    def loss(model, inputs, num_items):
        asked.append(inputs)
        return model_loss(model, inputs, num_items)

    stock = stock_of(model_loss)
    train_in_parts(context_of(model, batch, loss, 9, stock=stock), split_rows(batch, 1))
    assert not asked
    for _ in range(3):
        train_in_parts(context_of(model, batch, loss, 9, stock=stock), split_rows(batch, 2))
    assert len(asked) == 3  # a pair of rows, and each of them


def test_the_question_leaves_mode_random_state_and_gradients_alone():
    model = tiny_model(layers=1, width=32, attention_dropout=0.5).train()
    state = torch.get_rng_state()
    assert loss_rule(context_of(model, uneven(), num_items=9)) == "sum"
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_micro_batches_are_numbered_through_and_the_last_part_has_the_last_number():
    model, seen = tiny_model(layers=1, width=32), []

    def stock(model, inputs, num_items, **changes):
        seen.append((changes["micro_step"], changes["micro_steps"]))
        return torch.zeros(())

    for micro, rows in enumerate((6, 2)):  # the second micro-batch is too small for three parts
        context = context_of(model, rows_of(rows), num_items=9, stock=stock, micro_step=micro, micro_steps=2)
        train_in_parts(context, split_rows(context.inputs, 3), numbers=3)
    assert seen == [(0, 6), (1, 6), (2, 6), (3, 6), (5, 6)]


def test_a_method_below_that_asks_for_the_loss_gets_its_weighted_share():
    model, batch = tiny_model(layers=1, width=32), uneven()
    values = []

    def forward_only_stock(model, inputs, num_items, *, loss, **changes):
        with torch.no_grad():
            values.append(loss(model, inputs, num_items))
        return values[-1]

    context = context_of(model, batch, stock=forward_only_stock)
    found = train_in_parts(context, split_rows(batch, 2))
    whole = model_loss(model, batch).item()
    assert sum(value.item() for value in values) == pytest.approx(whole, rel=1e-6)
    assert found.item() == pytest.approx(whole, rel=1e-6)


def test_only_the_last_part_exchanges_gradients():
    from contextlib import contextmanager

    model, log = tiny_model(layers=1, width=32), []

    class Wrapper(nn.Module):
        @contextmanager
        def no_sync(self):
            log.append("alone")
            yield
            log.append("end")

    def stock(*args, **changes):
        log.append("part")
        return torch.zeros(())

    context = context_of(model, rows_of(3), num_items=9, stock=stock)
    context.model = Wrapper()
    train_in_parts(context, split_rows(rows_of(3), 3))
    assert log == ["alone", "part", "end", "alone", "part", "end", "part"]
