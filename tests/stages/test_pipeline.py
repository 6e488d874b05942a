"""Stages one after another, against the same stages run by hand."""

from __future__ import annotations

import numpy as np
import pytest

from hf_eff import select_dataset
from hf_eff.contracts.cost import Cost
from hf_eff.contracts.selection import Picks
from hf_eff.contracts.spec import MethodSpec
from hf_eff.engines.pool_size import SizedConfig
from hf_eff.errors import OptionError, PlanError, SelectionFallbackWarning
from hf_eff.options import EffOptions, resolve_options
from hf_eff.registry import register_method, unregister_method
from hf_eff.stages.choice import choose_pool
from hf_eff.testing.selection_scene import make_context, toy_pool
from hf_eff.testing.tiny import tiny_model, tiny_pool, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@pytest.fixture
def scored():
    """A method that keeps the rows with the highest of given scores and notes what it was shown."""
    seen = []

    class Scored:
        def __init__(self, config):
            self.config = config

        def select(self, context):
            seen.append(context)
            scores = np.asarray(context.pool.index, dtype=float)
            if context.prior is not None:
                scores = scores + context.prior
            return Picks(self.config.take(np.argsort(-scores), context.pool), scores=scores, reasons="high")

    spec = MethodSpec(
        name="scored", kind="selection", slot="pool", summary="A test.", config=SizedConfig, build=Scored,
        cost=lambda config, facts: Cost(flops=10.0 * (facts.pool.num_rows or 0)),
    )  # fmt: skip
    register_method(spec)
    yield seen
    unregister_method("selection", "scored")


def test_each_stage_sees_what_the_one_before_kept(scored):
    context = make_context(choose_pool("scored", {}).stages[0].spec, pool=toy_pool(16))
    choice = choose_pool(
        "scored", {"pipeline": [{"length": {"fraction": 0.5}}, {"scored": {"fraction": 0.5}}], "num_examples": 2}
    )
    picks = choice.select(context)
    longest = choose_pool("length", {"fraction": 0.5}).select(context)
    first = np.sort(longest.positions)
    second = np.sort(first[np.argsort(-(first + longest.scores[first]))][:4])
    assert [len(each.pool) for each in scored] == [8, 4]
    assert scored[0].prior.tolist() == longest.scores[first].tolist()
    assert scored[1].pool.index.tolist() == second.tolist()
    assert [scored[1].pool.rows[i] for i in range(4)] == [context.pool.rows[i] for i in second]
    assert set(picks.positions) <= set(second.tolist())
    assert np.isfinite(picks.scores).sum() == 4
    assert np.isnan(picks.scores[np.setdiff1d(np.arange(16), second)]).all()
    assert [(note["method"], note["rows"], note["kept"]) for note in picks.notes["stages"]] == [
        ("length", 16, 8),
        ("scored", 8, 4),
    ]


def test_the_manifest_records_every_stage():
    chosen = select_dataset(
        tiny_pool(24), "random", processing_class=TOKENIZER, pipeline=[{"length": {"fraction": 0.5}}], num_examples=3
    )
    params = chosen.manifest["selection"]["params"]
    assert params["num_examples"] == 3
    assert params["pipeline"] == [{"method": "length", "params": params["pipeline"][0]["params"]}]
    assert params["pipeline"][0]["params"]["fraction"] == 0.5
    assert chosen.manifest["selection"]["notes"]["stages"][0]["kept"] == 12


@pytest.mark.parametrize(
    ("stages", "error", "message"),
    [
        ([["length"]], OptionError, "a name or {name: options}"),
        ([{"length": {}, "all": {}}], OptionError, "a name or {name: options}"),
        (["lenght"], LookupError, "Did you mean 'length'"),
        ([{"length": {"fracton": 0.1}}], OptionError, "Did you mean 'fraction'"),
        (["length+random"], PlanError, "both fill the slot"),
    ],
)
def test_malformed_stages_are_refused_before_anything_runs(stages, error, message):
    with pytest.raises(error, match=message):
        resolve_options(EffOptions(selection="random", selection_kwargs={"pipeline": stages}))


def test_a_cap_draws_at_random_as_soon_as_it_would_be_passed():
    model, pool = tiny_model(layers=2, width=16), tiny_pool(24)
    options = {"processing_class": TOKENIZER, "model": model, "fraction": 0.25, "batch_tokens": 128}
    free = select_dataset(pool, "perplexity", max_selection_fraction=0.99, **options)
    assert free.manifest["selection"]["method"] == "perplexity"
    spent = free.manifest["cost"]["flops"]
    with pytest.warns(SelectionFallbackWarning, match="max_selection_fraction grants it"):
        capped = select_dataset(pool, "perplexity", max_selection_fraction=0.1, **options)
    about = capped.manifest["selection"]
    assert about["method"] == "random"
    assert about["notes"]["instead_of"] == "perplexity"
    assert about["num_selected"] == free.manifest["selection"]["num_selected"]
    training = 3 * 3.0 * 0.25 * spent
    assert 0 < capped.manifest["cost"]["flops"] <= training * 0.1 / 0.9 * 1.001
    counts = np.unique([pool[int(i)]["source"] for i in capped.indices], return_counts=True)[1]
    assert counts.max() - counts.min() <= 1


def test_a_cap_without_a_model_has_nothing_to_be_a_share_of():
    with pytest.raises(PlanError, match="the cost of training is unknown"):
        select_dataset(tiny_pool(8), "length", processing_class=TOKENIZER, fraction=0.5, max_selection_fraction=0.1)
