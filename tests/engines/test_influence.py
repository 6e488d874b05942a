from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_eff.engines import influence as module
from hf_eff.engines.datastore import FeatureStore
from hf_eff.engines.influence import Influence
from hf_eff.errors import DataError

N, V, D, E = 37, 11, 16, 3
GROUPS = [("math", "code", "chat")[row % 3] for row in range(V)]


def store(values):
    made = FeatureStore.open(None, rows=len(values), width=values.shape[1], dtype="float32", header={})
    made.write(np.arange(len(values)), values)
    return made


@pytest.fixture
def world():
    generator = torch.Generator().manual_seed(0)
    pools = [torch.randn(N, D, generator=generator) * 10 ** torch.randn(N, 1, generator=generator) for _ in range(E)]
    targets = [torch.randn(V, D, generator=generator) * 10 ** torch.randn(V, 1, generator=generator) for _ in range(E)]
    return pools, targets, [0.5, 0.3, 0.2]


def literal(pools, targets, weights, similarity, val_agg, group_reduce):
    """The formulas, entry by entry."""

    def cosine(a, b):
        return float(a @ b / a.norm() / b.norm())

    scores = []
    for n in range(N):
        by_group = []
        for group in sorted(set(GROUPS)):
            members = [row for row in range(V) if GROUPS[row] == group]
            total = 0.0
            for pool, target, weight in zip(pools, targets, weights, strict=True):
                mean = target[members].mean(dim=0)
                if similarity == "dot":
                    total += weight * float(pool[n] @ mean)
                elif val_agg == "cos_of_mean":
                    total += weight * cosine(pool[n], mean)
                else:
                    total += weight * sum(cosine(pool[n], target[row]) for row in members) / len(members)
            by_group.append(total)
        scores.append(max(by_group) if group_reduce == "max" else sum(by_group) / len(by_group))
    return np.array(scores)


