"""Blocks of many model families, found from the module tree: disjoint, covering, trained one after the other."""

import pytest
import torch
import transformers
from torch import nn

from hf_eff.contracts.memory import OptimizerContext
from hf_eff.engines.block_partition import partition_model
from hf_eff.memory.badam import BAdam, BAdamConfig
from hf_eff.memory.hift import HiFT, HiFTConfig
from hf_eff.memory.lisa import LISA, LISAConfig
from hf_eff.numerics.trainable_blocks import BlockLayout
from hf_eff.testing.tiny import tiny_model


def small(config_class, **changes):
    options = {
        "vocab_size": 128,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
        "head_dim": 4,
    }
    return config_class(**{**options, **changes})


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=128, n_embd=16, n_layer=3, n_head=4, n_positions=32)
    )


def opt():
    options = {"ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.0}
    return transformers.OPTForCausalLM(small(transformers.OPTConfig, **options))


def bert():
    return transformers.BertForSequenceClassification(small(transformers.BertConfig, num_labels=3))


def t5():
    sizes = {"d_model": 16, "d_ff": 32, "d_kv": 4, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=128, decoder_start_token_id=0, **sizes)
    )


def gemma3():
    return transformers.Gemma3ForCausalLM(small(transformers.Gemma3TextConfig, sliding_window=16))


def mixtral():
    options = {"num_local_experts": 8, "num_experts_per_tok": 1}
    return transformers.MixtralForCausalLM(small(transformers.MixtralConfig, **options))


def lora():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        tiny_model(layers=3, width=16), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    )


