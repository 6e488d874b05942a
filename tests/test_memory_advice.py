import dataclasses

import pytest

from hf_eff.contracts.cost import Facts, HardwareFacts, PoolFacts, RunFacts
from hf_eff.engines.facts import model_facts_from_config
from hf_eff.memory_advice import first_change
from hf_eff.memory_forecast import Setup
from hf_eff.testing.tiny import tiny_config


def setup(memory="full", batch_size=8, length=64, config=None, device="cpu"):
    return Setup(
        memory,
        {},
        Facts(
            model=model_facts_from_config(config or tiny_config()),
            pool=PoolFacts(num_rows=None, mean_tokens=length, max_tokens=length),
            hardware=HardwareFacts(device=device),
            run=RunFacts(batch_size=batch_size, length=length, max_grad_norm=0.0),
        ),
    )


def advised(start, budget=None):
    return first_change(start, start.forecast(), budget)


def after(start, change):
    """The setup that an advice describes, predicted anew."""
    resized = start.resized(batch_size=change.batch_size, length=change.max_length)
    return dataclasses.replace(resized, memory=change.memory, kwargs=change.memory_kwargs).forecast()


WIDE_HEAD = tiny_config(layers=2, vocab_size=60_000)
DEEP = tiny_config(layers=8, width=128)


@pytest.mark.parametrize("config", [WIDE_HEAD, DEEP], ids=["wide head", "deep"])
@pytest.mark.parametrize("memory", ["full", "lora", "mezo", "checkpointing"])
@pytest.mark.parametrize("share", [None, 0.9, 0.4])
def test_an_advice_is_a_prediction(config, memory, share):
    start = setup(memory, config=config)
    before = start.forecast()
    budget = None if share is None else share * before.total
    change = first_change(start, before, budget)
    assert change is not None
    found = after(start, change)
    assert (change.total, change.step_flops) == (found.total, found.step_flops)
    assert change.total < before.total
    text = change.text(before, budget)
    assert text.startswith(f"{change.what}: ")
    assert ("too much" in text) == (budget is not None and change.total > budget)


def test_nothing_is_changed_where_it_fits():
    start = setup()
    assert advised(start, budget=start.forecast().total) is None


def test_the_cheapest_change_that_fits_is_named():
    start = setup(config=DEEP)
    before = start.forecast()
    candidates = {
        memory: dataclasses.replace(
            start, memory=memory, kwargs={"row_chunks": {"chunks": 8}} if "row" in memory else {}
        )
        for memory in ("row_chunks", "checkpointing", "chunked_loss", "row_chunks+checkpointing")
    }
    found = {memory: each.forecast() for memory, each in candidates.items()}
    budget = found["row_chunks"].total
    assert found["checkpointing"].total > 0
    assert found["chunked_loss"].total > budget
    change = advised(start, budget)
    assert change.memory == "row_chunks"
    assert change.same_result
    assert change.step_flops == before.step_flops  # checkpointing would cost more
    assert change.memory_kwargs == {"row_chunks": {"chunks": 8}}


def test_no_more_parts_than_needed():
    start = setup(config=DEEP)
    halves = dataclasses.replace(start, memory="row_chunks", kwargs={"row_chunks": {"chunks": 2}}).forecast()
    change = advised(start, halves.total)
    assert change.what == "add row_chunks(chunks=2)"


def test_logits_that_bind_ask_for_a_chunked_loss():
    """Of one row nothing but the loss can be cut into parts; layers are next to nothing here."""
    change = advised(setup(batch_size=1, length=4096, config=WIDE_HEAD))
    assert change.what == "add chunked_loss"


def test_layers_that_bind_ask_for_checkpointing():
    change = advised(setup(batch_size=1, length=512, config=DEEP))
    assert change.what == "add checkpointing"
    assert change.step_flops > setup(batch_size=1, length=512, config=DEEP).forecast().step_flops


def test_states_that_bind_ask_for_another_method():
    start = setup(batch_size=1, length=8, config=DEEP)
    change = advised(start, 0.5 * start.forecast().total)
    assert not change.same_result
    assert change.what.startswith("train with ")
    assert change.total <= 0.5 * start.forecast().total


def test_what_leaves_the_result_comes_first():
    start = setup(config=DEEP)
    change = advised(start, 0.95 * start.forecast().total)
    assert change.same_result


def test_shorter_rows_are_the_last_resort():
    start = setup("chunked_loss+row_chunks+checkpointing+mezo", batch_size=1, length=512, config=WIDE_HEAD)
    change = advised(start, start.resized(length=100).forecast().total)
    if change.what.startswith("cut"):
        assert change.max_length == 100
    bound = start.forecast().bytes["weights"]
    assert advised(start, 0.5 * bound).total > 0.5 * bound


def test_a_change_keeps_options_and_other_parts():
    start = dataclasses.replace(setup("lora", config=DEEP), kwargs={"lora": {"r": 4}})
    change = advised(start)
    assert "lora" in change.memory.split("+")
    assert change.memory_kwargs["lora"] == {"r": 4}


def test_what_cannot_run_is_not_advised():
    for device, offered in (("cpu", False), ("cuda", True)):
        start = setup(batch_size=1, length=512, config=DEEP, device=device)
        change = advised(start, 0.9 * start.forecast().total)
        assert ("offload" in change.memory) == offered  # it costs no FLOPs, and on a CPU there is no other memory
