"""The ladder that a plan writes down, and what memory methods cost together."""

import dataclasses

import pytest

from hf_eff.contracts.cost import Facts, HardwareFacts, PoolFacts, RunFacts
from hf_eff.engines.facts import model_facts_from_config
from hf_eff.errors import PlanError
from hf_eff.numerics.flops import recompute_flops
from hf_eff.numerics.planned_step import planned_shape
from hf_eff.options import EffOptions, resolve_options
from hf_eff.plan import make_plan
from hf_eff.plan_memory import memory_cost, tokens_that_fit
from hf_eff.testing.tiny import tiny_config


@pytest.fixture(scope="module")
def facts():
    config = tiny_config(layers=6, width=256, intermediate_size=1024, vocab_size=32000, max_position_embeddings=4096)
    pool = PoolFacts(num_rows=100, mean_tokens=512.0, max_tokens=512)
    run = RunFacts(batch_size=4, max_steps=10, length=512)
    return Facts(model=model_facts_from_config(config), pool=pool, hardware=HardwareFacts(total_bytes=2**34), run=run)


def changed(facts, part, **changes):
    return facts.replace(**{part: dataclasses.replace(getattr(facts, part), **changes)})


def ladder(facts, **options):
    return [rung.name for rung in make_plan(EffOptions(**options), facts).ladder]


ALL = ["row_chunks", "checkpointing", "badam", "length_split"]


def test_rungs_hold_less_and_less_and_exact_ones_come_first(facts):
    plan = make_plan(EffOptions(budget="1e30flop"), facts)
    assert [rung.name for rung in plan.ladder] == ALL
    assert [rung.exact for rung in plan.ladder] == [True, True, False, False]
    peaks = [plan.peak_bytes, *(rung.bytes for rung in plan.ladder)]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == len(peaks)


def test_what_each_run_can_take(facts):
    assert ladder(facts) == ALL
    assert ladder(facts, out_of_memory="exact") == ALL[:2]
    assert ladder(facts, out_of_memory="raise") == []
    assert ladder(facts, memory="row_chunks") == ALL[1:]
    assert ladder(facts, memory="checkpointing") == ["row_chunks", "badam", "length_split"]
    assert ladder(facts, memory="badam") == ["row_chunks", "checkpointing", "length_split"]
    assert ladder(facts, memory="mezo") == ["row_chunks", "length_split"]
    assert ladder(changed(facts, "run", batch_size=1)) == ALL[1:]
    assert ladder(changed(facts, "run", checkpointing=True)) == ["row_chunks", "badam", "length_split"]
    assert ladder(changed(facts, "run", packing=True)) == ["checkpointing", "badam"]
    assert ladder(changed(facts, "run", custom_optimizer=True)) == ["row_chunks", "checkpointing", "length_split"]
    assert "badam" not in ladder(changed(facts, "run", optim="schedule_free_adamw"))
    assert "badam" not in ladder(changed(facts, "model", param_bytes=2.0))


def test_what_cannot_be_done_again_has_no_ladder(facts):
    no_clipping = changed(facts, "run", max_grad_norm=0.0)
    assert ladder(no_clipping, memory="fused") == []
    assert ladder(no_clipping, memory_kwargs={}) == ALL
    assert ladder(changed(facts, "run", optim="lomo", max_grad_norm=0.0)) == []
    assert ladder(changed(facts, "hardware", backend="fsdp2", world_size=2)) == []


def test_several_processes_only_split_ahead_of_time(facts):
    two = changed(facts, "hardware", backend="ddp", world_size=2)
    assert ladder(two) == []
    assert ladder(two, budget="16GiB") == ["row_chunks"]


def test_a_cap_that_a_rung_meets_is_told_and_one_that_none_meets_is_refused(facts):
    plan = make_plan(EffOptions(), facts)
    between = (plan.ladder[0].bytes + plan.ladder[1].bytes) / 2
    capped = make_plan(EffOptions(budget=f"{between / 2**20}MiB"), facts)
    assert any("up to 'checkpointing'." in warning for warning in capped.warnings)
    with pytest.raises(
        PlanError, match=r"below the predicted peak of .*with all that out_of_memory allows, for memory"
    ):
        make_plan(EffOptions(budget=f"{between / 2**20}MiB", out_of_memory="exact", memory="row_chunks+full"), facts)
    with pytest.raises(PlanError, match=r"below the predicted peak of [\d.]+ .iB, for memory='full'"):
        make_plan(EffOptions(budget=f"{between / 2**20}MiB", out_of_memory="raise"), facts)


def test_the_plan_shows_its_ladder(facts):
    text = str(make_plan(EffOptions(budget="1e30flop"), facts))
    assert "if it runs out  row_chunks (" in text
    assert "badam* (" in text
    assert "(* changes the result)" in text


def test_tokens_that_fit_are_the_most(facts):
    resolved = resolve_options(EffOptions())

    def peak(tokens):
        run = dataclasses.replace(facts.run, batch_size=1, length=tokens)
        return memory_cost(resolved, facts.replace(run=run))[1].peak_bytes

    limit = peak(700)
    found = tokens_that_fit(resolved, facts, limit)
    assert peak(found) <= limit < peak(found + 1)
    assert found >= 700
    assert tokens_that_fit(resolved, facts, 1.0) is None


def test_recomputation_is_part_of_the_forecast(facts):
    plain, again = (
        memory_cost(resolve_options(EffOptions(memory=name)), facts)[1] for name in ("full", "checkpointing")
    )
    recomputed = recompute_flops(facts.model, planned_shape(facts))
    assert recomputed > 0.1 * plain.step_flops
    assert again.step_flops - plain.step_flops == pytest.approx(recomputed, rel=1e-6)


@pytest.mark.parametrize("optim", ["lomo", "galore_adamw_layerwise"])
def test_optimizers_that_update_in_the_backward_do_not_accumulate(facts, optim):
    with pytest.raises(PlanError, match=rf"optim='{optim}' updates in the backward of every micro-batch"):
        make_plan(EffOptions(budget="9steps"), changed(facts, "run", optim=optim, accumulation=2))
    plan = make_plan(EffOptions(budget="9steps"), changed(facts, "run", optim=optim))
    assert any(f"optim='{optim}' does not apply max_grad_norm=1" in warning for warning in plan.warnings)
