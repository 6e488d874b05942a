import dataclasses

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    GemmaConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3MoeConfig,
    T5Config,
)

from hf_eff.engines.facts import (
    batch_shape,
    model_facts,
    model_facts_from_config,
    pool_facts,
    token_counts,
    trainable_facts,
)
from hf_eff.engines.module_tree import encoder_blocks, find_blocks, input_embedding, output_head
from hf_eff.errors import DataError, OptionError
from hf_eff.testing.tiny import tiny_config, tiny_model, tiny_pool, tiny_tokenizer, tokenised

SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
GQA = {**SIZES, "num_key_value_heads": 1}
IDS = {"bos_token_id": 1, "eos_token_id": 2}
OPT = {"vocab_size": 99, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
T5 = {"vocab_size": 99, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2, "d_kv": 16}
BART = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}
CAUSAL, SEQ2SEQ, CLASSIFIER = AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
# Auto class, configuration, names of the stacks, entries of the matrices in one (decoder) block.
FAMILIES = {
    "llama": (CAUSAL, lambda: LlamaConfig(**GQA), ["model.layers"], 32 * (32 + 16 + 16 + 32) + 3 * 32 * 48),
    "qwen2": (CAUSAL, lambda: Qwen2Config(**GQA), ["model.layers"], 32 * (32 + 16 + 16 + 32) + 3 * 32 * 48),
    "gpt2": (
        CAUSAL,
        lambda: GPT2Config(vocab_size=99, n_embd=32, n_layer=3, n_head=2, **IDS),
        ["transformer.h"],
        12 * 32 * 32,
    ),
    "opt": (
        CAUSAL,
        lambda: OPTConfig(**OPT, word_embed_proj_dim=32),
        ["model.decoder.layers"],
        4 * 32 * 32 + 2 * 32 * 48,
    ),
    "phi": (CAUSAL, lambda: PhiConfig(**SIZES), ["model.layers"], 4 * 32 * 32 + 2 * 32 * 48),
    "gemma": (CAUSAL, lambda: GemmaConfig(**GQA, head_dim=24), ["model.layers"], 32 * (48 * 2 + 24 * 2) + 3 * 32 * 48),
    "bert": (CLASSIFIER, lambda: BertConfig(**SIZES), ["bert.encoder.layer"], 4 * 32 * 32 + 2 * 32 * 48),
    "t5": (SEQ2SEQ, lambda: T5Config(**T5), ["encoder.block", "decoder.block"], 6 * 32 * 32 + 2 * 32 * 48),
    "bart": (
        SEQ2SEQ,
        lambda: BartConfig(**BART),
        ["model.encoder.layers", "model.decoder.layers"],
        6 * 32 * 32 + 2 * 32 * 48,
    ),
}


def build(family):
    auto, config, *_ = FAMILIES[family]
    with torch.device("meta"):
        return auto.from_config(config())


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_and_shapes(family):
    _, _, stacks, entries = FAMILIES[family]
    model = build(family)
    names = [name for name, _ in find_blocks(model)]
    counts = [3] if len(stacks) == 1 else [2, 3]
    assert names == [f"{stack}.{i}" for stack, count in zip(stacks, counts, strict=True) for i in range(count)]
    facts = model_facts(model)
    assert facts.params == sum(parameter.numel() for parameter in model.parameters())
    assert facts.blocks[-1].matmul_params == entries
    assert facts.blocks[-1].params == sum(parameter.numel() for parameter in find_blocks(model)[-1][1].parameters())
    assert facts.blocks[-1].attention_width == (48 if family == "gemma" else 32)
    assert facts.intermediate_size == (128 if family == "gpt2" else 48)
    assert (facts.hidden_size, facts.vocab_size) == (32, 99)
    assert facts.exact_flops


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoder(family):
    model = build(family)
    facts = model_facts(model)
    assert encoder_blocks(model) == 2
    assert facts.is_encoder_decoder
    assert not facts.is_causal_lm
    assert [block.stream for block in facts.blocks] == ["encoder"] * 2 + ["decoder"] * 3
    assert [block.cross_width for block in facts.blocks] == [0, 0, 32, 32, 32]
    assert [block.cross_matmul_params for block in facts.blocks] == [0, 0] + [2 * 32 * 32] * 3  # keys and values


def test_heads_count_where_they_see_every_token():
    assert model_facts(build("llama")).head_matmul_params == 99 * 32
    assert model_facts(build("bert")).head_matmul_params == 0  # pooler and classifier read one position a row
    assert output_head(build("bert")).out_features == 2
    assert input_embedding(build("bert")).num_embeddings == 99