def compute(way, pools, targets, weights, groups=GROUPS):
    queries = [way.queries(store(target), groups) for target in targets]
    names = sorted(queries[0])
    stacked = [torch.stack([query[name] for name in names]) for query in queries]
    scores, closest = way.scores([store(pool) for pool in pools], stacked, weights)
    return scores, [names[index] for index in closest]


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("val_agg", ["mean_cos", "cos_of_mean"])
@pytest.mark.parametrize("group_reduce", ["max", "mean"])
def test_equals_the_formula(world, similarity, val_agg, group_reduce, monkeypatch):
    monkeypatch.setattr(module, "_TILE", 10)
    scores, _ = compute(Influence(similarity, val_agg, group_reduce), *world)
    expected = literal(*world, similarity, val_agg, group_reduce)
    assert np.allclose(scores, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_matrix_holds_every_pair(world, similarity, monkeypatch):
    monkeypatch.setattr(module, "_TILE", 10)
    pools, targets, weights = world
    pools[1][5], pools[0][6], targets[2][4], targets[0][7] = float("nan"), 0.0, 0.0, float("inf")
    found, members = Influence(similarity).matrix([store(p) for p in pools], [store(t) for t in targets], weights)
    assert members.tolist() == [row for row in range(V) if row not in (4, 7)]
    assert found.shape == (N, V - 2)
    assert np.flatnonzero(np.isnan(found).any(axis=1)).tolist() == [5]
    for n in (0, 6, 36):
        for place, row in enumerate(members):
            parts = []
            for pool, target, weight in zip(pools, targets, weights, strict=True):
                product = float(pool[n] @ target[row])
                length = float(pool[n].norm() * target[row].norm()) if similarity == "cosine" else 1.0
                parts.append(weight * product / (length or 1.0))
            assert found[n, place] == pytest.approx(
                sum(parts), rel=1e-4, abs=1e-5 * max(1.0, float(np.nanmax(np.abs(found))))
            )
    with pytest.raises(DataError, match="no row of the target"):
        Influence().matrix([store(pools[0])], [store(torch.zeros(V, D))], [1.0])


def logistic(rows, dims, seed):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(dims, generator=generator, dtype=torch.float64)
    inputs = torch.randn(rows, dims, generator=generator, dtype=torch.float64)
    flips = torch.rand(rows, generator=generator) < 0.2
    return inputs, torch.where(flips, -1.0, 1.0) * torch.sign(inputs @ truth)


def test_influence_agrees_with_retraining_and_chance_does_not():
    """Leave-one-out and random halves of 64 rows of a logistic problem, each trained again from zero."""
    inputs, labels = logistic(64, 8, seed=0)
    seen, answers = logistic(200, 8, seed=0)
    seen, answers = seen[64:], answers[64:]
    rate, steps = 0.5, 10

    def train(kept):
        weight, path = torch.zeros(8, dtype=torch.float64), []
        for _ in range(steps):
            path.append(weight)
            slopes = -labels * torch.sigmoid(-labels * (inputs @ weight))
            weight = weight - rate / 64 * (kept * slopes) @ inputs
        return weight, path

    def target_loss(weight):
        return torch.nn.functional.softplus(-answers * (seen @ weight)).mean().item()

    _, path = train(torch.ones(64, dtype=torch.float64))
    pools = [store((-labels * torch.sigmoid(-labels * (inputs @ w)))[:, None] * inputs) for w in path]
    goals = [store((-answers * torch.sigmoid(-answers * (seen @ w)))[:, None] * seen) for w in path]
    influence = Influence("dot")
    stacked = [next(iter(influence.queries(goal, ["all"] * len(seen)).values()))[None] for goal in goals]
    scores, _ = influence.scores(pools, stacked, [rate / 64] * steps)

    everything, rng = target_loss(train(torch.ones(64, dtype=torch.float64))[0]), np.random.default_rng(0)
    without = [target_loss(train((torch.arange(64) != row).double())[0]) - everything for row in range(64)]
    halves = rng.random((100, 64)) < 0.5
    losses = [target_loss(train(torch.from_numpy(half).double())[0]) for half in halves]

    def spearman(a, b):
        return np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1]

    chance = rng.permutation(scores)
    assert spearman(scores, without) >= 0.8
    assert spearman(halves @ scores, -np.array(losses)) >= 0.8
    assert abs(spearman(chance, without)) < 0.35
    assert abs(spearman(halves @ chance, -np.array(losses))) < 0.35


def test_order_of_groups_and_of_target_rows_does_not_matter(world):
    pools, targets, weights = world
    order = np.random.default_rng(0).permutation(V)
    scores, closest = compute(Influence(), pools, targets, weights)
    shuffled, again = compute(Influence(), pools, [t[order] for t in targets], weights, [GROUPS[row] for row in order])
    assert np.allclose(scores, shuffled, atol=1e-6)
    assert closest == again
    renamed, _ = compute(Influence(), pools, targets, weights, [{"math": "z"}.get(group, group) for group in GROUPS])
    assert np.allclose(scores, renamed, atol=1e-6)


def test_the_closest_group_is_named(world):
    _, targets, weights = world
    _, closest = compute(Influence(), [targets[e][[0, 1, 2]] for e in range(E)], targets, weights)
    assert closest == ["math", "code", "chat"]


def test_rows_without_a_finite_gradient_have_no_score(world):
    pools, targets, weights = world
    pools[1][5] = float("nan")
    pools[0][6] = 0.0
    stores = [store(pool) for pool in pools]
    stores[2]._done[7] = 0
    queries = [torch.stack(list(Influence().queries(store(target), GROUPS).values())) for target in targets]
    scores, _ = Influence().scores(stores, queries, weights)
    assert np.flatnonzero(np.isnan(scores)).tolist() == [5, 7]
    assert np.isfinite(scores[6])


def test_groups_and_targets_without_a_gradient(world):
    target = world[1][0]
    target[[0, 3, 6, 9]] = float("nan")
    assert sorted(Influence().queries(store(target), GROUPS)) == ["chat", "code"]
    with pytest.raises(DataError, match="no row of the target has a finite gradient"):
        Influence().queries(store(torch.zeros(V, D)), GROUPS)
