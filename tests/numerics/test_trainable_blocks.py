"""Parts in plain numbers against what a partition of the model's own parameters says."""

import dataclasses
import itertools

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_eff.contracts.cost import TrainableFacts
from hf_eff.contracts.memory import BatchShape
from hf_eff.engines.block_partition import partition_model
from hf_eff.engines.facts import model_facts, trainable_facts
from hf_eff.engines.tensor_facts import tensor_facts
from hf_eff.numerics.flops import training_flops
from hf_eff.numerics.trainable_blocks import BlockLayout, always_trains, expected_draws, joined, trainable_blocks
from hf_eff.testing.tiny import tiny_model

OUTSIDE = {"embedding": "block", "norm": "block", "head": "block"}


def facts_of(model, *, tensors):
    """Facts with or without the list of trained tensors."""
    facts = model_facts(model)
    chosen = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    listed = tensor_facts(model, chosen) if tensors else ()
    return dataclasses.replace(facts, trainable=dataclasses.replace(facts.trainable, tensors=listed))


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=128, n_embd=16, n_layer=3, n_head=4, n_positions=32)
    )


def t5():
    sizes = {"d_model": 16, "d_ff": 32, "d_kv": 4, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=128, **sizes))


def mixtral():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(vocab_size=128, num_key_value_heads=2, num_local_experts=8, **sizes)
    )


def lora():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(tiny_model(layers=3, width=16), LoraConfig(r=2, target_modules="all-linear"))


MODELS = {
    "llama": lambda: tiny_model(layers=3, width=16, tie_word_embeddings=False),
    "tied": lambda: tiny_model(layers=3, width=16),
    "gpt2": gpt2,
    "t5": t5,
    "mixtral": mixtral,
    "lora": lora,
}
LAYOUTS = {
    "layer": BlockLayout(),
    "pairs": BlockLayout(layers_per_block=2, **OUTSIDE),
    "all-groups": BlockLayout(layers_per_block=2, group_outside=True, **OUTSIDE),
    "head-only": BlockLayout(norm="block", head="block"),
    "lisa": BlockLayout(embedding="always", norm="always", head="always"),
    "halves": BlockLayout(granularity="attn_mlp"),
    "matrices": BlockLayout(granularity="matrix"),
}


def parts_of(model, layout):
    """(parameters, lowest block, blocks with trained matrices) of each block and of what always trains."""
    candidates = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    partition = partition_model(model, candidates, layout)
    groups = [*partition.blocks, *([partition.always] if partition.always else [])]
    return [_described(trainable_facts(model, names)) for names in groups]


def _described(part):
    return part.params, part.lowest_block, tuple(entries > 0 for entries in part.block_matmul_params)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_listed_tensors_give_the_same_parts_as_the_partition(name, layout):
    model, layout = MODELS[name](), LAYOUTS[layout]
    facts = facts_of(model, tensors=True)
    always = always_trains(facts, layout)
    found = [_described(part) for part in [*trainable_blocks(facts, layout), *([always] if always else [])]]
    assert found == parts_of(model, layout)


@pytest.mark.parametrize("layout", ["layer", "pairs", "all-groups", "head-only", "lisa"])
@pytest.mark.parametrize("name", ["llama", "tied"])
def test_sizes_alone_give_the_same_parts_for_whole_layers(name, layout):
    model, layout = MODELS[name](), LAYOUTS[layout]
    facts = facts_of(model, tensors=False)
    always = always_trains(facts, layout)
    found = [_described(part) for part in [*trainable_blocks(facts, layout), *([always] if always else [])]]
    assert found == parts_of(model, layout)


@pytest.mark.parametrize("name", MODELS)
def test_matrix_entries_of_all_blocks_add_up_to_the_models(name):
    facts = facts_of(MODELS[name](), tensors=True)
    for granularity in ("layer", "attn_mlp", "matrix"):
        whole = joined(trainable_blocks(facts, BlockLayout(granularity=granularity)))
        apart = [a - b for a, b in zip(whole.block_matmul_params, facts.trainable.block_matmul_params, strict=True)]
        assert max(map(abs, apart)) <= 5  # each piece is rounded
    assert sum(part.params for part in trainable_blocks(facts)) == whole.params


def test_custom_blocks_and_always_active_follow_names():
    model = MODELS["tied"]()
    layout = BlockLayout(custom=("layers.2+model.norm", "layers.0.mlp"), always_active=("layers.1.self_attn",))
    facts = facts_of(model, tensors=True)
    always = always_trains(facts, layout)
    assert [_described(part) for part in [*trainable_blocks(facts, layout), always]] == parts_of(model, layout)
    # Without a list of tensors a named block is charged as all layers: too high, never too low.
    upper = trainable_blocks(facts_of(model, tensors=False), layout)
    assert [part.lowest_block for part in upper] == [0, 0]
    assert all(part.params >= own for part, (own, *_) in zip(upper, parts_of(model, layout), strict=False))


def test_names_count_the_layers_of_each_stack():
    model = t5()
    layout = BlockLayout(custom=("encoder.block.1", "decoder.block.1"))
    parts = trainable_blocks(facts_of(model, tensors=True), layout)
    assert [part.lowest_block for part in parts] == [1, 3]
    assert [_described(part)[0] for part in parts] == [own for own, *_ in parts_of(model, layout)]


# -- draws


@given(sizes=st.lists(st.integers(1, 50).map(lambda n: 1000 * n), min_size=1, max_size=7), data=st.data())
@settings(max_examples=40, deadline=None)
def test_mean_over_draws_equals_the_sum_over_all_of_them(sizes, data):
    active = data.draw(st.integers(1, len(sizes)))
    model = model_facts(tiny_model(layers=len(sizes), width=8))
    blocks = [
        TrainableFacts(
            params=size, lowest_block=index, block_matmul_params=tuple(size * (i == index) for i in range(len(sizes)))
        )
        for index, size in enumerate(sizes)
    ]
    shape = BatchShape(rows=2, length=7)
    draws = [joined([blocks[i] for i in draw]) for draw in itertools.combinations(range(len(sizes)), active)]
    expected = sum(training_flops(model, shape, draw) for draw in draws) / len(draws)
    weighted = expected_draws(blocks, active)
    assert sum(weight for weight, _ in weighted) == len(draws)
    found = sum(weight * training_flops(model, shape, part) for weight, part in weighted) / len(draws)
    assert found == pytest.approx(expected, rel=1e-3)