def test_tied_embeddings_count_once():
    tied = model_facts(tiny_model())
    untied = model_facts(tiny_model(tie_word_embeddings=False))
    assert tied.tied_embeddings
    assert not untied.tied_embeddings
    assert untied.params - tied.params == untied.embedding_params == 262 * 64
    assert untied.weight_bytes - tied.weight_bytes == 4 * 262 * 64
    assert untied.head_matmul_params == tied.head_matmul_params == 262 * 64


def test_projections_outside_blocks_make_the_count_an_estimate():
    config = OPTConfig(**OPT, word_embed_proj_dim=16)
    with torch.device("meta"):
        facts = model_facts(AutoModelForCausalLM.from_config(config))
    assert not facts.exact_flops
    assert facts.head_matmul_params == 99 * 16 + 2 * 32 * 16


def test_experts_count_as_visited():
    config = Qwen3MoeConfig(**GQA, head_dim=16, moe_intermediate_size=8, num_experts=8, num_experts_per_tok=2)
    with torch.device("meta"):
        facts = model_facts(AutoModelForCausalLM.from_config(config))
    attention, experts, router = 32 * (32 + 16 + 16 + 32), 8 * 3 * 32 * 8, 32 * 8
    assert facts.blocks[0].matmul_params == attention + experts * 2 // 8 + router
    assert not facts.exact_flops


def test_shared_layers_count_as_often_as_they_run():
    config = AlbertConfig(**SIZES, embedding_size=16)
    with torch.device("meta"):
        facts = model_facts(AlbertForMaskedLM(config))
    assert len(facts.blocks) == 1
    assert facts.blocks[0].matmul_params == 3 * (4 * 32 * 32 + 2 * 32 * 48)
    assert not facts.exact_flops


def test_an_unknown_module_is_estimated_not_ignored():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.zeros(8, 8))
            self.scale = nn.Parameter(torch.zeros(8))

    model = nn.Sequential(nn.Embedding(5, 8), nn.ModuleList([Odd(), Odd()]))
    facts = model_facts(model)
    assert [block.matmul_params for block in facts.blocks] == [64, 64]
    assert not facts.exact_flops


@pytest.mark.parametrize("family", FAMILIES)
def test_from_config_equals_the_model_and_leaves_the_generator(family):
    config = FAMILIES[family][1]()
    model = build(family)
    config.architectures = [type(model).__name__]
    state = torch.random.get_rng_state()
    assert model_facts_from_config(config) == model_facts(model)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_what_an_activation_function_saves_is_counted_without_memory_too():
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=16)
    facts, filled = model_facts_from_config(config), model_facts(GPT2LMHeadModel(config))
    assert facts.blocks == filled.blocks
    assert filled.blocks[0].activation_copies > 1  # the tanh form keeps its parts


def test_from_config_without_architectures_takes_the_usual_class():
    assert model_facts_from_config(tiny_config()) == model_facts(tiny_model())
    assert model_facts_from_config(BertConfig(**SIZES)).architecture == "BertForMaskedLM"
    assert model_facts_from_config(T5Config(**T5)).architecture == "T5ForConditionalGeneration"
    assert (
        model_facts_from_config(tiny_config(), dtype=torch.bfloat16).weight_bytes
        < model_facts(tiny_model()).params * 2.1
    )
    with pytest.raises(OptionError, match="describes no model"):
        model_facts_from_config(nn.Module())


def lora(model, **options):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options))


def test_peft():
    base, model = model_facts(tiny_model()), lora(tiny_model(), target_modules=["q_proj", "v_proj"])
    facts = model_facts(model)
    adapters = 4 * (64 + 64) + 4 * (64 + 32)
    assert [name for name, _ in find_blocks(model)] == [f"base_model.model.model.layers.{i}" for i in range(4)]
    assert facts.is_peft
    assert facts.is_causal_lm
    assert facts.params == base.params + 4 * adapters
    assert facts.blocks[0].matmul_params == base.blocks[0].matmul_params + adapters
    assert facts.trainable.params == 4 * adapters
    assert facts.trainable.block_matmul_params == (adapters,) * 4
    assert facts.trainable.lowest_block == 0


