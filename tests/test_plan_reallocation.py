"""What a plan says about a governor's actions, from options and facts alone."""

import dataclasses

import pytest

from hf_eff.contracts.cost import BlockFacts, Facts, HardwareFacts, ModelFacts, PoolFacts, RunFacts
from hf_eff.errors import PlanError
from hf_eff.options import EffOptions, resolve_options
from hf_eff.plan_reallocation import (
    chosen_actions,
    cooldown_share,
    keeps_best,
    planned_window,
    reallocation_notes,
    refuse_reallocation,
)
from hf_eff.testing.toys import scripted
from hf_eff.testing.trial import registered

BLOCK = BlockFacts(params=10**8, matmul_params=10**8)
MODEL = ModelFacts(
    architecture="toy",
    params=5 * 10**8,
    blocks=(BLOCK,) * 5,
    head_matmul_params=0,
    embedding_params=0,
    hidden_size=8,
    vocab_size=8,
)
FACTS = Facts(model=MODEL, pool=PoolFacts(num_rows=100, mean_tokens=10.0, max_tokens=20, num_reference=5))


@pytest.fixture(autouse=True)
def scripted_governor():
    with registered(scripted.SPEC):
        yield


def resolved(mode="act", selection="random", memory="full", **knobs):
    return resolve_options(
        EffOptions(selection=selection, memory=memory, governor="scripted", governor_mode=mode, governor_kwargs=knobs)
    )


def with_run(**changes):
    return dataclasses.replace(FACTS, run=RunFacts(**changes))


def test_words_are_read_in_one_order():
    assert chosen_actions(scripted.ScriptedConfig(actions=" widen+memory + refresh")) == ("refresh", "widen", "memory")
    assert chosen_actions(scripted.ScriptedConfig()) == chosen_actions(object()) == ()
    with pytest.raises(PlanError, match="actions names 'nap'; it joins words of"):
        chosen_actions(scripted.ScriptedConfig(actions="nap"))


@pytest.mark.parametrize(
    ("knobs", "steps", "window"),
    [
        ({"actions": "widen"}, 400, 10),
        ({"actions": "widen"}, 30, 1),
        ({"actions": "widen", "window_steps": 7}, 400, 7),
        ({"actions": "memory"}, 400, None),
        ({}, 400, None),
        ({"actions": "widen"}, None, None),
    ],
)
def test_length_of_a_window(knobs, steps, window):
    assert planned_window(resolved(**knobs), steps) == window


def test_only_a_governor_that_acts_reserves_and_keeps():
    knobs = {"cooldown": 0.15, "restore_best": True}
    assert cooldown_share(resolved(**knobs)) == 0.15
    assert keeps_best(resolved(**knobs), FACTS)
    for mode in ("observe", "advise"):
        assert cooldown_share(resolved(mode, **knobs)) == 0.0
        assert not keeps_best(resolved(mode, **knobs), FACTS)
    assert not keeps_best(resolved(memory="mezo", **knobs), FACTS)
    assert not keeps_best(resolved(**knobs), FACTS.replace(hardware=HardwareFacts(backend="fsdp2")))


@pytest.mark.parametrize(
    ("options", "facts", "sentence"),
    [
        ({"selection": "all"}, FACTS, "set selection=..., such as 'less'"),
        ({}, with_run(packing=True), "packing=True has joined rows before it; set packing=False"),
        ({}, with_run(padding_free=True), "set padding_free=False, or leave these actions out"),
        ({}, FACTS.replace(pool=dataclasses.replace(FACTS.pool, streaming=True)), "a stream was given"),
        ({}, FACTS.replace(hardware=HardwareFacts(backend="fsdp2")), "use DDP, or actions='next_band"),
        ({"cooldown": 0.1}, with_run(lr_scheduler="linear"), "lr_scheduler_type='linear' does so by a plan of its own"),
    ],
)
def test_refusals(options, facts, sentence):
    with pytest.raises(PlanError, match=sentence):
        refuse_reallocation(resolved(**{"actions": "refresh+widen", **options}), facts)


def test_what_can_be_done_is_not_refused():
    sharded = FACTS.replace(hardware=HardwareFacts(backend="fsdp2"))
    refuse_reallocation(resolved(actions="next_band+widen+memory"), sharded)
    refuse_reallocation(resolved(selection="all", actions="memory"), with_run(packing=True))
    refuse_reallocation(resolved(cooldown=0.1), with_run(lr_scheduler="constant_with_warmup"))
    refuse_reallocation(resolved(cooldown=0.0), with_run(lr_scheduler="cosine"))


def test_notes():
    (window,) = reallocation_notes(resolved(actions="refresh"), FACTS, 80)
    assert window.startswith(
        "rows may change every 2 optimizer steps; such a window is what the trainer calls an epoch"
    )
    (weights,) = reallocation_notes(resolved(restore_best=True), FACTS, 80)
    assert weights.startswith("the trained weights, 1.86 GiB, are written into the output folder")
    small = FACTS.replace(model=dataclasses.replace(MODEL, param_bytes=0.01))
    assert reallocation_notes(resolved(restore_best=True), small, 80) == []
    assert reallocation_notes(resolved(), FACTS, 80) == []
    sharded = FACTS.replace(hardware=HardwareFacts(backend="fsdp2"))
    forwards_only = resolved(memory="mezo", restore_best=True)
    for chosen, facts in ((forwards_only, FACTS), (resolved(restore_best=True), sharded)):
        (lost,) = reallocation_notes(chosen, facts, 80)
        assert "after a rise of the loss the last ones stay" in lost
    assert reallocation_notes(resolved("observe", memory="mezo", restore_best=True), FACTS, 80) == []
