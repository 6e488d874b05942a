import json
import random

import numpy as np
import pytest
import torch

from hf_eff.engines.drift_probe import DriftProbe
from hf_eff.errors import CheckpointError
from hf_eff.testing.tiny import collator, tiny_model, tiny_pool, tokenised


@pytest.fixture(scope="module")
def rows():
    return tokenised(tiny_pool(40)).remove_columns(["source"])


def make(rows, **options):
    return DriftProbe(rows, collator(), **({"is_causal_lm": True, "num_examples": 16, "seed": 2} | options))


def moved(model, size=0.05):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def losses_of(model, subset):
    with torch.no_grad():
        return [model(**{k: torch.tensor([v]) for k, v in row.items()}).loss.item() for row in subset]


def ranks(values):
    return [sorted(values).index(value) for value in values]


def test_correlation_of_the_ranks_then_and_now(rows):
    model, probe = tiny_model(), make(rows)
    subset = [rows[i] for i in sorted(random.Random(2).sample(range(40), 16))]
    before = losses_of(model, subset)
    probe.note(model, 100.0)
    now = losses_of(moved(model), subset)
    reading = probe.drift(model, 130.0)
    a, b = ranks(before), ranks(now)
    expected = 1 - 6 * sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / (16 * (16**2 - 1))
    assert reading.correlation == pytest.approx(expected)
    assert reading.correlation < 0.999
    assert (reading.age, reading.num_examples) == (30.0, 16)


def test_without_a_note_there_is_nothing_to_compare(rows):
    assert make(rows).drift(tiny_model(), 1.0) is None


def test_the_same_model_has_not_drifted(rows):
    probe, model = make(rows), tiny_model()
    probe.note(model, 5.0)
    reading = probe.drift(model, 5.0)
    assert (reading.age, reading.correlation) == (0.0, pytest.approx(1.0))


def test_reading_leaves_no_trace(rows):
    model = tiny_model(attention_dropout=0.1).train()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    probe, torch_state, state = make(rows), torch.get_rng_state(), random.getstate()
    probe.note(model, 0.0)
    probe.drift(model, 1.0)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == state
    assert model.training
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_state_goes_through_json(rows):
    model, probe = tiny_model(), make(rows)
    probe.note(model, 3.0)
    again = make(rows)
    again.load_state_dict(json.loads(json.dumps(probe.state_dict())))
    moved(model)
    assert again.drift(model, 9.0) == probe.drift(model, 9.0)
    other = make(rows, seed=9)
    with pytest.raises(CheckpointError, match="held-out examples differ"):
        other.load_state_dict(probe.state_dict())


def test_a_row_without_a_finite_loss_takes_no_part(rows):
    model, probe = tiny_model(), make(rows)
    probe.note(model, 0.0)
    probe._baseline[:3] = np.nan
    assert probe.drift(model, 0.0).num_examples == 13
