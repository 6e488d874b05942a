"""A proxy is believed, corrected or dropped, by what the model says of a sample."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from hf_eff.contracts.cost import Cost
from hf_eff.contracts.selection import Picks, Scorer
from hf_eff.contracts.spec import MethodSpec, Traits
from hf_eff.engines.pool_size import SizedConfig
from hf_eff.errors import PlanError, SelectionFallbackWarning
from hf_eff.numerics.agreement import jaccard
from hf_eff.numerics.ranking import rank
from hf_eff.registry import register_method, unregister_method
from hf_eff.stages.choice import choose_pool
from hf_eff.testing.selection_scene import make_context, pool_of

ROWS = 400
MODEL_FLOPS, PROXY_FLOPS = 100.0, 1.0


@pytest.fixture(autouse=True)
def read():
    """A method whose score of a row is what the scoring "model", a vector, says of it."""

    class Read:
        def __init__(self, config):
            self.config = config

        def select(self, context):
            seen = context.by_proxy()
            seen.spend(seen.forward_flops(len(seen.pool), 1), 0.0)
            scores = np.asarray(seen.model, dtype=float)[seen.pool.index]
            return Picks(self.config.take(rank(scores, descending=True), context.pool), scores=scores, reasons="read")

    register_method(
        MethodSpec(
            name="read",
            kind="selection",
            slot="pool",
            summary="A test.",
            config=SizedConfig,
            build=Read,
            cost=lambda config, facts: Cost(),
            traits=Traits(needs_model=False, uses_proxy=True),
        )
    )
    yield
    unregister_method("selection", "read")


def scene(truth, proxy, sources=None, seed=0):
    rows = [{"input_ids": [1 + i % 200, 2, 3], "labels": [1, 2, 3]} for i in range(len(truth))]
    spent = []
    context = make_context(
        choose_pool("read", {}).stages[0].spec,
        pool=pool_of(rows, sources or ["one"] * len(truth)),
        seed=seed,
        model=np.asarray(truth),
        proxy=Scorer(np.asarray(proxy), lambda rows, _: PROXY_FLOPS * rows),
        forward_flops=lambda rows, _: MODEL_FLOPS * rows,
        spend=lambda flops, _: spent.append(flops),
    )
    return context, spent


def select(context, **options):
    return choose_pool("read", {"fraction": 0.1, "verify": 0.02, "proxy_model": "given", **options}).select(context)


def test_a_proxy_that_is_the_model_chooses_as_the_model():
    truth = np.random.default_rng(0).normal(size=ROWS)
    context, spent = scene(truth, truth)
    picks = select(context)
    assert set(picks.positions) == set(np.argsort(-truth)[: ROWS // 10])
    facts = picks.notes["verification"]
    assert (facts["verdict"], facts["spearman"], facts["jaccard_at_k"]) == ("accept", pytest.approx(1.0), 1.0)
    assert facts["num_verified"] == 100  # ten of each of ten bins
    assert spent == [ROWS * PROXY_FLOPS, 100 * MODEL_FLOPS]


def test_a_shuffled_proxy_is_dropped_nearly_always():
    fallen = 0
    for seed in range(100):
        generator = np.random.default_rng(seed)
        truth = generator.normal(size=ROWS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SelectionFallbackWarning)
            picks = select(scene(truth, generator.permutation(truth), seed=seed)[0])
        fallen += picks.notes["verification"]["verdict"] == "fall back"
        assert len(picks.positions) == ROWS // 10
    assert fallen >= 99


def test_dropping_a_proxy_is_said_aloud_and_recorded():
    generator = np.random.default_rng(5)
    truth = generator.normal(size=ROWS)
    context, _ = scene(truth, generator.permutation(truth), sources=["a", "b"] * (ROWS // 2))
    with pytest.warns(SelectionFallbackWarning, match="rows are drawn at random instead"):
        picks = select(context)
    assert picks.notes["instead_of"] == "read"
    assert np.bincount(np.asarray(picks.positions) % 2).tolist() == [20, 20]


def test_a_proxy_that_misjudges_a_source_is_fitted_source_by_source():
    generator = np.random.default_rng(1)
    truth = generator.normal(size=2000)
    sources = np.array(["kind", "harsh"])[generator.integers(2, size=2000)]
    proxy = truth + np.where(sources == "kind", 2.6, 0.0)
    context, _ = scene(truth, proxy, sources=sources.tolist())
    best = np.argsort(-truth)[:200]
    picks = select(context, verify=0.2)
    plain = np.argsort(-proxy)[:200]
    assert picks.notes["verification"]["verdict"] == "recalibrate"
    assert jaccard(picks.positions, best) > 0.6 > 0.45 > jaccard(plain, best)


def test_an_interval_comes_with_the_correlation():
    generator = np.random.default_rng(2)
    truth = generator.normal(size=ROWS)
    facts = select(scene(truth, truth + generator.normal(size=ROWS))[0]).notes["verification"]
    low, high = facts["spearman_95"]
    assert low < facts["spearman"] < high
    assert facts["verdict"] == "accept"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("read", {"verify": 0.1}, "give proxy_model= and a method that scores with one; here are proxy_model=None"),
        (
            "random",
            {"verify": 0.1, "proxy_model": "p"},
            "would score nothing: none of \\['random'\\] scores with a proxy",
        ),
        ("random", {"verify": 0.1, "proxy_model": "p", "pipeline": ["read"]}, "compares a proxy with the model"),
    ],
)
def test_a_proxy_without_use_is_refused_before_anything_runs(name, options, message):
    with pytest.raises(PlanError, match=message):
        choose_pool(name, options)


def test_verifying_needs_a_proxy_at_hand():
    truth = np.arange(40.0)
    context, _ = scene(truth, truth)
    context.proxy = None
    with pytest.raises(PlanError, match="give proxy_model= and a method that scores with one"):
        select(context)
