"""less: fidelity to the formulas, to real optimizer steps, and to the rows alone."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from hf_eff.contracts.cost import Facts, PoolFacts
from hf_eff.engines.adapter import LoraShape, temporary_adapter
from hf_eff.engines.facts import model_facts
from hf_eff.engines.scoring import scoring_mode
from hf_eff.engines.warmup import WarmupSettings, warm_up
from hf_eff.errors import BudgetExceededError, DataError, ManifestError, OptionError
from hf_eff.numerics.keyed_random import content_order
from hf_eff.registry import build, get_method
from hf_eff.testing.selection_scene import (
    chosen_hashes,
    make_context,
    pick,
    pool_facts_of,
    pool_of,
    toy_pool,
    toy_target,
    unlabelled,
)
from hf_eff.testing.tiny import tiny_model

peft = pytest.importorskip("peft")

SPEC = get_method("selection", "less")
EXACT = {"dims": 10**9, "store_dtype": "float32", "lora_dropout": 0.0}
WARMUP = {"warmup_fraction": 0.25, "warmup_epochs": 2, "warmup_batch_size": 3, "learning_rate": 1e-2, "lora_r": 2}


def grouped_target():
    target = toy_target()
    target.groups = ["odd" if row % 2 else "even" for row in range(len(target))]
    return target


def gradients(context, adapter, pool):
    """[rows, p] by a loop over single rows and the model's own loss."""
    weights = [factor.weight for factor in adapter.factors.values()]
    found = []
    for row in pool.rows:
        loss = context.model(**context.collate([row])).loss
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]).double())
    return torch.stack(found)


def literal_scores(context, scaled, compared):
    """LESS with nothing batched, projected or stored; ``scaled`` and ``compared`` are its two formulas."""
    with scoring_mode(context.model), temporary_adapter(context.model, LoraShape(2, 32), context.seed) as adapter:
        rows = content_order(context.pool.row_hash, context.seed)[:6]
        settings = WarmupSettings(epochs=2, batch_size=3, learning_rate=1e-2, dropout=0.0, seed=context.seed)
        checkpoints = warm_up(context, adapter, rows, settings)
        total, by_group = sum(c.learning_rate for c in checkpoints), {}
        for c in checkpoints:
            adapter.load(c.weights)
            m, v = (torch.cat([x.flatten() for x in t.values()]).double() for t in (c.first_moment, c.second_moment))
            gamma = torch.stack([scaled(g, m, v, c.step) for g in gradients(context, adapter, context.pool)])
            goal = gradients(context, adapter, context.reference)
            for group in set(context.reference.groups):
                members = goal[[row for row, name in enumerate(context.reference.groups) if name == group]]
                share = c.learning_rate / total * torch.stack([compared(row, members) for row in gamma])
                by_group[group] = by_group.get(group, 0) + share
    return torch.stack(list(by_group.values())).max(dim=0).values.numpy()


def paper(g, m, v, t):
    first = (0.9 * m + 0.1 * g) / (1 - 0.9 ** (t + 1))
    second = (0.999 * v + 0.001 * g**2) / (1 - 0.999 ** (t + 1))
    return first / (second.sqrt() + 1e-8)


def official(g, m, v, t):
    return (0.9 * m + 0.1 * g) / torch.sqrt(0.999 * v + 0.001 * g**2 + 1e-8)


def cosine_to_mean(row, members):
    return cosine_similarity(row, members.mean(dim=0), dim=0)


def mean_cosine(row, members):
    return cosine_similarity(row[None], members).mean()


@pytest.mark.parametrize(
    ("variant", "scaled", "compared"),
    [("paper", paper, cosine_to_mean), ("official", official, mean_cosine)],
)
def test_scores_equal_the_literal_formulas(variant, scaled, compared):
    context = make_context(SPEC, proxy=None, reference=grouped_target())
    expected = literal_scores(make_context(SPEC, proxy=None, reference=grouped_target()), scaled, compared)
    picks = build(SPEC, {"variant": variant, **EXACT, **WARMUP, "fraction": 0.25}).select(context)
    assert np.abs(picks.scores - expected).max() < 1e-4
    assert picks.positions.tolist() == np.argsort(-expected)[:6].tolist()