FAMILIES = {
    "llama": lambda: transformers.LlamaForCausalLM(small(transformers.LlamaConfig)),
    "llama-tied": lambda: transformers.LlamaForCausalLM(small(transformers.LlamaConfig, tie_word_embeddings=True)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(small(transformers.Qwen2Config)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(small(transformers.Qwen3Config)),
    "gpt2": gpt2,
    "opt": opt,
    "phi": lambda: transformers.PhiForCausalLM(small(transformers.PhiConfig, num_key_value_heads=4)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(small(transformers.Gemma2Config)),
    "gemma3": gemma3,
    "bert": bert,
    "t5": t5,
    "mixtral": mixtral,
    "lora": lora,
}
LAYERS = {"t5": 5}
UNITS = {"gpt2": 4, "opt": 6, "phi": 6, "bert": 6, "mixtral": 7, "qwen2": 7}
"""Matrices of a layer (seven in most): fused queries, keys and values are one; so is a stack of experts."""


def built(family):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FAMILIES[family]().eval()


def batch(family, step):
    ids = torch.randint(3, 100, (2, 6), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": torch.tensor([0, 2]) if family == "bert" else ids}


def start(method, model, **changes):
    names = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    context = OptimizerContext(
        model=model,
        candidates=names,
        decay_names=names,
        optimizer_class=torch.optim.AdamW,
        optimizer_kwargs={"lr": 1e-2},
        weight_decay=0.0,
        stock=lambda: torch.optim.AdamW(trained, lr=1e-2),
        seed=0,
        **changes,
    )
    optimizer = method.create_optimizer(context)
    method.train_begin(model, 0)
    return optimizer


def steps(method, optimizer, model, family, count):
    """Names that move in each of ``count`` steps."""
    for step in range(count):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        method.step_begin(step)
        model(**batch(family, step)).loss.backward()
        optimizer.step()
        model.zero_grad()
        yield {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def candidates_of(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


# -- what the blocks are


EVERYTHING = {"embedding": "block", "norm": "block", "head": "block"}


@pytest.mark.parametrize("granularity", ["layer", "attn_mlp", "matrix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_disjoint_and_cover_every_candidate(family, granularity):
    model = built(family)
    partition = partition_model(model, candidates_of(model), BlockLayout(granularity=granularity, **EVERYTHING))
    placed = [name for block in partition.blocks for name in block]
    assert len(placed) == len(set(placed))
    assert set(placed) == set(candidates_of(model))
    assert partition.frozen == partition.always == ()
    tensors = [id(model.get_parameter(name)) for name in placed]
    assert len(tensors) == len(set(tensors))  # a tied tensor is in one block only
    inside = [label for label in partition.labels if label not in ("embedding", "head")]
    layers = LAYERS.get(family, 3)
    if family == "t5":  # self-attention, cross-attention and two feed-forward matrices; a table of positions a stack
        expected = {"layer": 5, "attn_mlp": 10, "matrix": 2 * 6 + 3 * 10 + 2}[granularity]
    else:
        expected = {"layer": layers, "attn_mlp": 2 * layers, "matrix": layers * UNITS.get(family, 7)}[granularity]
    assert len(inside) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_feed_forward_blocks_hold_no_attention_and_attention_blocks_hold_all_of_it(family):
    model = built(family)
    partition = partition_model(model, candidates_of(model), BlockLayout(granularity="attn_mlp"))
    kinds = {name: type(part).__name__.lower() for name, part in model.named_modules()}

    def attends(name):
        return any("attention" in kinds[name[:end]] for end, letter in enumerate(name) if letter == ".")

    for label, block in zip(partition.labels, partition.blocks, strict=True):
        assert block
        inner = [name for name in block if attends(name)]
        assert inner == [] if label.endswith("feed-forward") else inner


# -- every block trains, the others rest


@pytest.mark.parametrize("granularity", ["layer", "attn_mlp", "matrix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_of_badam_trains_and_no_other_moves(family, granularity):
    model = built(family)
    method = BAdam(
        BAdamConfig(
            switch_every=1, mode="ascending", granularity=granularity, include_embedding=True, include_head=True
        )
    )
    optimizer = start(method, model)
    blocks = method.switch.partition.blocks
    for block, moved in zip(blocks, steps(method, optimizer, model, family, len(blocks)), strict=True):
        assert moved <= set(block)
        idle = family == "mixtral" or (family == "lora" and all("lora_A" in name for name in block))
        assert moved or idle  # an expert may get no token
    method.train_end()
    assert candidates_of(model) == sorted({n for block in blocks for n in block}, key=candidates_of(model).index)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_group_of_hift_trains_once_a_sweep(family):
    model = built(family)
    method = HiFT(HiFTConfig(layers_per_group=2))
    optimizer = start(method, model)
    blocks = method.switch.partition.blocks
    moved = list(steps(method, optimizer, model, family, 2 * len(blocks)))
    for step, names in enumerate(moved):
        assert names
        assert names <= set(blocks[step % len(blocks)])
    method.train_end()
    assert {name for block in blocks for name in block} == set(candidates_of(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_lisa_trains_what_lies_outside_and_the_drawn_layers(family):
    model = built(family)
    method = LISA(LISAConfig(active_layers=2, switch_every=1))
    optimizer = start(method, model)
    partition = method.switch.partition
    assert len(partition.blocks) == LAYERS.get(family, 3)
    for step, moved in enumerate(steps(method, optimizer, model, family, 4)):
        drawn = method.schedule.active_at(step)
        assert moved <= set(method.switch.active_names(drawn))
        for index in drawn:
            assert moved & set(partition.blocks[index])
        held = {name for name, parameter in model.named_parameters() if parameter in optimizer.state}
        assert held <= set(method.switch.active_names(drawn))
    assert bool(partition.always) == (family != "lora")
    method.train_end()


def test_experts_without_a_gradient_are_skipped_under_every_method():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return x + self.first(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Experts() for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    for method in (
        BAdam(BAdamConfig(switch_every=1, mode="ascending")),
        HiFT(HiFTConfig(state_policy="disk")),
        LISA(LISAConfig(active_layers=2, switch_every=1)),
    ):
        model = Model()
        optimizer = start(method, model)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for step in range(4):
            method.step_begin(step)
            model(torch.ones(1, 4)).sum().backward()
            optimizer.step()
            model.zero_grad()
        moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
        assert moved == {name for name in before if "first" in name}
        method.train_end()
