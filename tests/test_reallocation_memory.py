"""Memory switched in the middle of a run: offered where it fits, the same result, and undone when it did not fit."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_eff.contracts.budget import Budget
from hf_eff.engines.facts import model_facts
from hf_eff.engines.layer_checkpointing import is_checkpointing
from hf_eff.hardware.ledger import Ledger
from hf_eff.memory import MemoryStack
from hf_eff.reallocation import memory_offers, switch_memory
from hf_eff.rescue import Rescue
from hf_eff.testing.toys import scripted
from hf_eff.testing.trial import Trial, registered

OFF = "2 switch_memory checkpointing off"


@pytest.fixture(autouse=True)
def scripted_governor():
    with registered(scripted.SPEC):
        yield


def trial(folder, script=OFF, *, steps=5, **arguments):
    arguments = {"governor_kwargs": {"script": script, "actions": "memory"}, **arguments}
    return Trial(scripted.SPEC, folder, max_steps=steps, arguments=arguments)


def whole(folder, script, name, **arguments):
    trainer = trial(folder, script, **arguments).build(name)
    trainer.train()
    return trainer


def weights_of(trainer):
    return {name: each.detach().clone() for name, each in trainer.model.named_parameters()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def step_flops(trainer):
    """FLOPs of each step with the probe after it."""
    spent = [0.0] + [entry["eff/flops"] for entry in trainer.state.log_history if "eff/flops" in entry]
    return [after - before for before, after in itertools.pairwise(spent)][:5]


def first_offer(trainer):
    lines = (Path(trainer.args.output_dir) / "governor.jsonl").read_text().splitlines()
    looks = [entry for entry in map(json.loads, lines) if entry["kind"] == "decision"]
    return looks[0]["telemetry"]["offers"][0]


@pytest.mark.parametrize("by", [{"gradient_checkpointing": True}, {"memory": "checkpointing"}], ids=["args", "method"])
def test_layers_kept_whole_change_no_bit_and_cost_less(tmp_path, by):
    stays = whole(tmp_path, "", "stays", **by)
    switched = whole(tmp_path, OFF, "switched", **by)
    assert same(weights_of(stays), weights_of(switched))
    offer, before, after = first_offer(switched), step_flops(stays), step_flops(switched)
    assert (offer["action"], offer["target"], offer["feasible"]) == ("switch_memory", "checkpointing off", True)
    assert before[:2] == after[:2]
    probe = switched.budgeted_run.supervisor.probe.cost_flops
    ratios = [(b - probe) / (a - probe) for b, a in zip(after[2:], before[2:], strict=True)]
    assert ratios == pytest.approx([offer["cost_factor"]] * 3, rel=0.02)
    assert offer["cost_factor"] < 0.9


def test_resumed_after_the_switch(tmp_path):
    scene = trial(tmp_path, memory="checkpointing")
    uninterrupted = scene.whole()
    assert scene.interrupted(3).differences(uninterrupted) == []


def test_what_did_not_fit_after_all_is_undone(tmp_path):
    stays = whole(tmp_path, "", "stays", memory="checkpointing")
    trainer = trial(tmp_path, memory="checkpointing").build("tight")

    def check(model, args, kwargs):
        if model.training and not is_checkpointing(model):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    trainer.model.register_forward_pre_hook(check, with_kwargs=True)
    trainer.train()
    (event,) = trainer.budgeted_run.rescue.events
    assert (event["step"], event["rung"], event["exact"]) == (2, "checkpointing", True)
    assert same(weights_of(stays), weights_of(trainer))


# Offers, on a plan


def scene(folder, cap=None, **arguments):
    """Model and as much of a run as offers look at, under a memory cap as if the model were alone in it."""
    trainer = trial(folder, "", **arguments).build("plan")
    stack = MemoryStack(trainer.plan.resolved.memory)
    rescue = Rescue(trainer.plan, stack, model_facts(trainer.model))
    rescue.attach(lambda: None, lambda: lambda: None)
    limits = {"flops": 1e12} | ({} if cap is None else {"bytes": cap})
    if cap is not None:
        rescue.expect(cap)
    ledger = Ledger(Budget(limits))
    run = SimpleNamespace(rescue=rescue, ledger=ledger, plan=trainer.plan, supervisor=SimpleNamespace(currency="flops"))
    return trainer.model, run


def by_target(model, run):
    return {offer.target: offer for offer in memory_offers(model, run)}


def test_a_cap_decides_whether_layers_may_stay_whole(tmp_path):
    model, run = scene(tmp_path, gradient_checkpointing=True)
    model.gradient_checkpointing_enable()
    peak = run.rescue.forecast(checkpointing=False).peak_bytes
    recomputed = run.rescue.forecast(checkpointing=True)
    assert recomputed.peak_bytes == run.plan.peak_bytes < peak
    for cap, feasible in [(peak / 0.92 * 1.001, True), (peak / 0.92 * 0.999, False)]:
        run.ledger.budget = Budget({"bytes": cap})
        offer = by_target(model, run)["checkpointing off"]
        assert offer.feasible is feasible
        assert offer.why_not == ("" if feasible else "the predicted peak is 92% of the memory cap")
    run.supervisor.currency = "tokens"
    assert by_target(model, run)["checkpointing off"].cost_factor == 1.0


def test_a_cap_that_splits_rows_offers_recomputation(tmp_path):
    model, run = scene(tmp_path)
    assert by_target(model, run) == {}
    peak = run.plan.peak_bytes
    model, run = scene(tmp_path, cap=0.5 * peak)
    before = run.rescue.token_limit
    offer = by_target(model, run)["checkpointing on"]
    assert offer.cost_factor > 1.1
    switch_memory("checkpointing on", model, 3, run.rescue)
    assert is_checkpointing(model)
    assert run.rescue.recomputes
    assert run.rescue.token_limit > before
    assert "checkpointing on" not in by_target(model, run)
    switch_memory("checkpointing off", model, 4, run.rescue)
    assert not is_checkpointing(model)
    assert run.rescue.token_limit == before
    run.rescue.train_end()
    assert is_checkpointing(model)  # as the ladder's method left it


def test_parts_that_became_too_small_may_grow_again(tmp_path):
    model, run = scene(tmp_path)
    run.rescue.token_limit = 40
    assert list(by_target(model, run)) == ["row_chunks off"]
    switch_memory("row_chunks off", model, 1, run.rescue)
    assert run.rescue.token_limit is None
    model, run = scene(tmp_path, cap=0.5 * run.plan.peak_bytes)
    expected, run.rescue.token_limit = run.rescue.token_limit, 1
    assert f"row_chunks {expected}" in by_target(model, run)
    switch_memory(f"row_chunks {expected}", model, 1, run.rescue)
    assert run.rescue.token_limit == expected
