"""Shapes worked out from sums against the shapes of real modules."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, Qwen2Config

from hf_eff.contracts.cost import Facts, PoolFacts, RunFacts
from hf_eff.engines.facts import model_facts
from hf_eff.engines.matrices import block_matrices
from hf_eff.memory.apollo import ApolloConfig
from hf_eff.memory.apollo import cost as apollo_cost
from hf_eff.memory.fused import FusedConfig
from hf_eff.memory.fused import cost as fused_cost
from hf_eff.memory.galore import GaLoreConfig
from hf_eff.memory.galore import cost as galore_cost
from hf_eff.numerics.flops import everything_trains
from hf_eff.numerics.layer_shapes import largest_tensor, layer_shapes

SMOLLM = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
CONFIGS = [
    SMOLLM,
    Qwen2Config(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    OPTConfig(
        vocab_size=500, hidden_size=64, ffn_dim=256, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=64
    ),
]


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type + str(config.hidden_size))
def test_shapes_are_those_of_the_modules(config):
    model = on_meta(config)
    facts = model_facts(model)
    for block, matrices in zip(facts.blocks, block_matrices(model), strict=True):
        expected = sorted(tuple(sorted(matrix.weight.shape)) for matrix in matrices)
        assert sorted(tuple(sorted(shape)) for shape in layer_shapes(facts, block)) == expected
    largest = max(each.numel() for each in model.parameters())
    # Learned positions are counted with the embedding.
    assert largest <= largest_tensor(facts, everything_trains(facts)) <= 1.25 * largest


def test_state_of_a_small_model_in_closed_form():
    model = model_facts(on_meta(SMOLLM))
    facts = Facts(
        model=model,
        pool=PoolFacts(num_rows=100, mean_tokens=256, max_tokens=256),
        run=RunFacts(batch_size=2, length=256, max_grad_norm=0.0),
    )
    shapes = 30 * [(576, 576), (576, 576), (192, 576), (192, 576), (576, 1536), (576, 1536), (576, 1536)]
    rest = 8 * (134515008 - sum(m * n for m, n in shapes))
    galore = rest + sum(4 * (2 * n * 128 + m * 128) for m, n in shapes)
    mini = rest + sum(4 * (2 * n + 1) for _, n in shapes)
    assert galore_cost(GaLoreConfig(), facts).bytes["optimizer"] == pytest.approx(galore, rel=1e-3)
    assert apollo_cost(ApolloConfig(rank=1), facts).bytes["optimizer"] == pytest.approx(mini, rel=1e-3)
    fused = fused_cost(FusedConfig(), facts).bytes
    assert (fused["gradients"], fused["optimizer"]) == (0.0, 0.0)
    assert round(galore / 2**20) == 467
