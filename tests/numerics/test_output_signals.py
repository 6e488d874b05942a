"""Signals of the logits equal their definitions, written out with an explicit softmax and one-hot."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_eff.errors import DataError, OptionError
from hf_eff.numerics import output_signals
from hf_eff.numerics.example_loss import example_losses
from hf_eff.numerics.output_signals import SIGNALS, example_signals, label_signals, token_signals


def literal(logits, label):
    """Loss, EL2N, entropy and margin of one token in float64."""
    p = logits.double().softmax(0)
    one_hot = torch.nn.functional.one_hot(torch.tensor(label), len(p)).double()
    others = torch.cat([logits[:label], logits[label + 1 :]]).double()
    return {
        "loss": -logits.double().log_softmax(0)[label],
        "el2n": (p - one_hot).norm(),
        "entropy": -(p * logits.double().log_softmax(0)).sum(),
        "margin": logits[label].double() - others.max(),
    }


def random_logits(rows, classes, scale, seed, dtype=torch.float64):
    return (torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale).to(dtype)


@given(
    rows=st.integers(1, 6),
    classes=st.integers(2, 40),
    scale=st.sampled_from([0.01, 1.0, 5.0, 30.0]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_every_signal_is_its_definition(rows, classes, scale, seed):
    logits = random_logits(rows, classes, scale, seed)
    labels = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed + 1))
    found = token_signals(logits, labels)
    for row in range(rows):
        for name, value in literal(logits[row], int(labels[row])).items():
            assert float(getattr(found, name)[row]) == pytest.approx(float(value), rel=1e-12, abs=1e-12), name


@pytest.mark.parametrize("classes", [2, 3, 100, 50_000])
def test_uniform_logits(classes):
    found = token_signals(torch.full((1, classes), 3.5, dtype=torch.float64), torch.tensor([1]))
    assert float(found.el2n) == pytest.approx(math.sqrt(1 - 1 / classes), abs=1e-12)
    assert float(found.entropy) == pytest.approx(math.log(classes), abs=1e-12)
    assert float(found.loss) == pytest.approx(math.log(classes), abs=1e-12)
    assert float(found.margin) == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sure_and_right_is_zero_sure_and_wrong_is_root_two(dtype):
    logits = torch.zeros(2, 5, dtype=dtype)
    logits[:, 2] = 800.0
    found = token_signals(logits, torch.tensor([2, 0]))
    assert found.el2n[0] == 0.0
    assert float(found.el2n[1]) == pytest.approx(math.sqrt(2), abs=1e-7)
    assert found.entropy.tolist() == [0.0, 0.0]
    assert found.loss.tolist() == [0.0, 800.0]
    assert found.margin.tolist() == [800.0, -800.0]


def test_nearly_right_does_not_cancel():
    """With p_y = 1 - 1e-9 the textbook form loses every digit in float32; this one keeps them."""
    logits = torch.tensor([[math.log(1e9), 0.0, -5.0]], dtype=torch.float32)
    exact = literal(logits[0], 0)["el2n"]
    p = logits[0].softmax(0)
    textbook = (1 - 2 * p[0] + p.square().sum()).clamp(min=0).sqrt()
    assert float(token_signals(logits, torch.tensor([0])).el2n) == pytest.approx(float(exact), rel=1e-5)
    assert float(textbook) != pytest.approx(float(exact), rel=0.5)


def test_masked_vocabulary_entries_count_for_nothing():
    logits = random_logits(3, 6, 2.0, 0)
    masked = torch.cat([logits, torch.full((3, 4), -math.inf, dtype=torch.float64)], dim=1)
    labels = torch.tensor([0, 3, 5])
    for plain, wide in zip(token_signals(logits, labels), token_signals(masked, labels), strict=True):
        assert torch.allclose(plain, wide, rtol=1e-14, atol=0)


def test_slices_do_not_matter(monkeypatch):
    logits, labels = random_logits(50, 9, 2.0, 0), torch.arange(50) % 9
    whole = token_signals(logits, labels)
    for rows, elements in ((7, 2**25), (2048, 20)):
        monkeypatch.setattr(output_signals, "_CHUNK_ROWS", rows)
        monkeypatch.setattr(output_signals, "_CHUNK_ELEMENTS", elements)
        for plain, sliced in zip(whole, token_signals(logits, labels), strict=True):
            assert torch.equal(plain, sliced)


def batch(shift):
    logits = random_logits(3 * 6, 11, 3.0, 4).view(3, 6, 11)
    labels = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(5))
    labels[0, :3], labels[1] = -100, -100
    return logits, labels, {"shift": shift}


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "rms", "max"])
def test_examples_average_their_loss_positions(shift, reduction):
    logits, labels, options = batch(shift)
    values, counts = example_signals(logits, labels, reduction=reduction, **options)
    reduce = {
        "mean": lambda x: sum(x) / len(x),
        "rms": lambda x: math.sqrt(sum(v * v for v in x) / len(x)),
        "max": max,
    }[reduction]
    for row in range(3):
        places = [t for t in range(int(shift), 6) if labels[row, t] != -100]
        assert counts[row] == len(places)
        tokens = [literal(logits[row, t - shift], int(labels[row, t])) for t in places]
        for name in SIGNALS:
            if not places:
                assert math.isnan(values[name][row])
            else:
                expected = reduce([float(token[name]) for token in tokens])
                assert float(values[name][row]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shift", [True, False])
def test_mean_loss_is_that_of_example_losses(shift):
    logits, labels, options = batch(shift)
    found, counts = example_signals(logits, labels, **options)
    losses, expected = example_losses(logits, labels, shift=shift)
    assert torch.allclose(found["loss"], losses, rtol=1e-12, equal_nan=True)
    assert torch.equal(counts, expected)


def test_signals_stand_at_their_labels():
    logits, labels, _ = batch(True)
    by_token, scored = label_signals(logits, labels, shift=True)
    assert torch.equal(scored, (labels != -100) & (torch.arange(6) > 0))
    assert float(by_token.loss[2, 4]) == pytest.approx(float(literal(logits[2, 3], int(labels[2, 4]))["loss"]))
    assert not by_token.loss[~scored].any()


def test_classifiers_have_one_position():
    logits, labels = random_logits(4, 3, 1.0, 0), torch.tensor([0, 2, -100, 1])
    found, counts = example_signals(logits, labels, shift=False)
    assert counts.tolist() == [1, 1, 0, 1]
    assert float(found["el2n"][3]) == pytest.approx(float(literal(logits[3], 1)["el2n"]), rel=1e-12)


def test_half_precision_is_read_in_single():
    logits = random_logits(4, 30, 3.0, 0).to(torch.bfloat16)
    labels = torch.tensor([1, 2, 3, 4])
    half, single = token_signals(logits, labels), token_signals(logits.float(), labels)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(half, single, strict=True))


def test_nan_logits_give_nan():
    logits = random_logits(2, 4, 1.0, 0)
    logits[1, 2] = math.nan
    found = token_signals(logits, torch.tensor([0, 0]))
    for value in (found.loss, found.el2n, found.entropy, found.margin):
        assert torch.isfinite(value[0])
        assert torch.isnan(value[1])


def test_a_batch_without_any_label_has_no_signal():
    found, counts = example_signals(torch.zeros(2, 3, 4), torch.full((2, 3), -100), shift=True)
    assert counts.tolist() == [0, 0]
    assert all(torch.isnan(value).all() for value in found.values())


def test_what_does_not_fit_is_refused():
    with pytest.raises(DataError, match="one class index a prediction"):
        example_signals(torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.long), shift=True)
    with pytest.raises(DataError, match="one class index a prediction"):
        example_signals(torch.zeros(2, 3), torch.zeros(2), shift=False)
    with pytest.raises(OptionError, match="reduction must be one of"):
        example_signals(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long), shift=True, reduction="sum")
    with pytest.raises(OptionError, match="signals must be among"):
        example_signals(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long), shift=True, signals=["grand"])