def gpt2_with_adapter():
    """A float64 model with a LoRA of ordinary size; GPT-2 computes in float64 throughout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=262, n_embd=32, n_layer=2, n_head=2, n_positions=64)).double()
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=False).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_score_is_the_measured_gain_of_one_sgd_step():
    """The drop of the target's loss minus rate x score shrinks with the square of the rate."""
    model = gpt2_with_adapter()
    context = make_context(
        SPEC, proxy=None, model=model, pool=toy_pool(6), reference=replace(toy_target(3), groups=None)
    )
    options = {"adam_variant": "none", "similarity": "dot", "warmup_fraction": 0.0, "fraction": 1.0, **EXACT}
    scores = build(SPEC, options).select(context).scores
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def loss_of(row):
        # The model's own loss would be rounded to float32.
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        return torch.nn.functional.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], labels[1:])

    def target_loss():
        with torch.no_grad():
            return np.mean([loss_of(row).item() for row in context.reference.rows])

    start, rates = target_loss(), np.array([1e-3, 5e-4, 2.5e-4, 1.25e-4])
    for row, score in enumerate(scores):
        gradient = torch.autograd.grad(loss_of(context.pool.rows[row]), weights)
        residuals = []
        for rate in rates:
            with torch.no_grad():
                for weight, step in zip(weights, gradient, strict=True):
                    weight -= rate * step
                residuals.append(abs(start - target_loss() - rate * score))
                for weight, step in zip(weights, gradient, strict=True):
                    weight += rate * step
        slope = np.polyfit(np.log(rates), np.log(residuals), 1)[0]
        assert abs(slope - 2) < 0.01, f"row {row}: slope {slope:.4f}"


PLANTED = {
    "fraction": 0.05, "dims": 1024, "lora_r": 4, "warmup_fraction": 0.1, "warmup_epochs": 2, "warmup_batch_size": 4,
    "learning_rate": 1e-3,
}  # fmt: skip


@pytest.mark.parametrize("variant", ["fixed", "official", "paper"])
def test_planted_task_is_found_and_a_shuffled_store_does_not_find_it(variant, monkeypatch):
    pool, target = toy_pool(400), replace(toy_target(10), groups=None)

    def precision():
        picks = build(SPEC, {**PLANTED, "variant": variant}).select(
            make_context(SPEC, proxy=None, pool=pool, reference=target)
        )
        assert len(picks.positions) == 20
        return np.mean([pool.sources[row] == "sum" for row in picks.positions])

    assert precision() >= 0.9
    from hf_eff.engines.datastore import FeatureStore

    write = FeatureStore.write
    shuffle = np.random.default_rng(0).permutation(400)

    def misplaced(store, positions, features):
        write(store, shuffle[positions] if len(store.done) == 400 else positions, features)

    monkeypatch.setattr(FeatureStore, "write", misplaced)
    assert precision() < 0.9


@pytest.mark.parametrize("projection", ["rademacher", "sparse", "two_sided"])
def test_every_projection_keeps_the_cosines_and_is_its_own_store(projection, tmp_path):
    pool, options = toy_pool(60), {"lora_r": 8, "store_dtype": "float32"}
    exact = pick(SPEC, make_context(SPEC, proxy=None, pool=pool), **options, dims=10**9).scores
    picks = pick(
        SPEC,
        make_context(SPEC, proxy=None, pool=pool, folder=tmp_path / "s"),
        **options,
        dims=512,
        projection=projection,
    )
    assert picks.notes["projected"] == projection
    assert 0 < np.sqrt(np.mean((picks.scores - exact) ** 2)) <= 3 / math.sqrt(512)
    other = "sparse" if projection == "rademacher" else "rademacher"
    context = make_context(SPEC, proxy=None, pool=pool, folder=tmp_path / "s")
    with pytest.raises(ManifestError, match="another selection: projector is"):
        pick(SPEC, context, **options, dims=512, projection=other)


@pytest.mark.parametrize("projection", ["rademacher", "sparse", "two_sided"])
def test_cost_of_each_projection_is_what_is_charged(projection):
    tally = Tally()
    context = make_context(SPEC, proxy=None, pool=toy_pool(100), spend=tally)
    pick(SPEC, context, projection=projection)
    facts = Facts(model=model_facts(context.model), pool=pool_facts_of(context.pool, context.reference))
    forecast = SPEC.cost(SPEC.config.from_dict({**SPEC.tiny, "projection": projection}), facts).flops
    assert sum(tally.flops) / 1.2 < forecast < 1.35 * sum(tally.flops)


