"""The closed forms against torch's own counter, on the meta device with eager attention."""

import dataclasses
import timeit

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM as CausalLM
from transformers import AutoModelForSeq2SeqLM as Seq2SeqLM
from transformers import AutoModelForSequenceClassification as SequenceClassification
from transformers import BertConfig, GPT2Config, LlamaConfig, Qwen2Config, T5Config

from hf_eff.contracts.cost import BlockFacts, ModelFacts, TrainableFacts
from hf_eff.contracts.memory import BatchShape
from hf_eff.engines.facts import model_facts, trainable_facts
from hf_eff.engines.module_tree import find_blocks, output_head
from hf_eff.numerics.flops import (
    backward_flops,
    everything_trains,
    forward_flops,
    recompute_flops,
    training_flops,
)

ROWS, LENGTH, SOURCE = 2, 32, 24
TINY = {
    "vocab_size": 262,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
GPT2 = {"vocab_size": 262, "n_embd": 64, "n_layer": 3, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
DRY = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
T5 = {"vocab_size": 262, "d_model": 64, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}

FAMILIES = {
    "llama": lambda: (CausalLM, LlamaConfig(**TINY, num_key_value_heads=2, tie_word_embeddings=True)),
    "gpt2": lambda: (CausalLM, GPT2Config(**GPT2, **DRY)),
    "qwen2": lambda: (CausalLM, Qwen2Config(**TINY, num_key_value_heads=2)),
    "t5": lambda: (Seq2SeqLM, T5Config(**T5, d_kv=16, dropout_rate=0.0)),
    "bert": lambda: (
        SequenceClassification,
        BertConfig(**TINY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    ),
}
# The rotary table of Llama and Qwen2 is one small product that the closed form leaves out.
EXACT = 1e-4
# Left out of BERT: pooler and classifier, which read one position a row.
TOLERANCE = {"llama": EXACT, "gpt2": EXACT, "qwen2": EXACT, "t5": EXACT, "bert": 2e-3}


def build(family):
    auto, config = FAMILIES[family]()
    with torch.device("meta"):
        return auto.from_config(config, attn_implementation="eager").train()


def batch(model):
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long, device="meta")
    if model.config.model_type == "bert":
        return {"input_ids": ids}, BatchShape(ROWS, LENGTH)
    if model.config.is_encoder_decoder:
        source = torch.zeros(ROWS, SOURCE, dtype=torch.long, device="meta")
        inputs = {"input_ids": source, "decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids)}
        return {**inputs, "use_cache": False}, BatchShape(ROWS, LENGTH, SOURCE)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}, BatchShape(ROWS, LENGTH)


def counted(model, names=None):
    """Forward FLOPs, forward and backward FLOPs, and the shape, by the counter."""
    for name, parameter in model.named_parameters():
        if names is not None:
            parameter.requires_grad_(name in names)
    inputs, shape = batch(model)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(**inputs)
    with FlopCounterMode(display=False) as both:
        model(**inputs).logits.sum().backward()
    return forward.get_total_flops(), both.get_total_flops(), shape


def checkpoint(model):
    """Enable activation checkpointing under the name it has in the installed transformers."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def parts(model):
    """Names of everything, of each block, and of the output head."""
    names = [name for name, _ in model.named_parameters()]
    head = {id(parameter) for parameter in output_head(model).parameters()}
    yield "full", set(names)
    for block, _ in find_blocks(model):
        yield block, {name for name in names if name.startswith(f"{block}.")}
    yield "head", {name for name, parameter in model.named_parameters() if id(parameter) in head}


def plain(detailed):
    """The same without the places where a gradient need not go: it must never count too little."""
    names = [field.name for field in dataclasses.fields(TrainableFacts)]
    return TrainableFacts(**{name: getattr(detailed, name) for name in names})


@pytest.mark.parametrize("family", FAMILIES)
def test_full_blocks_and_head_match_the_counter(family):
    model = build(family)
    for part, names in parts(model):
        forward, both, shape = counted(model, names)
        facts = model_facts(model)
        assert facts.exact_flops
        assert forward_flops(facts, shape) == pytest.approx(forward, rel=TOLERANCE[family]), part
        assert training_flops(facts, shape) == pytest.approx(both, rel=TOLERANCE[family]), part
        assert training_flops(facts, shape, trainable_facts(model, names)) == training_flops(facts, shape), part
        assert training_flops(facts, shape, plain(facts.trainable)) >= both * (1 - TOLERANCE[family]), part


LORA = {
    "llama-qv": ("llama", {"target_modules": ["q_proj", "v_proj"]}, 1e-2),
    "llama-all": ("llama", {"target_modules": "all-linear"}, EXACT),
    "gpt2-all": ("gpt2", {"target_modules": "all-linear", "fan_in_fan_out": True}, EXACT),
    "bert-qv": ("bert", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}, 1e-2),
    "t5-qv": ("t5", {"target_modules": ["q", "v"]}, 1e-2),
}


@pytest.mark.parametrize("case", LORA)
def test_lora_matches_the_counter(case):
    peft = pytest.importorskip("peft")
    family, options, tolerance = LORA[case]
    with torch.device("meta"):
        model = peft.get_peft_model(build(family), peft.LoraConfig(r=8, lora_dropout=0.0, **options)).train()
    forward, both, shape = counted(model)
    facts = model_facts(model)
    assert facts.is_peft
    assert forward_flops(facts, shape) == pytest.approx(forward, rel=tolerance)
    assert training_flops(facts, shape) == pytest.approx(both, rel=tolerance)
    base = model_facts(build(family))
    assert forward_flops(facts, shape) > forward_flops(base, shape)  # adapters multiply tokens too


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_of_all_blocks_matches_the_counter(family):
    model = build(family)
    checkpoint(model)
    _, both, shape = counted(model)
    facts = model_facts(model)
    assert facts.trainable.lowest_block == -1
    predicted = training_flops(facts, shape) + recompute_flops(facts, shape)
    assert predicted == pytest.approx(both, rel=TOLERANCE[family])


def test_checkpointing_of_one_block_recomputes_only_from_there():
    model = build("llama")
    checkpoint(model)
    top = {name for name, _ in model.named_parameters() if ".layers.2." in name}
    assert trainable_facts(model, top).lowest_block == -1  # the hook that enabling checkpointing leaves
    model.disable_input_require_grads()
    _, both, shape = counted(model, top)
    facts = model_facts(model)
    assert facts.trainable.lowest_block == 2
    assert training_flops(facts, shape) + recompute_flops(facts, shape) == pytest.approx(both, rel=EXACT)


def test_smollm2_ratios():
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = CausalLM.from_config(config, attn_implementation="eager")
    facts, shape = model_facts(model), BatchShape(2, 256)
    names = [name for name, _ in model.named_parameters()]

    def ratio(*wanted):
        chosen = [name for name in names if any(part in name for part in wanted)]
        return training_flops(facts, shape, trainable_facts(model, chosen)) / forward_flops(facts, shape)

    # Counted by torch's flop counter for this model at 2 x 256 tokens.
    assert forward_flops(facts, shape) == pytest.approx(1.4677e11, rel=5e-5)
    assert training_flops(facts, shape) / forward_flops(facts, shape) == pytest.approx(3.0)
    assert ratio("layers.29.") == pytest.approx(1.2510, abs=5e-5)
    assert ratio("layers.15.") == pytest.approx(1.6543, abs=5e-5)
    assert ratio("layers.0.") == pytest.approx(2.0864, abs=5e-5)
    assert ratio("layers.0.", "layers.1.", "layers.2.") == pytest.approx(2.1358, abs=5e-5)
    assert ratio("model.norm") == pytest.approx(1.1975, abs=5e-5)
    assert ratio("embed_tokens") == pytest.approx(2.2593, abs=5e-5)
    recomputed = training_flops(facts, shape) + recompute_flops(facts, shape)
    assert recomputed / forward_flops(facts, shape) == pytest.approx(3.6173, abs=5e-5)


def toy_facts(**changes):
    block = BlockFacts(params=130, matmul_params=120, attention_width=8)
    options = {
        "architecture": "toy",
        "params": 500,
        "blocks": (block, block),
        "head_matmul_params": 80,
        "embedding_params": 80,
        "hidden_size": 8,
        "vocab_size": 10,
        **changes,
    }
    return ModelFacts(**options)


@given(
    rows=st.integers(1, 8),
    length=st.integers(1, 100),
    lowest=st.integers(-1, 2),
    entries=st.tuples(st.integers(0, 120), st.integers(0, 120)),
)
def test_literal_formula(rows, length, lowest, entries):
    trainable = TrainableFacts(
        params=1 + sum(entries), lowest_block=lowest, block_matmul_params=entries, head_matmul_params=0
    )
    tokens, attention = rows * length, 4 * rows * 8 * length**2
    forward = 2 * (2 * tokens * 120 + attention) + 2 * tokens * 80
    backward = 2 * tokens * 80 + sum(2 * tokens * each for each in entries)
    for index in (0, 1):
        if index >= lowest:
            backward += 2 * tokens * 120 + 2 * attention
    assert forward_flops(toy_facts(), BatchShape(rows, length)) == forward
    assert backward_flops(toy_facts(), BatchShape(rows, length), trainable) == backward


def test_packed_rows_attend_inside_documents():
    whole = forward_flops(toy_facts(), BatchShape(1, 10))
    packed = forward_flops(toy_facts(), BatchShape(1, 10, packed_lengths=(3, 7)))
    assert whole - packed == 2 * 4 * 8 * (10**2 - 3**2 - 7**2)


def test_trainable_part_defaults_to_the_facts_then_to_everything():
    shape, nothing = BatchShape(2, 5), TrainableFacts(params=0, lowest_block=2, block_matmul_params=(0, 0))
    assert backward_flops(toy_facts(), shape) == 2 * forward_flops(toy_facts(), shape)
    assert backward_flops(toy_facts(), shape, everything_trains(toy_facts())) == 2 * forward_flops(toy_facts(), shape)
    assert backward_flops(toy_facts(trainable=nothing), shape) == 0
    assert recompute_flops(toy_facts(trainable=nothing), shape) == 0


def test_equal_facts_of_other_models_do_not_share_a_count():
    shape = BatchShape(1, 4)
    wide = BlockFacts(params=240, matmul_params=240, attention_width=8)
    counts = [forward_flops(toy_facts(blocks=(block,)), shape) for block in (wide, toy_facts().blocks[0])] * 2
    assert counts[0] == counts[2] != counts[1] == counts[3]


def test_pricing_a_batch_takes_less_than_50_microseconds():
    block = BlockFacts(params=130, matmul_params=120, attention_width=8)
    facts, shape = toy_facts(blocks=(block,) * 80), BatchShape(8, 512)
    training_flops(facts, shape)
    assert min(timeit.repeat(lambda: training_flops(facts, shape), number=100, repeat=5)) / 100 < 50e-6
