"""What holds for every selector that scores: half precision ranks alike, dropout plays no part, books are exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_eff.engines.influence import Influence
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


# influence against leaving rows out


class Vectors:
    """Features kept whole, as a store gives them."""

    def __init__(self, rows):
        self.norms = np.linalg.norm(rows, axis=1)
        self.done = np.ones(len(rows), dtype=bool)
        self._unit = torch.from_numpy((rows / self.norms[:, None]).astype(np.float32))

    def unit_rows(self, rows):
        return self._unit[rows]

    def products(self, rows, queries):
        return self._unit[rows] @ queries.T


def _gradients(weights, x, y):
    return ((1 / (1 + np.exp(-x @ weights)) - y)[:, None]) * x


def _loss(weights, x, y):
    margin = (2 * y - 1) * (x @ weights)
    return float(np.logaddexp(0, -margin).mean())


def _train(x, y, keep, rate=0.05, steps=40):
    """Weights before each step of gradient descent on the summed loss of the rows kept, and at the end."""
    path = [np.zeros(x.shape[1])]
    for _ in range(steps):
        path.append(path[-1] - rate * _gradients(path[-1], x, y)[keep].sum(0))
    return path


def test_influence_predicts_what_leaving_a_row_out_does():
    generator = np.random.default_rng(0)
    truth = generator.normal(size=6)
    x, goal = generator.normal(size=(64, 6)), generator.normal(size=(32, 6))
    y, answer = ((part @ truth + generator.logistic(size=len(part)) > 0).astype(float) for part in (x, goal))
    everything = np.ones(64, dtype=bool)
    path = _train(x, y, everything)
    without = []
    for row in range(64):
        keep = everything.copy()
        keep[row] = False
        without.append(_loss(_train(x, y, keep)[-1], goal, answer) - _loss(path[-1], goal, answer))
    influence = Influence(similarity="dot", group_reduce="mean")
    pools = [Vectors(_gradients(weights, x, y)) for weights in path[:-1]]
    queries = [
        torch.stack([influence.queries(Vectors(_gradients(weights, goal, answer)), ["all"] * 32)["all"]])
        for weights in path[:-1]
    ]
    scores, _ = influence.scores(pools, queries, [0.05] * len(pools))
    assert spearman(scores, np.array(without)) >= 0.8
    shuffled = [spearman(generator.permutation(scores), np.array(without)) for _ in range(200)]
    assert abs(np.mean(shuffled)) < 0.05
