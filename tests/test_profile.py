import json

import pytest
import torch
from transformers import LlamaConfig

from hf_eff import profile_memory
from hf_eff.contracts.cost import MEMORY_TERMS
from hf_eff.errors import OptionError, UnknownMethodError
from hf_eff.testing.tiny import tiny_config, tiny_model


@pytest.fixture(scope="module")
def smollm():
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )


def test_table_of_a_configuration(smollm):
    state = torch.random.get_rng_state()
    table = profile_memory(smollm, memory=["full", "badam"], batch_size=2, max_length=256)
    assert torch.equal(torch.random.get_rng_state(), state)
    full, badam = table.rows
    assert full["memory"] == "full"
    assert full["weights"] == pytest.approx(513 * 2**20, rel=0.002)
    assert full["optimizer"] == 2 * full["gradients"]
    assert full["total"] == sum(full[term] for term in MEMORY_TERMS)
    assert full["binding"] == "optimizer"
    assert badam["gradients"] == pytest.approx(13.5 * 2**20, rel=0.01)
    assert badam["activations"] == pytest.approx(532 * 2**20, rel=0.01)  # of the lowest block, the costliest
    assert badam["binding"] == "activations"
    assert badam["total"] < full["total"] / 2


def test_a_model_and_its_configuration_agree():
    model = profile_memory(tiny_model(), memory=["full", "mezo"], max_length=64)
    config = profile_memory(tiny_config(), memory=["full", "mezo"], max_length=64)
    assert model == config
    assert model.rows[1]["gradients"] == model.rows[1]["activations"] == 0


def test_text_has_one_aligned_line_a_method(smollm):
    text = str(profile_memory(smollm, memory=["full", "badam"], batch_size=2, max_length=256))
    head, names, *lines = text.splitlines()
    assert head == "LlamaForCausalLM, 134.5M parameters, 2 x 256 tokens"
    assert names.split() == ["memory", *MEMORY_TERMS, "total", "binding"]
    assert [line.split()[0] for line in lines] == ["full", "badam"]
    assert "513.13 MiB" in lines[0]
    assert len({line.rindex("iB  ") for line in lines}) == 1


def test_mapping_is_json():
    table = profile_memory(tiny_config(), memory="full", batch_size=3, max_length=8)
    values = json.loads(json.dumps(table.to_dict()))
    assert (values["batch_size"], values["max_length"], len(values["rows"])) == (3, 8, 1)


def test_checkpointing_and_autocast_change_activations(smollm):
    thin = profile_memory(smollm, ["full"], 2, 256, activation_checkpointing=True).rows[0]
    assert thin["activations"] == pytest.approx(133 * 2**20, rel=0.01)
    plain = profile_memory(smollm, ["full"], 32, 256).rows[0]
    half = profile_memory(smollm, ["full"], 32, 256, bf16=True).rows[0]
    assert 0.5 < half["activations"] / plain["activations"] < 0.8  # logits stay in four bytes


def test_composition(smollm):
    lora, both = profile_memory(smollm, memory=["lora", "lora+badam"], batch_size=2, max_length=256).rows
    assert both["weights"] == lora["weights"]
    assert both["optimizer"] < lora["optimizer"] / 10


def test_a_method_that_cannot_run_says_why():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    table = profile_memory(model, memory=["lora", "full"], max_length=8)
    assert "PEFT" in table.rows[0]["refused"]
    assert "PEFT" in str(table)
    assert table.rows[1]["total"] > 0


def test_wrong_input_is_told():
    with pytest.raises(UnknownMethodError, match="Did you mean 'badam'"):
        profile_memory(tiny_config(), memory=["badm"])
    with pytest.raises(OptionError, match="at least 1"):
        profile_memory(tiny_config(), batch_size=0)