def test_adapters_that_are_off_multiply_nothing():
    model, base = lora(tiny_model(), target_modules="all-linear"), model_facts(tiny_model())
    model.add_adapter("second", model.peft_config["default"])
    with_one = model_facts(model).blocks[0].matmul_params
    assert with_one > base.blocks[0].matmul_params
    with model.disable_adapter():
        assert model_facts(model).blocks[0].matmul_params == base.blocks[0].matmul_params
    saved = lora(tiny_model(tie_word_embeddings=False), target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert model_facts(saved).head_matmul_params == base.head_matmul_params
    assert model_facts(saved).trainable.head_matmul_params == base.head_matmul_params


def test_packed_weights_count_at_the_size_they_stand_for():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny_model()
    plain = model_facts(model)
    for _, block in find_blocks(model):
        old = block.mlp.up_proj
        new = bitsandbytes.nn.Linear4bit(64, 128, bias=False, quant_type="nf4")
        new.weight = bitsandbytes.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
        if new.weight.dtype != torch.uint8:
            new.weight = new.weight._quantize("cpu")
        block.mlp.up_proj = new
    facts = model_facts(model)
    assert find_blocks(model)[0][1].mlp.up_proj.weight.numel() == 64 * 128 // 2
    assert facts.is_quantized
    assert facts.params == plain.params
    assert facts.blocks == plain.blocks
    scales, codes, nested = 128, 16 * 4, 256 * 4 + 4 + 4  # a byte for 64 entries; both code tables; offset and scale
    saved = 4 * 64 * 128 - 64 * 128 // 2 - scales - codes - nested
    assert plain.weight_bytes - facts.weight_bytes == 4 * saved


def names_with(model, *parts):
    return [name for name, _ in model.named_parameters() if any(part in name for part in parts)]


@pytest.mark.parametrize(
    ("parts", "lowest"),
    [
        (["layers.2."], 2),
        (["layers.1.", "layers.3."], 1),
        (["model.norm"], 4),
        (["embed_tokens"], -1),
        (["layers.3.", "embed_tokens"], -1),
        ([], 4),
    ],
)
def test_lowest_block(model, parts, lowest):
    facts = trainable_facts(model, names_with(model, *parts))
    assert facts.lowest_block == lowest
    assert facts.params == sum(model.get_parameter(name).numel() for name in names_with(model, *parts))


def test_lowest_block_between_and_outside_stacks():
    t5, gpt2 = build("t5"), build("gpt2")
    assert trainable_facts(t5, names_with(t5, "encoder.final_layer_norm")).lowest_block == 1
    assert trainable_facts(t5, names_with(t5, "decoder.final_layer_norm")).lowest_block == 5
    assert trainable_facts(gpt2, names_with(gpt2, "wpe")).lowest_block == -1
    opt = build("opt")
    assert trainable_facts(opt, ["model.decoder.final_layer_norm.weight"]).lowest_block == 3
    bart = build("bart")
    assert trainable_facts(bart, names_with(bart, "encoder.layernorm_embedding")).lowest_block == -1


def test_untied_head_alone_needs_no_input_gradient():
    model = tiny_model(tie_word_embeddings=False)
    head = trainable_facts(model, ["lm_head.weight"])
    assert (head.lowest_block, head.head_matmul_params, head.head_needs_input_gradient) == (4, 262 * 64, False)
    assert trainable_facts(model, ["lm_head.weight", "model.norm.weight"]).head_needs_input_gradient


def test_either_name_of_a_tied_parameter_will_do(model):
    first, second = "model.embed_tokens.weight", "lm_head.weight"
    assert (
        trainable_facts(model, [first]) == trainable_facts(model, [second]) == trainable_facts(model, [first, second])
    )


def test_requires_grad_is_the_default(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".layers.1." in name)
    assert (
        trainable_facts(model)
        == trainable_facts(model, names_with(model, ".layers.1."))
        == dataclasses.replace(model_facts(model).trainable, kept_inputs=(), tensors=())
    )


def test_forced_input_gradients_reach_below_every_block(model):
    model.enable_input_require_grads()
    assert trainable_facts(model, names_with(model, ".layers.3.")).lowest_block == -1
    model.disable_input_require_grads()
    assert trainable_facts(model, names_with(model, ".layers.3.")).lowest_block == 3


def test_an_unknown_name_is_refused(model):
    with pytest.raises(OptionError, match=r"'module\.x' is no parameter"):
        trainable_facts(model, ["module.x"])


def test_a_gradient_type_per_trainable_parameter():
    model = tiny_model().to(torch.bfloat16)
    assert model_facts(model).param_bytes == 2.0
    model.model.norm.to(torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "model.norm.weight")
    assert model_facts(model).param_bytes == 4.0


def shape_of(inputs, facts=None):
    return dataclasses.astuple(batch_shape(inputs, facts or model_facts(build("llama"))))


def ones(*shape):
    return torch.ones(*shape, dtype=torch.long)


def test_batch_shape():
    assert shape_of({"input_ids": ones(3, 7)}) == (3, 7, 0, ())
    assert shape_of({"inputs_embeds": torch.zeros(3, 7, 32)}) == (3, 7, 0, ())
    assert shape_of({"input_ids": ones(2, 4, 7)}) == (8, 7, 0, ())  # four choices a row
    with pytest.raises(DataError, match="needs input_ids"):
        shape_of({"labels": ones(3)})


def test_batch_shape_of_encoder_decoder():
    facts = model_facts(build("t5"))
    assert shape_of({"input_ids": ones(3, 7), "labels": ones(3, 5)}, facts) == (3, 5, 7, ())
    assert batch_shape({"input_ids": ones(3, 7), "decoder_input_ids": ones(3, 5)}, facts).tokens == 36
    with pytest.raises(DataError, match="labels or decoder_input_ids"):
        batch_shape({"input_ids": ones(3, 7)}, facts)


def test_packed_rows():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0]])
    ids = ones(1, 6)
    assert shape_of({"input_ids": ids, "position_ids": positions}) == (1, 6, 0, (3, 2, 1))
    assert shape_of({"input_ids": ids, "position_ids": positions, "attention_mask": ids}) == (1, 6, 0, ())
    assert shape_of({"input_ids": ids, "position_ids": torch.arange(6)[None]}) == (1, 6, 0, ())
    two = torch.tensor([[0, 1, 2], [0, 0, 1]])
    assert shape_of({"input_ids": ones(2, 3), "position_ids": two}) == (2, 3, 0, (3, 1, 2))
    flat = DataCollatorWithFlattening()([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])
    assert shape_of(flat) == (1, 5, 0, (3, 2))