def test_order_of_groups_does_not_matter():
    target = grouped_target()
    first = pick(SPEC, make_context(SPEC, proxy=None, reference=target))
    renamed = replace(target, groups=[{"odd": "a", "even": "z"}[group] for group in target.groups])
    again = pick(SPEC, make_context(SPEC, proxy=None, reference=renamed))
    assert np.allclose(first.scores, again.scores, atol=1e-6)
    assert first.notes["groups"] == ["even", "odd"]
    assert again.notes["groups"] == ["a", "z"]


def test_groups_reduce_by_max_or_mean():
    options = {**EXACT, **WARMUP, "fraction": 0.25}
    context = make_context(SPEC, proxy=None, reference=grouped_target())
    highest = build(SPEC, options).select(context).scores
    mean = build(SPEC, {**options, "group_reduce": "mean"}).select(context).scores
    by_hand = []
    for group in ("even", "odd"):
        rows = [
            row for row, name in zip(context.reference.rows, context.reference.groups, strict=True) if name == group
        ]
        alone = replace(context, reference=replace(pool_of(rows), groups=None))
        by_hand.append(build(SPEC, options).select(alone).scores)
    assert np.allclose(highest, np.max(by_hand, axis=0), atol=1e-5)
    assert np.allclose(mean, np.mean(by_hand, axis=0), atol=1e-5)


def test_rows_without_loss_have_no_score_and_are_never_chosen():
    pool = toy_pool()
    empty = [3, 10]
    for row in empty:
        pool.rows[row] = {**pool.rows[row], "labels": [-100] * len(pool.rows[row]["labels"])}
        pool.loss_lengths[row] = 0
    picks = pick(SPEC, make_context(SPEC, proxy=None, pool=pool), fraction=1.0)
    assert np.flatnonzero(np.isnan(picks.scores)).tolist() == empty
    assert len(picks.positions) == 22
    assert not set(empty) & set(picks.positions.tolist())
    assert picks.notes["num_scored"] == 22


def test_reasons_and_notes_tell_what_ran():
    context = make_context(SPEC, proxy=None, reference=grouped_target())
    picks = pick(SPEC, context)
    best = picks.positions[0]
    assert picks.scores[best] == np.nanmax(picks.scores)
    assert picks.reasons[0] in {f"cos {picks.scores[best]:.3g} to {group}" for group in ("odd", "even")}
    notes = json.loads(json.dumps(dict(picks.notes)))
    assert notes["variant"] == "fixed"
    assert {"adam_variant", "include_momentum", "val_agg", "dims", "checkpoint_weights"} <= notes.keys()
    assert sum(notes["checkpoint_weights"]) == pytest.approx(1.0)
    assert (notes["warmup_rows"], notes["warmup_steps"]) == (6, 4)
    assert notes["adapter"] == "fresh"


def test_options_override_the_variant():
    config = SPEC.config.from_dict({"variant": "official", "val_agg": "cos_of_mean"})
    assert config.resolved == {"adam_variant": "official", "include_momentum": True, "val_agg": "cos_of_mean"}
    assert SPEC.config.from_dict({"variant": "paper"}).resolved["adam_variant"] == "paper"
    with pytest.raises(OptionError, match=r"LessConfig\.variant must be one of"):
        SPEC.config.from_dict({"variant": "mine"})


def test_checkpoints_count_by_their_learning_rate():
    notes = pick(SPEC, make_context(SPEC, proxy=None)).notes
    # Four steps of a falling schedule: means of (4, 3) and of (2, 1) quarters.
    assert notes["checkpoint_weights"] == pytest.approx([0.7, 0.3])
    assert pick(SPEC, make_context(SPEC, proxy=None), warmup_epochs=0).notes["checkpoint_weights"] == [1.0]
    assert pick(SPEC, make_context(SPEC, proxy=None), learning_rate=0.0).notes["checkpoint_weights"] == [0.5, 0.5]


