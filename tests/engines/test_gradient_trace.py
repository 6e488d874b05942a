from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_eff.contracts.selection import SelectionContext
from hf_eff.engines.adapter import LoraShape
from hf_eff.engines.gradient_trace import TraceSettings, trace_gradients, with_hashes
from hf_eff.engines.warmup import WarmupSettings
from hf_eff.errors import BudgetExceededError
from hf_eff.numerics.adam_direction import AdamScaling
from hf_eff.testing.selection_scene import toy_pool, toy_target
from hf_eff.testing.tiny import collator, tiny_model

pytest.importorskip("peft")

SETTINGS = TraceSettings(
    shape=LoraShape(rank=2),
    warmup=WarmupSettings(epochs=3, batch_size=4, learning_rate=1e-2),
    warmup_fraction=0.25,
    scaling=AdamScaling("damped"),
    dims=64,
)


def scene(**changes):
    model = tiny_model(layers=2, width=32, attn_implementation="eager")
    collate = lambda rows: collator()([dict(row) for row in rows])  # noqa: E731
    fields = {"pool": toy_pool(), "model": model, "collate": collate, "batch_tokens": 256, **changes}
    return SelectionContext(generator=torch.Generator(), **fields)


def test_every_checkpoint_has_features_of_pool_and_target(tmp_path):
    trace = trace_gradients(scene(store_dir=tmp_path), toy_target(), SETTINGS)
    assert len(trace.pools) == len(trace.targets) == len(trace.weights) == 3
    assert all(store.done.all() for store in (*trace.pools, *trace.targets))
    assert [len(store.norms) for store in (trace.pools[0], trace.targets[0])] == [24, 8]
    assert not torch.allclose(trace.targets[0].unit_rows(slice(None)), trace.targets[1].unit_rows(slice(None)))
    folders = sorted(path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("header.json"))
    assert folders == [*(f"checkpoint-{e}/{kind}" for e in range(3) for kind in ("pool", "target")), "warmup"]


def test_checkpoints_weigh_their_learning_rate():
    # Six rows in batches of three, two steps an epoch: rates fall from 6/6 to 1/6 of the peak.
    weights = trace_gradients(scene(), toy_target(), SETTINGS).weights
    assert weights == pytest.approx([11 / 21, 7 / 21, 3 / 21])


@pytest.mark.parametrize(("rule", "weights"), [("last_rate", [5 / 9, 3 / 9, 1 / 9]), ("equal", [1 / 3] * 3)])
def test_checkpoints_can_weigh_otherwise(rule, weights):
    settings = replace(SETTINGS, checkpoint_weights=rule)
    assert trace_gradients(scene(), toy_target(), settings).weights == pytest.approx(weights)
    assert trace_gradients(scene(), toy_target(), replace(settings, warmup_fraction=0.0)).weights == [1.0]


@pytest.mark.parametrize("projection", ["sparse", "two_sided"])
def test_other_projections_give_about_the_same_cosines(projection):
    settings = replace(SETTINGS, dims=512, warmup=WarmupSettings(epochs=1, batch_size=4, learning_rate=1e-2))
    cosines = []
    for each in (replace(settings, dims=10**9), replace(settings, projection=projection)):
        trace = trace_gradients(scene(), toy_target(), each)
        cosines.append(trace.pools[0].unit_rows(slice(None)) @ trace.targets[0].unit_rows(slice(None)).T)
        assert trace.facts["projected"] == (projection if each.projection == projection else False)
    error = cosines[1] - cosines[0]
    assert error.pow(2).mean().sqrt() <= 3 / 512**0.5
    assert error.abs().max() > 1e-4


def test_features_are_stored_as_asked(tmp_path):
    settings = replace(SETTINGS, store_dtype="int1", target_dtype="int4-absmax", dims=100)
    trace = trace_gradients(scene(store_dir=tmp_path), toy_target(), settings)
    assert (tmp_path / "checkpoint-0" / "pool" / "features.bin").stat().st_size == 24 * 13
    assert (tmp_path / "checkpoint-0" / "target" / "features.bin").stat().st_size == 8 * 50
    assert set(trace.pools[0].unit_rows(slice(None)).mul(10).round().unique().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("changes", [{"warmup_fraction": 0.0}, {"warmup": WarmupSettings(epochs=0)}])
def test_without_a_warmup_the_adapter_is_the_one_checkpoint(changes):
    trace = trace_gradients(scene(), toy_target(), replace(SETTINGS, **changes))
    assert list(trace.weights) == [1.0]
    assert (trace.facts["warmup_rows"], trace.facts["warmup_steps"]) == (0, 0)


def test_the_target_is_never_scaled():
    plain = replace(SETTINGS, scaling=AdamScaling("none"))
    adam = replace(SETTINGS, scaling=AdamScaling("paper"))
    first, second = (trace_gradients(scene(), toy_target(), settings) for settings in (plain, adam))
    assert torch.equal(first.targets[2].unit_rows(slice(None)), second.targets[2].unit_rows(slice(None)))
    assert not torch.allclose(first.pools[2].unit_rows(slice(None)), second.pools[2].unit_rows(slice(None)), atol=0.1)


def test_the_model_is_as_found_after_an_interruption():
    charges = []

    def spend(flops, tokens):
        charges.append(flops)
        if len(charges) > 8:
            raise BudgetExceededError("enough")

    context = scene(spend=spend)
    model = context.model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [id(module) for module in model.modules()]
    with pytest.raises(BudgetExceededError):
        trace_gradients(context, toy_target(), SETTINGS)
    assert [id(module) for module in model.modules()] == modules
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_hashes_are_made_from_content_where_missing():
    pool = toy_pool()
    assert with_hashes(pool) is pool
    made = with_hashes(replace(pool, row_hash=None)).row_hash
    assert len(set(made)) == len({str(row) for row in pool.rows})
    assert np.array_equal(made[::-1], with_hashes(replace(toy_pool(order=range(23, -1, -1)), row_hash=None)).row_hash)
