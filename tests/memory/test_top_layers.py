"""The last layers train in full; below them nothing trains, nothing is kept and no gradient passes."""

import pytest
import torch
import transformers

from hf_eff.contracts.cost import Facts, PoolFacts, RunFacts
from hf_eff.contracts.memory import BatchShape
from hf_eff.engines.facts import model_facts
from hf_eff.engines.module_tree import find_blocks
from hf_eff.errors import PlanError
from hf_eff.hardware.memory_meter import MemoryMeter
from hf_eff.memory.top_layers import TopLayers, TopLayersConfig, adapt, cost
from hf_eff.numerics.flops import training_flops
from hf_eff.testing.tiny import tiny_model


def batch(rows=2, length=16):
    ids = torch.randint(3, 200, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def prepared(model=None, **options):
    model = tiny_model(layers=4, width=32) if model is None else model
    return TopLayers(TopLayersConfig(**options)).prepare_model(model, 0)


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def facts_of(model, length=16):
    return Facts(
        model=model_facts(model),
        pool=PoolFacts(num_rows=8, mean_tokens=length, max_tokens=length),
        run=RunFacts(batch_size=2, length=length),
    )


@pytest.mark.parametrize("count", [1, 2, 4, 9])
@pytest.mark.parametrize("norm", [True, False])
def test_the_last_layers_train_and_nothing_else(count, norm):
    model = prepared(layers=count, include_norm=norm)
    first = max(0, 4 - count)
    wanted = {name for name, _ in model.named_parameters() if any(f".layers.{i}." in name for i in range(first, 4))}
    assert trainable(model) == wanted | ({"model.norm.weight"} if norm else set())


def test_no_gradient_passes_below_and_nothing_is_kept_there():
    model, seen = prepared(layers=2), set()
    for index, (_, layer) in enumerate(find_blocks(model)):

        def note(_module, _inputs, output, index=index):
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda grad: seen.add(index))

        layer.register_forward_hook(note)
    model.train()(**batch()).loss.backward()
    assert seen == {2, 3}
    held = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert held == trainable(model)


def test_gradients_are_those_of_full_training():
    whole, part = tiny_model(layers=4, width=32), prepared(layers=2)
    whole.train()(**batch()).loss.backward()
    part.train()(**batch()).loss.backward()
    expected = dict(whole.named_parameters())
    for name in trainable(part):
        assert torch.equal(part.get_parameter(name).grad, expected[name].grad), name


def test_what_is_frozen_already_stays_frozen():
    model = tiny_model(layers=2, width=32)
    model.model.layers[1].mlp.requires_grad_(False)
    assert not any(".mlp." in name for name in trainable(prepared(model, layers=1)))


def test_a_head_of_its_own_can_train_and_a_tied_one_cannot():
    untied = tiny_model(layers=2, width=32, tie_word_embeddings=False)
    assert "lm_head.weight" in trainable(prepared(untied, layers=1, include_head=True))
    assert "model.embed_tokens.weight" not in trainable(untied)
    with pytest.raises(PlanError, match=r"include_head=True.*shares"):
        prepared(layers=1, include_head=True)
    with pytest.raises(PlanError, match=r"include_head=True.*shares"):
        adapt(TopLayersConfig(include_head=True), facts_of(tiny_model(layers=2, width=32)))


def test_other_families():
    bert = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64
        )
    )
    names = trainable(prepared(bert, layers=1, include_head=True))
    assert {name.split(".")[0] for name in names} == {"bert", "classifier"}
    assert not any("embeddings" in name or ".layer.1." in name for name in names)
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=64, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
    )
    assert all(name.startswith("decoder.") for name in trainable(prepared(t5, layers=1)))


def test_a_model_without_layers_and_a_frozen_top_are_refused():
    with pytest.raises(PlanError, match="no layers"):
        prepared(torch.nn.Linear(2, 2))
    with pytest.raises(PlanError, match="nothing trainable in the last 1 layers"):
        prepared(tiny_model(layers=2, width=32).requires_grad_(False), layers=1)


@pytest.mark.parametrize("options", [{"layers": 1}, {"layers": 3, "include_norm": False}, {"layers": 9}])
def test_adapted_facts_are_those_of_the_prepared_model(options):
    predicted = adapt(TopLayersConfig(**options), facts_of(tiny_model(layers=4, width=32))).model.trainable
    real = model_facts(prepared(**options)).trainable
    assert predicted.params == real.params
    assert predicted.lowest_block == real.lowest_block
    assert predicted.block_matmul_params == real.block_matmul_params


def test_adapted_facts_of_an_untied_head():
    model = tiny_model(layers=2, width=32, tie_word_embeddings=False)
    config = TopLayersConfig(layers=1, include_head=True)
    predicted = adapt(config, facts_of(model)).model.trainable
    real = model_facts(TopLayers(config).prepare_model(model, 0)).trainable
    assert predicted.params == real.params
    assert predicted.head_matmul_params == real.head_matmul_params


@pytest.mark.parametrize("count", [1, 3])
def test_forecast_against_what_is_held(count):
    config = TopLayersConfig(layers=count)
    forecast = cost(config, facts_of(tiny_model(layers=4, width=64), length=64))
    model = TopLayers(config).prepare_model(tiny_model(layers=4, width=64), 0)
    meter = MemoryMeter(model)
    with meter.forward_backward():
        model.train()(**batch(2, 64)).loss.backward()
    held = meter.peak_bytes()
    assert held["gradients"] == forecast.bytes["gradients"]
    assert held["activations"] == pytest.approx(forecast.bytes["activations"], rel=0.08)
    real = model_facts(model)
    shape = BatchShape(2, 64)
    assert training_flops(real, shape) <= forecast.step_flops <= 1.1 * training_flops(real, shape)