def test_token_counts():
    inputs = {
        "input_ids": ones(2, 4),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]),
        "labels": torch.tensor([[5, 6, 7, -100], [-100, 6, -100, -100]]),
    }
    assert token_counts(inputs, is_causal_lm=True) == {
        "paid": 8,
        "useful": 5,
        "loss": 3,
    }  # the first label is no target
    assert token_counts(inputs, is_causal_lm=False) == {"paid": 8, "useful": 5, "loss": 4}
    assert token_counts({"input_ids": ones(2, 4)}, is_causal_lm=True) == {"paid": 8, "useful": 8, "loss": 0}
    classes = {"input_ids": ones(2, 4), "labels": torch.tensor([0, 1])}
    assert token_counts(classes, is_causal_lm=False)["loss"] == 2


def test_token_counts_agree_with_the_shape_of_encoder_decoder_batches():
    with torch.device("meta"):
        facts = model_facts(AutoModelForSeq2SeqLM.from_config(T5Config(**T5)))
    model = AutoModelForSeq2SeqLM.from_config(T5Config(**T5, decoder_start_token_id=0))
    rows = [{"input_ids": [5, 6, 7], "labels": [3, 4]}, {"input_ids": [5], "labels": [3, 4, 6, 7]}]
    inputs = DataCollatorForSeq2Seq(tiny_tokenizer(), model=model)(rows)
    counts = token_counts(inputs, is_causal_lm=False)
    assert counts == {"paid": batch_shape(inputs, facts).tokens, "useful": 4 + 8, "loss": 6}
    del inputs["decoder_input_ids"]  # the model makes them from the labels
    counts = token_counts(inputs, is_causal_lm=False, is_encoder_decoder=True)
    assert counts == {"paid": batch_shape(inputs, facts).tokens, "useful": 4 + 6, "loss": 6}


def test_pool_facts_of_tokenised_rows():
    rows = [{"input_ids": list(range(n)), "labels": list(range(n))} for n in (2, 4, 9)]
    for pool in (Dataset.from_list(rows), rows):
        facts = pool_facts(pool, rows[:2])
        assert (facts.num_rows, facts.mean_tokens, facts.max_tokens) == (3, 5.0, 9)
        assert (facts.num_reference, facts.mean_reference_tokens) == (2, 3.0)
        assert facts.columns == ("input_ids", "labels")
        assert not facts.streaming


def test_pool_facts_sample_evenly():
    lengths = [1] * 3000 + [3] * 3000
    facts = pool_facts(Dataset.from_dict({"length": lengths}))
    assert (facts.num_rows, facts.mean_tokens, facts.max_tokens) == (6000, 2.0, 3)


def test_quantiles_of_lengths_are_evenly_spaced():
    assert pool_facts([{"length": n} for n in (9, 2, 4)]).length_quantiles == (2, 4, 9)
    quantiles = pool_facts(Dataset.from_dict({"length": list(range(1000))[::-1]})).length_quantiles
    assert quantiles == tuple(range(5, 1000, 10))


def test_pool_facts_of_text_are_an_estimate_from_bytes():
    rows = [{"messages": [{"role": "user", "content": "äbcdefg"}], "n": 3}]
    assert pool_facts(Dataset.from_list(rows)).mean_tokens == (4 + 8) / 4
    assert pool_facts(tiny_pool()).mean_tokens > 0
    assert pool_facts(tokenised(tiny_pool())).max_tokens <= 64


def test_pool_facts_of_nothing_and_of_streams():
    assert pool_facts([]).num_rows == 0

    def rows():
        raise AssertionError("a stream must not be read")
        yield

    facts = pool_facts(IterableDataset.from_generator(rows))
    assert (facts.num_rows, facts.streaming, facts.mean_tokens) == (None, True, 0.0)
