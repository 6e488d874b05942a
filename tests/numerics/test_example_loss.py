"""Per-example losses against plain loops, and against transformers' own loss at batch one."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from hf_eff.errors import DataError, OptionError
from hf_eff.numerics import example_loss
from hf_eff.numerics.example_loss import example_losses


def literal(logits, labels, shift, reduction):
    losses = []
    for scores, goal in zip(logits, labels, strict=True):
        if shift:
            scores, goal = scores[:-1], goal[1:]
        terms = [-scores[t].log_softmax(0)[y] for t, y in enumerate(goal.tolist()) if y != -100]
        divisor = {"mean": len(terms), "sum": 1, "sqrt": math.sqrt(len(terms))}[reduction]
        losses.append(torch.stack(terms).sum() / divisor if terms else torch.tensor(float("nan"), dtype=logits.dtype))
    return torch.stack(losses)


def random_batch(seed=0, dtype=torch.float64, rows=5, length=9, vocab=13):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, length, vocab, generator=generator, dtype=torch.float64).mul(3).to(dtype)
    labels = torch.randint(0, vocab, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < 0.4] = -100
    labels[2] = -100  # nothing to predict
    labels[3, 1:] = -100
    labels[3, 0] = 4  # its only label falls off with the shift
    return logits, labels


@pytest.mark.parametrize("chunk_rows", [1, 4, 10_000])
@pytest.mark.parametrize("reduction", ["mean", "sum", "sqrt"])
@pytest.mark.parametrize("shift", [True, False])
def test_losses_and_gradients_equal_a_plain_loop(monkeypatch, shift, reduction, chunk_rows):
    logits, labels = random_batch()
    monkeypatch.setattr(example_loss, "_CHUNK_ELEMENTS", chunk_rows * logits.shape[-1])
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    losses, counts = example_losses(ours, labels, shift=shift, reduction=reduction)
    reference = literal(theirs, labels, shift, reduction)
    torch.testing.assert_close(losses, reference, rtol=1e-13, atol=1e-13, equal_nan=True)
    expected = (labels[:, 1:] if shift else labels).ne(-100).sum(1)
    assert counts.tolist() == expected.tolist()
    weights = torch.arange(1.0, 6.0, dtype=torch.float64)
    keep = counts > 0
    (losses * weights)[keep].sum().backward()
    (reference * weights)[keep].sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-13)


def test_rows_without_loss_positions_are_nan_and_give_zero_gradient():
    logits, labels = random_batch()
    logits.requires_grad_()
    losses, counts = example_losses(logits, labels, shift=True)
    assert losses.isnan().tolist() == [False, False, True, True, False]
    assert counts[[2, 3]].tolist() == [0, 0]
    losses.sum().backward()
    assert logits.grad.isfinite().all()
    assert not logits.grad[[2, 3]].any()


def test_half_precision_logits_are_summed_in_float32_and_keep_their_gradient_type():
    logits, labels = random_batch(dtype=torch.bfloat16)
    logits.requires_grad_()
    losses, _ = example_losses(logits, labels, shift=True, reduction="sum")
    reference = literal(logits.detach().float(), labels, True, "sum")
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, reference, rtol=1e-6, atol=1e-5, equal_nan=True)
    losses[counts_of(labels)].sum().backward()
    assert logits.grad.dtype == torch.bfloat16


def counts_of(labels):
    return labels[:, 1:].ne(-100).sum(1) > 0


def test_no_float_copy_of_all_logits_is_kept(monkeypatch):
    monkeypatch.setattr(example_loss, "_CHUNK_ELEMENTS", 2**12)
    logits = torch.zeros(4, 64, 512, dtype=torch.bfloat16, requires_grad=True)
    largest, saved = [], []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
                largest.append(result.numel())
            return result

    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), Watch():
        losses, _ = example_losses(logits, torch.ones(4, 64, dtype=torch.long), shift=True)
        losses.sum().backward()
    assert max(largest) <= 2**12
    assert [t.data_ptr() for t in saved if t.numel() > 4 * 64] == [logits.data_ptr()]


def test_it_works_under_vmap_of_grad():
    logits, labels = random_batch()
    labels[2, 4] = 1
    labels[3, 4] = 1

    def loss(row, goal):
        return example_losses(row[None], goal[None], shift=True)[0][0]

    batched = torch.func.vmap(torch.func.grad(loss))(logits, labels)
    logits.requires_grad_()
    example_losses(logits, labels, shift=True)[0].sum().backward()
    torch.testing.assert_close(batched, logits.grad)


def test_classification_equals_cross_entropy_a_row():
    logits, goal = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 2, -100, 1])
    losses, counts = example_losses(logits, goal, shift=False)
    expected = functional.cross_entropy(logits, goal, reduction="none")
    torch.testing.assert_close(losses[counts > 0], expected[counts > 0])
    assert losses[2].isnan()
    assert counts.tolist() == [1, 1, 0, 1]


def test_regression_and_multi_label_follow_transformers():
    generator = torch.Generator().manual_seed(2)
    scores, goal = torch.randn(4, 1, generator=generator), torch.randn(4, generator=generator)
    torch.testing.assert_close(example_losses(scores, goal, shift=False)[0], (scores[:, 0] - goal) ** 2)
    scores, goal = torch.randn(4, 3, generator=generator), torch.randint(0, 2, (4, 3), generator=generator).float()
    expected = functional.binary_cross_entropy_with_logits(scores, goal, reduction="none").mean(1)
    torch.testing.assert_close(example_losses(scores, goal, shift=False)[0], expected)
    squares = ((scores - goal) ** 2).mean(1)
    torch.testing.assert_close(example_losses(scores, goal, shift=False, problem_type="regression")[0], squares)


def test_wrong_reduction_and_wrong_shapes_are_named():
    with pytest.raises(OptionError, match=r"reduction must be one of \['mean', 'sum', 'sqrt'\], got 'max'"):
        example_losses(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.long), shift=True, reduction="max")
    with pytest.raises(DataError, match=r"labels of shape \[1, 3\] do not fit"):
        example_losses(torch.zeros(1, 2, 3), torch.zeros(1, 3, dtype=torch.long), shift=True)
