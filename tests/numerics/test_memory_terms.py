"""The closed forms against measured anchors of SmolLM2-135M and against live measurements of toy models."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from hf_eff.contracts.cost import MEMORY_TERMS, Facts, HardwareFacts, PoolFacts, RunFacts, TrainableFacts
from hf_eff.engines.facts import model_facts, model_facts_from_config
from hf_eff.engines.tensor_facts import with_details
from hf_eff.hardware.memory_meter import MemoryMeter
from hf_eff.numerics.memory_terms import (
    activation_bytes,
    block_bytes_per_token,
    host_bytes,
    largest_gradient_params,
    training_bytes,
)
from hf_eff.testing.tiny import tiny_config, tiny_model

MIB = 2**20
TOKENS = 512


@pytest.fixture(scope="module")
def smollm():
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return model_facts_from_config(config)


def facts_of(model, **run):
    options = {"batch_size": 2, "length": 256, **run}
    return Facts(model=model, pool=PoolFacts(num_rows=None, mean_tokens=0, max_tokens=0), run=RunFacts(**options))


def one_block(model, index):
    sizes = [0] * len(model.blocks)
    sizes[index] = model.blocks[index].matmul_params
    return TrainableFacts(params=model.blocks[index].params, lowest_block=index, block_matmul_params=tuple(sizes))


def with_adapters(model, rank=8):
    widths = (576 + 576) * 2 + (576 + 192) * 2 + (576 + 1536) * 3
    blocks = tuple(
        dataclasses.replace(block, matmul_params=block.matmul_params + rank * widths) for block in model.blocks
    )
    trainable = TrainableFacts(params=30 * rank * widths, lowest_block=0, block_matmul_params=(rank * widths,) * 30)
    return dataclasses.replace(model, blocks=blocks, trainable=trainable, is_peft=True)


# MiB that autograd was measured to keep of one layer at 512 tokens in fp32, by the state of the layer.
@pytest.mark.parametrize(("form", "measured"), [("trained", 21.9), ("frozen", 14.3)])
def test_layer_of_smollm2(smollm, form, measured):
    predicted = TOKENS * block_bytes_per_token(smollm, smollm.blocks[0], form) / MIB
    assert predicted == pytest.approx(measured, rel=0.01)


def test_layer_of_smollm2_with_adapters(smollm):
    adapted = with_adapters(smollm)
    size = adapted.trainable.block_matmul_params[0]
    predicted = TOKENS * block_bytes_per_token(adapted, adapted.blocks[0], "adapters", adapter_params=size) / MIB
    assert predicted == pytest.approx(19.6, rel=0.01)


# MiB of saved activations measured over whole steps of SmolLM2-135M at 2 x 256 tokens.
@pytest.mark.parametrize(
    ("build", "run", "measured"),
    [
        (lambda model: model.trainable, {}, 753),
        (lambda model: model.trainable, {"checkpointing": True}, 133),
        (lambda model: one_block(model, 29), {}, 118),
        (lambda model: one_block(model, 15), {}, 318),
        (lambda model: one_block(model, 0), {}, 532),
    ],
)
def test_step_of_smollm2(smollm, build, run, measured):
    predicted = activation_bytes(facts_of(smollm, **run), build(smollm)) / MIB
    assert predicted == pytest.approx(measured, rel=0.01)


def test_lora_step_of_smollm2(smollm):
    adapted = with_adapters(smollm)
    assert activation_bytes(facts_of(adapted), adapted.trainable) / MIB == pytest.approx(685, rel=0.01)


def test_terms_of_smollm2(smollm):
    terms = training_bytes(facts_of(smollm))
    assert tuple(terms) == MEMORY_TERMS
    assert terms["weights"] / MIB == pytest.approx(513, rel=0.002)
    assert terms["gradients"] / MIB == pytest.approx(513, rel=0.002)
    assert terms["optimizer"] / MIB == pytest.approx(1026, rel=0.002)
    assert sum(terms.values()) / MIB > 2515  # measured peak of the process


def test_forward_only_methods(smollm):
    terms = training_bytes(
        facts_of(smollm), gradient_params=0, optimizer_params=0, saves_activations=False, transient_bytes=7e6
    )
    logits = TOKENS * 49152 * 4
    assert terms["gradients"] == terms["optimizer"] == terms["activations"] == 0
    assert terms["rest"] == 7e6 + 2 * logits


def test_gradients_and_states_can_be_fewer(smollm):
    terms = training_bytes(facts_of(smollm, optimizer_bytes=2.0), gradient_params=10, optimizer_params=20)
    assert (terms["gradients"], terms["optimizer"]) == (40, 40)


def test_length_falls_back_to_the_longest_row(smollm):
    pool = PoolFacts(num_rows=5, mean_tokens=10, max_tokens=256)
    by_pool = Facts(model=smollm, pool=pool, run=RunFacts(batch_size=2))
    assert training_bytes(by_pool) == training_bytes(facts_of(smollm))


def test_nothing_trains_nothing_is_kept(smollm):
    nothing = TrainableFacts(params=0, lowest_block=30, block_matmul_params=(0,) * 30)
    terms = training_bytes(facts_of(smollm), nothing)
    assert terms["gradients"] == terms["optimizer"] == terms["activations"] == 0


# -- what changes a run ----------------------------------------------------------------------------------------------


def test_every_second_layer_checkpointed_keeps_the_others_whole(smollm):
    whole = activation_bytes(facts_of(smollm), smollm.trainable)
    every = activation_bytes(facts_of(smollm, checkpointing=True), smollm.trainable)
    second = activation_bytes(facts_of(smollm, checkpointing=True, checkpoint_every=2), smollm.trainable)
    assert second == pytest.approx((whole + every) / 2)
    assert activation_bytes(facts_of(smollm, checkpointing=True, checkpoint_every=40), smollm.trainable) < whole


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12))
def test_row_chunks_keep_the_largest_part(rows, chunks):
    model = model_facts_from_config(tiny_config())
    whole = training_bytes(facts_of(model, batch_size=rows, row_chunks=chunks))
    part = training_bytes(facts_of(model, batch_size=-(-rows // chunks)))
    assert whole["activations"] == part["activations"]
    assert whole["gradients"] == part["gradients"]
    assert whole["rest"] >= part["rest"]  # earlier parts' gradients are there all the time


def test_loss_in_chunks_keeps_states_and_the_heads_gradient_but_no_logits(smollm):
    whole = activation_bytes(facts_of(smollm), smollm.trainable)
    chunked = activation_bytes(facts_of(smollm, loss_tokens=64), smollm.trainable)
    logits, head = TOKENS * 49152 * 4, 49152 * 576 * 4
    assert whole - chunked == logits - head
    top = one_block(smollm, 29)  # a frozen head has no gradient to keep; the states have
    saved = activation_bytes(facts_of(smollm), top) - activation_bytes(facts_of(smollm, loss_tokens=64), top)
    assert saved == logits - TOKENS * 576 * 4
    assert training_bytes(facts_of(smollm, loss_tokens=64), top)["rest"] < 0.5 * logits


def test_offloading_moves_layers_to_the_host_of_an_accelerator(smollm):
    facts = facts_of(smollm, offload=True)
    assert (training_bytes(facts), host_bytes(facts)) == (training_bytes(facts_of(smollm)), 0)
    on_cuda = facts.replace(hardware=HardwareFacts(device="cuda"))
    stays = on_cuda.replace(run=dataclasses.replace(facts.run, offload=False))
    moved = training_bytes(stays)["activations"] - training_bytes(on_cuda)["activations"]
    assert host_bytes(on_cuda) == pytest.approx(moved)
    assert training_bytes(on_cuda)["activations"] < 110 * MIB  # the logits stay
    assert host_bytes(on_cuda, saves_activations=False) == 0


def test_paged_states_wait_on_the_host_of_an_accelerator():
    model = with_details(model_facts(tiny_model(width=512)), tiny_model(width=512))
    facts = facts_of(model, optim="paged_adamw_32bit").replace(hardware=HardwareFacts(device="cuda"))
    assert host_bytes(facts) > 0.9 * 8 * model.params
    assert training_bytes(facts)["optimizer"] + host_bytes(facts) == pytest.approx(8 * model.params)


def test_masters_and_absolute_states(smollm):
    half = dataclasses.replace(smollm, param_bytes=2.0, weight_bytes=2 * smollm.params)
    assert training_bytes(facts_of(half), master_weights=True)["optimizer"] == pytest.approx(12 * smollm.params, 1e-4)
    assert training_bytes(facts_of(smollm), master_weights=True)["optimizer"] == pytest.approx(8 * smollm.params, 1e-4)
    assert training_bytes(facts_of(smollm), optimizer_bytes=5.0)["optimizer"] == 5


def test_an_optimizer_that_works_in_the_backward_holds_one_gradient(smollm):
    for optim in ("lomo", "adalomo", "galore_adamw_layerwise"):
        terms = training_bytes(facts_of(smollm, optim=optim, optim_target_modules="all-linear"))
        assert terms["gradients"] == 4 * 49152 * 576 == 4 * largest_gradient_params(facts_of(smollm))


def test_accumulated_gradients_stand_beside_activations(smollm):
    once = sum(training_bytes(facts_of(smollm)).values())
    twice = sum(training_bytes(facts_of(smollm, accumulation=2)).values())
    assert twice > once
    named = training_bytes(facts_of(smollm, accumulation=2))
    assert named["rest"] == 2 * TOKENS * 49152 * 4


# -- against live measurements ---------------------------------------------------------------------------------------


def freeze_all_but(model, part):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in name)
    return model


def adapted(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))


def checkpointed(model):
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    return model


def measure(model, length, *, autocast=False):
    """Terms of two real steps of AdamW."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=False)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 262, (2, length), generator=generator)
    meter = MemoryMeter(model)
    for _ in range(2):
        with meter.forward_backward():
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
            loss.backward()
        optimizer.step()
        meter.observe(optimizer)
        optimizer.zero_grad()
    return meter.peak_bytes()


