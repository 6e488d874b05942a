"""What holds for every selector that scores with a model: half precision ranks alike, dropout plays no part."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_eff.numerics.agreement import spearman
from hf_eff.registry import get_method, list_methods
from hf_eff.testing.selection_scene import make_context, pick, toy_pool
from hf_eff.testing.tiny import tiny_model

SCORERS = [spec for name in list_methods("selection") if (spec := get_method("selection", name)).traits.needs_model]
UNRANKED = {
    **dict.fromkeys(
        ("k_center", "facility_location", "rds", "s2l"), "scores are places in an order: one swap moves all"
    ),
    "deita": "marks that a random model gives differ by less than half precision resolves",
}
"""Selectors whose scores cannot be expected to rank alike on a toy, and why."""


def sharp_model(dtype=torch.float32, dropout=0.0):
    """Random model whose rows differ by more than rounding."""
    model = tiny_model(layers=2, width=32, seed=1, attn_implementation="eager", attention_dropout=dropout)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    return model.to(dtype)


def scores_of(spec, model):
    options = {"fraction": 0.5} if "fraction" in spec.config.__dataclass_fields__ else {}
    return pick(spec, make_context(spec, proxy=None, model=model, pool=toy_pool(60)), **options)


@pytest.mark.parametrize("spec", [spec for spec in SCORERS if spec.name not in UNRANKED], ids=lambda spec: spec.name)
def test_half_precision_ranks_alike(spec):
    exact, half = (scores_of(spec, sharp_model(dtype)).scores for dtype in (torch.float32, torch.bfloat16))
    both = np.isfinite(exact) & np.isfinite(half)
    assert both.sum() >= 30
    assert spearman(exact[both], half[both]) >= 0.99


@pytest.mark.parametrize("spec", SCORERS, ids=lambda spec: spec.name)
def test_the_dropout_rate_plays_no_part(spec):
    plain, dropping = (scores_of(spec, sharp_model(dropout=rate)) for rate in (0.0, 0.5))
    assert plain.positions.tolist() == dropping.positions.tolist()
    if plain.scores is not None:
        np.testing.assert_array_equal(plain.scores, dropping.scores)