def test_the_runs_learning_rate_is_the_default_when_asked_for():
    slow = pick(SPEC, make_context(SPEC, proxy=None, learning_rate=1e-4), learning_rate=None)
    assert np.array_equal(slow.scores, pick(SPEC, make_context(SPEC, proxy=None), learning_rate=1e-4).scores)
    assert not np.array_equal(slow.scores, pick(SPEC, make_context(SPEC, proxy=None)).scores)


def test_a_models_own_adapter_is_used_and_given_back():
    model = gpt2_with_adapter().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [id(module) for module in model.modules()]
    picks = pick(SPEC, make_context(SPEC, proxy=None, model=model), lora_r=64)
    assert picks.notes["adapter"] == "the model's own"
    assert picks.notes["adapter_params"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.training
    assert modules == [id(module) for module in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bfloat16_ranks_like_float32():
    exact = pick(SPEC, make_context(SPEC, proxy=None, pool=toy_pool(60))).scores
    half = pick(SPEC, make_context(SPEC, proxy=None, pool=toy_pool(60)), dtype="bfloat16").scores
    ranks = [np.argsort(np.argsort(scores)) for scores in (exact, half)]
    assert np.corrcoef(*ranks)[0, 1] > 0.99
    assert not np.array_equal(exact, half)


class Tally:
    """Counts charges, and refuses the one after ``limit``."""

    def __init__(self, limit=math.inf):
        self.flops, self.limit = [], limit

    def __call__(self, flops, tokens):
        if len(self.flops) >= self.limit:
            raise BudgetExceededError("enough")
        self.flops.append(flops)


def test_interrupted_anywhere_and_resumed_is_bit_identical(tmp_path):
    whole = Tally()
    expected = pick(SPEC, make_context(SPEC, proxy=None, spend=whole))
    total = len(whole.flops)
    assert total >= 8
    for limit in range(total):
        folder, first, rest = tmp_path / str(limit), Tally(limit), Tally()
        with pytest.raises(BudgetExceededError):
            pick(SPEC, make_context(SPEC, proxy=None, spend=first, folder=folder))
        found = pick(SPEC, make_context(SPEC, proxy=None, spend=rest, folder=folder))
        assert np.array_equal(found.positions, expected.positions)
        assert np.array_equal(found.scores, expected.scores)
        # Four warm-up steps; a half-finished epoch of two is redone, a finished batch never.
        redone = limit % 2 if limit < 4 else 0
        assert len(rest.flops) == total - limit + redone


KILLED = """
import os, signal, sys
from pathlib import Path
from hf_eff.registry import get_method
from hf_eff.testing.selection_scene import make_context, pick
spec, left = get_method("selection", "less"), [int(sys.argv[2])]
def spend(flops, tokens):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
pick(spec, make_context(spec, proxy=None, folder=Path(sys.argv[1]), spend=spend))
"""


def test_killed_and_run_again_is_bit_identical(tmp_path):
    expected = pick(SPEC, make_context(SPEC, proxy=None))
    arguments = [sys.executable, "-c", KILLED, str(tmp_path / "s"), "7"]
    assert subprocess.run(arguments, check=False, timeout=300).returncode == -9
    rest, whole = Tally(), Tally()
    pick(SPEC, make_context(SPEC, proxy=None, spend=whole))
    found = pick(SPEC, make_context(SPEC, proxy=None, folder=tmp_path / "s", spend=rest))
    assert len(rest.flops) == len(whole.flops) - 7
    assert np.array_equal(found.scores, expected.scores)
    assert np.array_equal(found.positions, expected.positions)


def test_a_store_of_other_options_or_rows_is_refused(tmp_path):
    pick(SPEC, make_context(SPEC, proxy=None, folder=tmp_path / "s"))
    for problem, options, changes in (
        ("projector", {"dims": 128}, {}),
        ("scaling", {"variant": "official"}, {}),
        ("dtype", {"store_dtype": "float32"}, {}),
        ("reduction", {"reduction": "sum"}, {}),
        ("seed", {}, {"seed": 8}),
        ("model", {}, {"model": tiny_model(layers=2, width=32, seed=1)}),
        ("rows", {}, {"pool": toy_pool(order=range(23, -1, -1))}),
        ("num_rows", {}, {"reference": toy_target(5)}),
    ):
        with pytest.raises(ManifestError, match=f"another selection: {problem} is"):
            pick(SPEC, make_context(SPEC, proxy=None, folder=tmp_path / "s", **changes), **options)
    found = pick(SPEC, make_context(SPEC, proxy=None, folder=tmp_path / "s", spend=Tally(0)), fraction=0.5)
    assert len(found.positions) == 12


def test_choice_is_the_rows_whatever_their_order_to_a_bit():
    order = np.random.default_rng(2).permutation(24).tolist()
    plain, shuffled = make_context(SPEC, proxy=None), make_context(SPEC, proxy=None, pool=toy_pool(order=order))
    first, second = pick(SPEC, plain), pick(SPEC, shuffled)
    assert chosen_hashes(first, plain.pool) == chosen_hashes(second, shuffled.pool)
    assert np.array_equal(first.scores[order], second.scores)


def test_rows_without_hashes_are_hashed():
    plain = make_context(SPEC, proxy=None)
    bare = make_context(
        SPEC, proxy=None, pool=replace(toy_pool(), row_hash=None), reference=replace(toy_target(), row_hash=None)
    )
    assert len(pick(SPEC, bare).positions) == len(pick(SPEC, plain).positions)


def test_a_group_column_that_nobody_read_is_reported():
    ungrouped = replace(toy_target(), groups=None)
    with pytest.raises(DataError, match="eval_dataset as a dict"):
        pick(SPEC, make_context(SPEC, proxy=None, reference=ungrouped), group_column="task")
    assert pick(SPEC, make_context(SPEC, proxy=None, reference=grouped_target()), group_column="task").notes["groups"]


def test_missing_target_and_impossible_sizes_cost_nothing():
    for changes, options, message in (
        ({"reference": None}, {}, "needs target rows"),
        ({"reference": unlabelled(toy_target())}, {}, "needs target rows"),
        ({}, {"fraction": None, "num_examples": 25}, "more than the 24 valid rows"),
        ({"pool": unlabelled(toy_pool())}, {}, "none of the 24 rows"),
    ):
        tally = Tally(0)
        with pytest.raises(DataError, match=message):
            pick(SPEC, make_context(SPEC, proxy=None, spend=tally, **changes), **options)


def test_cost_is_what_is_charged():
    tally, tokens = Tally(), []
    context = make_context(
        SPEC, proxy=None, pool=toy_pool(100), spend=lambda flops, count: (tally(flops, count), tokens.append(count))
    )
    pick(SPEC, context)
    facts = Facts(model=model_facts(context.model), pool=pool_facts_of(context.pool, context.reference))
    forecast = SPEC.cost(SPEC.config.from_dict(dict(SPEC.tiny)), facts)
    # The adapter is estimated from above (key and value projections are narrower), padding neglected.
    assert sum(tally.flops) / 1.2 < forecast.flops < 1.35 * sum(tally.flops)
    assert sum(tokens) / 1.2 < forecast.tokens <= sum(tokens) * 1.05


def test_disk_forecast_is_what_is_written(tmp_path):
    context = make_context(SPEC, proxy=None, pool=toy_pool(100), folder=tmp_path / "s")
    pick(SPEC, context)
    written = sum(
        path.stat().st_size for path in (tmp_path / "s").rglob("*") if path.suffix in (".bin", ".safetensors")
    )
    facts = Facts(model=model_facts(context.model), pool=pool_facts_of(context.pool, context.reference))
    forecast = SPEC.cost(SPEC.config.from_dict(dict(SPEC.tiny)), facts).disk_bytes
    assert written / 1.25 < forecast < 1.25 * written


def test_default_dims_follow_the_models_size():
    config = SPEC.config()
    assert config.width(135_000_000) == 4096
    assert config.width(7_000_000_000) == 8192
    assert SPEC.config(dims=100).width(7_000_000_000) == 100


def test_unknown_pool_size_has_a_forecast():
    facts = Facts(
        model=model_facts(tiny_model()), pool=PoolFacts(num_rows=None, mean_tokens=20.0, max_tokens=40, streaming=True)
    )
    assert SPEC.cost(SPEC.config(), facts).flops == 0
