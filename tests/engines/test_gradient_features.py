from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_eff.contracts.selection import SelectionContext
from hf_eff.engines.adapter import LoraShape, temporary_adapter
from hf_eff.engines.example_gradients import example_gradients
from hf_eff.engines.gradient_features import FeatureRecipe, backward_context, pool_features
from hf_eff.engines.pool_pass import token_batches
from hf_eff.engines.scoring import scoring_mode
from hf_eff.errors import BudgetExceededError, ManifestError
from hf_eff.numerics.projection import RademacherProjector
from hf_eff.testing.selection_scene import toy_pool
from hf_eff.testing.tiny import collator, tiny_model

pytest.importorskip("peft")


def scene(**changes):
    model = tiny_model(layers=2, width=32, attn_implementation="eager")
    fields = {"pool": toy_pool(), "model": model, "batch_tokens": 120}
    collate = lambda rows: collator()([dict(row) for row in rows])  # noqa: E731
    return SelectionContext(generator=torch.Generator(), collate=collate, **{**fields, **changes})


def features(context=None, dims=64, pool=None, seed=0, **options):
    context = context or scene()
    with scoring_mode(context.model), temporary_adapter(context.model, LoraShape(rank=2)) as adapter:
        generator = torch.Generator().manual_seed(0)
        adapter.load({n: 0.1 * torch.randn(s, generator=generator) for n, s in adapter.shapes.items()})
        sizes = tuple(math.prod(shape) for shape in adapter.shapes.values())
        recipe = FeatureRecipe(adapter=adapter, projector=RademacherProjector(sizes, dims, seed))
        return pool_features(context, pool or context.pool, recipe, **options)


def everything(store):
    return store.unit_rows(slice(None)).double() * torch.from_numpy(store.norms).double()[:, None]


def test_a_feature_is_the_projected_gradient_of_its_row_alone():
    context = scene()
    store = features(context, direction=lambda index, g: g * (index + 1))
    with scoring_mode(context.model), temporary_adapter(context.model, LoraShape(rank=2)) as adapter:
        generator = torch.Generator().manual_seed(0)
        adapter.load({n: 0.1 * torch.randn(s, generator=generator) for n, s in adapter.shapes.items()})
        projector = RademacherProjector(tuple(math.prod(s) for s in adapter.shapes.values()), 64)
        for row in (0, 7, 23):
            batch = context.collate([context.pool.rows[row]])
            pieces = example_gradients(context.model, adapter.factors, batch, is_causal_lm=True)
            alone = projector.project(((i, g * (i + 1)) for i, g in pieces), 1)[0]
            found = everything(store)[row]
            assert torch.allclose(found, alone.double(), rtol=1e-4, atol=1e-5 * alone.norm().item())


@pytest.mark.parametrize("batch_tokens", [1, 60, 4096])
def test_batch_size_does_not_matter(batch_tokens):
    plain, other = everything(features()), everything(features(scene(batch_tokens=batch_tokens)))
    assert ((plain - other).norm(dim=1) / plain.norm(dim=1)).max() < 1e-5


def test_order_of_the_pool_does_not_matter_to_a_bit():
    order = np.random.default_rng(1).permutation(24).tolist()
    plain, other = everything(features()), everything(features(scene(pool=toy_pool(order=order))))
    assert torch.equal(plain[order], other)


def test_rows_without_loss_stay_empty():
    context = scene()
    kept = context.pool.loss_lengths.copy()
    kept[[2, 9]] = 0
    store = features(context, pool=replace(context.pool, loss_lengths=kept))
    assert np.flatnonzero(~store.done).tolist() == [2, 9]


class Tally:
    def __init__(self, limit=math.inf):
        self.flops, self.tokens, self.limit = [], [], limit

    def __call__(self, flops, tokens):
        if len(self.flops) >= self.limit:
            raise BudgetExceededError("enough")
        self.flops.append(flops)
        self.tokens.append(tokens)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_killed_anywhere_and_resumed_is_bit_identical_and_redoes_no_batch(tmp_path, dtype):
    pool = scene().pool
    batches = len(token_batches(pool.lengths, 120, ties=pool.row_hash))
    assert batches >= 4
    expected = everything(features(dtype=dtype))
    for limit in range(1, batches):
        folder = tmp_path / str(limit)
        with pytest.raises(BudgetExceededError):
            features(scene(spend=Tally(limit)), folder=folder, dtype=dtype)
        rest = Tally()
        assert torch.equal(everything(features(scene(spend=rest), folder=folder, dtype=dtype)), expected)
        assert len(rest.flops) == batches - limit
    nothing = Tally(0)
    assert torch.equal(everything(features(scene(spend=nothing), folder=folder, dtype=dtype)), expected)


def test_a_batch_that_was_flagged_in_part_is_redone_as_a_whole(tmp_path):
    """The flags of a batch are several bytes: a kill may fall between them."""
    expected = everything(features(folder=tmp_path / "f"))
    done = np.memmap(tmp_path / "f" / "done.bin", dtype="uint8", mode="r+")
    first = token_batches(scene().pool.lengths, 120, ties=scene().pool.row_hash)[0]
    done[first[:2]] = 0
    done.flush()
    again = Tally()
    assert torch.equal(everything(features(scene(spend=again), folder=tmp_path / "f")), expected)
    assert again.tokens == [len(first) * scene().pool.lengths[first].max()]


def test_features_of_something_else_are_refused(tmp_path):
    features(folder=tmp_path / "f", header={"model": "a"})
    for problem, options in (
        ("projector", {"seed": 1, "header": {"model": "a"}}),
        ("model", {"header": {"model": "b"}}),
        ("rows", {"context": scene(pool=toy_pool(order=range(23, -1, -1))), "header": {"model": "a"}}),
    ):
        with pytest.raises(ManifestError, match=f"another selection: {problem} is"):
            features(folder=tmp_path / "f", **options)


def test_what_is_charged_is_forward_backward_adapter_and_projection():
    tally = Tally()
    context = scene(spend=tally, forward_flops=lambda rows, length: 1000.0 * rows * length)
    with temporary_adapter(context.model, LoraShape(rank=2)) as adapter:
        params = adapter.num_params
        sizes = tuple(math.prod(shape) for shape in adapter.shapes.values())
        paid = backward_context(context, adapter, 50, RademacherProjector(sizes, 64))
        assert paid.batch_tokens == 50
        assert backward_context(context, adapter, 10_000).batch_tokens == 120
        assert paid.forward_flops(3, 10) == 2 * 1000 * 30 + 6 * params * 30 + 2 * params * 64 * 3
        whole = backward_context(context, adapter, 50, RademacherProjector(sizes, params))
        assert whole.forward_flops(3, 10) == 2 * 1000 * 30 + 6 * params * 30