MODES = {
    "full": (lambda model: model, {}),
    "bottom block": (lambda model: freeze_all_but(model, ".layers.0."), {}),
    "middle block": (lambda model: freeze_all_but(model, ".layers.2."), {}),
    "top block": (lambda model: freeze_all_but(model, ".layers.3."), {}),
    "lora": (adapted, {}),
    "checkpointing": (checkpointed, {"checkpointing": True}),
    "bf16 weights": (lambda model: model.to(torch.bfloat16), {"optimizer_bytes": 4.0}),
    "lora on bf16 weights": (lambda model: adapted(model.to(torch.bfloat16)), {}),
    "autocast": (lambda model: model, {"compute_bytes": 2.0, "bf16": True}),
    "lora under autocast": (adapted, {"compute_bytes": 2.0, "bf16": True}),
}


@pytest.mark.parametrize("mode", MODES)
def test_predicted_equals_measured(mode):
    change, run = MODES[mode]
    model = change(tiny_model(width=128, num_attention_heads=8).train())
    predicted = training_bytes(facts_of(model_facts(model), length=128, **run))
    measured = measure(model, 128, autocast=run.get("bf16", False))
    for term in ("weights", "gradients", "optimizer"):
        assert predicted[term] == pytest.approx(measured[term], rel=0.02), term
    assert predicted["activations"] == pytest.approx(measured["activations"], rel=0.08)
