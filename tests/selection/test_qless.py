"""qless: LESS with few bits, its rules, its bytes."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from hf_eff.contracts.cost import Facts
from hf_eff.engines.facts import model_facts
from hf_eff.errors import BudgetExceededError, DataError, ManifestError, OptionError
from hf_eff.registry import build, get_method
from hf_eff.testing.selection_scene import make_context, pick, pool_facts_of, toy_pool, toy_target

pytest.importorskip("peft")

SPEC = get_method("selection", "qless")
LESS = get_method("selection", "less")
SHARED = {key: value for key, value in SPEC.tiny.items() if key != "bits"}


def grouped_target():
    target = toy_target()
    target.groups = ["odd" if row % 2 else "even" for row in range(len(target))]
    return target


def spearman(first, second):
    return np.corrcoef(np.argsort(np.argsort(first)), np.argsort(np.argsort(second)))[0, 1]


def scores_of(pool, **options):
    return pick(SPEC, make_context(SPEC, proxy=None, pool=pool), **{"dims": 2048, **options}).scores


def test_eight_bits_are_less():
    context = make_context(SPEC, proxy=None, reference=grouped_target())
    exact = build(LESS, {**SHARED, "group_reduce": "mean", "store_dtype": "float32"}).select(context).scores
    found = pick(SPEC, make_context(SPEC, proxy=None, reference=grouped_target()), bits=8).scores
    assert np.abs(found - exact).max() < 0.01
    assert not np.array_equal(found, exact)


def test_fewer_bits_rank_like_less_and_signs_beat_absmax_at_two_bits():
    """Within one kind of row: kinds differ so much that any rule tells them apart."""
    pool = toy_pool(200)
    pool = pool.take([row for row in range(200) if pool.sources[row] == "sum"])
    reference = build(LESS, {**SHARED, "dims": 2048, "group_reduce": "mean", "store_dtype": "float32"})
    exact = reference.select(make_context(LESS, proxy=None, pool=pool)).scores
    kept = {bits: spearman(scores_of(pool, bits=bits), exact) for bits in (8, 4, 2, 1)}
    absmax = spearman(scores_of(pool, bits=2, quantiser="absmax"), exact)
    assert kept[8] >= 0.999
    assert kept[4] >= 0.98
    assert kept[2] > absmax
    assert kept[1] > absmax


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 1}, {"bits": 1, "quantise_target": True}])
def test_planted_task_is_found(options):
    planted = {
        "fraction": 0.05,
        "dims": 1024,
        "lora_r": 4,
        "warmup_fraction": 0.1,
        "warmup_epochs": 2,
        "warmup_batch_size": 4,
        "learning_rate": 1e-3,
        **options,
    }
    pool = toy_pool(200)
    context = make_context(SPEC, proxy=None, pool=pool, reference=replace(toy_target(10), groups=None))
    picks = build(SPEC, planted).select(context)
    assert np.mean([pool.sources[row] == "sum" for row in picks.positions]) >= 0.9


def test_groups_reduce_by_mean_unless_told():
    context = make_context(SPEC, proxy=None, reference=grouped_target())
    mean, highest = (pick(SPEC, context, **options).scores for options in ({}, {"group_reduce": "max"}))
    assert (highest >= mean).all()
    assert not np.allclose(mean, highest)


def test_a_rounded_target_gives_other_scores_of_the_same_order():
    exact, rounded = (scores_of(toy_pool(48), quantise_target=flag) for flag in (False, True))
    assert not np.allclose(exact, rounded, atol=1e-3)
    assert spearman(exact, rounded) > 0.9


def test_checkpoints_weigh_as_asked():
    # Four steps of a falling schedule; the rates of the second and the fourth are 3/4 and 1/4 of the peak.
    for rule, weights in (("mean_rate", [0.7, 0.3]), ("last_rate", [0.75, 0.25]), ("equal", [0.5, 0.5])):
        notes = pick(SPEC, make_context(SPEC, proxy=None), checkpoint_weights=rule).notes
        assert notes["checkpoint_weights"] == pytest.approx(weights)


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_features_take_the_bytes_of_the_formula(tmp_path, bits):
    context = make_context(SPEC, proxy=None, pool=toy_pool(60), folder=tmp_path / "s")
    pick(SPEC, context, bits=bits, dims=1001)
    sizes = [path.stat().st_size for path in (tmp_path / "s").rglob("pool/*.bin")]
    formula = 2 * 60 * (math.ceil(1001 * bits / 8) + 4)
    assert formula <= sum(sizes) <= 1.01 * formula
    written = [path.stat().st_size for path in (tmp_path / "s").rglob("*") if path.suffix in (".bin", ".safetensors")]
    facts = Facts(model=model_facts(context.model), pool=pool_facts_of(context.pool, context.reference))
    forecast = SPEC.cost(SPEC.config.from_dict({**SPEC.tiny, "bits": bits, "dims": 1001}), facts).disk_bytes
    assert sum(written) / 1.4 < forecast < 1.4 * sum(written)


def test_resume_and_other_bits(tmp_path):
    charges = []

    def spend(flops, tokens):
        charges.append(flops)
        if len(charges) > 6:
            raise BudgetExceededError("enough")

    expected = pick(SPEC, make_context(SPEC, proxy=None))
    with pytest.raises(BudgetExceededError):
        pick(SPEC, make_context(SPEC, proxy=None, folder=tmp_path / "s", spend=spend))
    found = pick(SPEC, make_context(SPEC, proxy=None, folder=tmp_path / "s"))
    assert np.array_equal(found.scores, expected.scores)
    with pytest.raises(ManifestError, match="another selection: dtype is"):
        pick(SPEC, make_context(SPEC, proxy=None, folder=tmp_path / "s"), bits=2)


def test_notes_reasons_and_errors():
    picks = pick(SPEC, make_context(SPEC, proxy=None))
    notes = json.loads(json.dumps(dict(picks.notes)))
    assert (notes["variant"], notes["bits"], notes["quantiser"]) == ("fixed", 1, "auto")
    assert picks.reasons[0].startswith("cos ")
    with pytest.raises(OptionError, match=r"QlessConfig\.bits must be one of \[8, 4, 2, 1\], got 3"):
        SPEC.config.from_dict({"bits": 3})
    with pytest.raises(DataError, match="selection='qless' needs target rows"):
        pick(SPEC, make_context(SPEC, proxy=None, reference=None))
