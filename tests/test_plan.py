import dataclasses

import pytest

from hf_eff.contracts.cost import Facts, HardwareFacts, PoolFacts, RunFacts
from hf_eff.engines.facts import model_facts, model_facts_from_config
from hf_eff.errors import PlanError
from hf_eff.options import EffOptions
from hf_eff.plan import make_plan, planned_steps
from hf_eff.testing.tiny import tiny_config, tiny_model


@pytest.fixture(scope="module")
def facts():
    pool = PoolFacts(num_rows=100, mean_tokens=32.0, max_tokens=64, num_reference=8, mean_reference_tokens=32.0)
    run = RunFacts(batch_size=4, accumulation=2, epochs=2.0, length=32)
    return Facts(model=model_facts(tiny_model()), pool=pool, hardware=HardwareFacts(total_bytes=2**34), run=run)


def changed(facts, part, **changes):
    return facts.replace(**{part: dataclasses.replace(getattr(facts, part), **changes)})


def test_steps_are_those_of_transformers(facts):
    # 100 rows, batch 4, accumulation 2: 25 batches, 13 updates an epoch, two epochs.
    assert planned_steps(facts) == 26
    assert planned_steps(changed(facts, "run", max_steps=7)) == 7
    assert planned_steps(changed(facts, "pool", num_rows=None)) is None


def test_selection_shrinks_the_run_and_is_charged(facts):
    whole = make_plan(EffOptions(), facts)
    part = make_plan(EffOptions(selection="random", selection_kwargs={"num_examples": 8}), facts)
    assert (whole.selected_rows, part.selected_rows) == (100, 8)
    assert (whole.steps, part.steps) == (26, 2)
    less = make_plan(EffOptions(selection="less", selection_kwargs={"num_examples": 8}), facts)
    assert less.flops["select"] > 0
    assert less.flops["train"] == part.flops["train"]


def test_a_budget_ends_the_run_where_it_is_spent(facts):
    whole = make_plan(EffOptions(), facts)
    limit = 10.5 * whole.step_flops
    plan = make_plan(EffOptions(budget=f"{limit}flop"), facts)
    assert plan.stop_step == 10
    assert make_plan(EffOptions(budget="3steps"), facts).stop_step == 3
    assert make_plan(EffOptions(budget=f"{5 * whole.step_tokens}tok"), facts).stop_step == 5
    assert plan.step_tokens == 4 * 2 * 32


def test_a_budget_below_one_step_is_said(facts):
    plan = make_plan(EffOptions(budget="10tok"), facts)
    assert any("does not cover one optimizer step" in warning for warning in plan.warnings)


def test_selection_beyond_the_budget_is_refused(facts):
    options = EffOptions(selection="less", selection_kwargs={"num_examples": 8}, budget="1Mflop")
    with pytest.raises(PlanError, match=r"selection='less' alone would spend .*FLOP of budget=1.00 MFLOP"):
        make_plan(options, facts)


def test_peak_above_the_cap_is_refused(facts):
    with pytest.raises(PlanError, match=r"budget=1\.00 KiB is below the predicted peak of .* for memory='full'"):
        make_plan(EffOptions(budget="1KiB"), facts)


def test_energy_that_nothing_counts_is_refused(facts):
    blind = changed(facts, "hardware", energy_source="unavailable")
    with pytest.raises(PlanError, match=r"limits energy and nothing here counts it; .* or give power_watts"):
        make_plan(EffOptions(budget="0.5kWh"), blind)
    make_plan(EffOptions(budget="0.5kWh", power_watts=200.0), blind)
    make_plan(EffOptions(budget="0.5kWh"), changed(facts, "hardware", energy_source="rapl"))


def test_memory_methods_hold_less_than_full_training(facts):
    large = tiny_config(
        layers=12, width=512, intermediate_size=2048, vocab_size=32000
    )  # fixed scratch is no matter here
    facts = facts.replace(model=model_facts_from_config(large))
    peaks = {name: make_plan(EffOptions(memory=name), facts).peak_bytes for name in ("full", "badam", "mezo")}
    assert peaks["full"] > peaks["badam"] > peaks["mezo"]


def test_lora_under_another_method_is_seen_by_it(facts):
    alone, under = (make_plan(EffOptions(memory=name), facts) for name in ("mezo", "lora+mezo"))
    assert under.bytes["weights"] > alone.bytes["weights"]
    assert under.step_flops > alone.step_flops


REFUSED = [
    ({"memory": "badam"}, "hardware", {"backend": "deepspeed"}, "memory='badam' .*DeepSpeed"),
    ({"memory": "mezo"}, "run", {"fp16": True}, "memory='mezo' does not work with fp16.* use bf16=True"),
    ({"memory": "mezo"}, "run", {"optim": "adafactor"}, "optim='adafactor' would be ignored"),
    ({"memory": "mezo"}, "run", {"custom_optimizer": True}, "makes its own optimizer"),
    ({"memory": "badam"}, "run", {"auto_find_batch_size": True}, "auto_find_batch_size=True"),
    ({"selection": "less"}, "pool", {"num_reference": 0}, "selection='less' needs a target"),
    ({"governor": "marginal_gain"}, "pool", {"num_reference": 0}, "governor='marginal_gain' needs a target"),
    ({"selection": "random"}, "pool", {"streaming": True, "num_rows": None}, "selection='random' .*IterableDataset"),
    ({"memory": "badam"}, "model", {"blocks": ()}, "memory='badam' needs a model with at least two alike layers"),
    ({}, "pool", {"num_rows": 0}, "train_dataset is empty"),
]


@pytest.mark.parametrize(("options", "part", "changes", "sentence"), REFUSED)
def test_what_cannot_work_is_refused_by_name(facts, options, part, changes, sentence):
    with pytest.raises(PlanError, match=sentence):
        make_plan(EffOptions(**options), changed(facts, part, **changes))


def test_plan_prints_and_serialises(facts):
    import json

    plan = make_plan(EffOptions(selection="random", memory="badam", budget="1Tflop, 8GiB"), facts)
    text = str(plan)
    assert "badam" in text
    assert "1.00 TFLOP, 8.00 GiB" in text
    assert json.loads(json.dumps(plan.to_dict()))["predicted"]["stop_step"] == plan.stop_step


def test_a_planned_run_spends_nothing(facts):
    """The same facts give the same plan: no state, no clock, no device."""
    options = EffOptions(selection="less", memory="lora+badam", governor="marginal_gain", budget="1Pflop")
    assert make_plan(options, facts).to_dict() == make_plan(options, facts).to_dict()
