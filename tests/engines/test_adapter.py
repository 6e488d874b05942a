from __future__ import annotations

import math

import pytest
import torch

from hf_eff.engines.adapter import LoraShape, temporary_adapter
from hf_eff.errors import OptionError, PlanError
from hf_eff.testing.tiny import tiny_model

peft = pytest.importorskip("peft")


def seeded(name, **config):
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_class = getattr(transformers, name)
        return model_class(model_class.config_class(vocab_size=97, **config)).eval()


def gpt2():
    return seeded("GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=2, n_positions=64)


def bert():
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return seeded("BertForSequenceClassification", num_labels=3, **shape)


def t5():
    return seeded("T5ForConditionalGeneration", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=2)


def photograph(model):
    """Everything of a model that a caller could notice: identities, values, flags, tables, attributes."""
    modules = {name: (id(module), type(module), module.training) for name, module in model.named_modules()}
    tables = {
        (name, key): (id(value), list(value))
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, dict)
    }
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    parameters = {
        name: (id(p), p.data_ptr(), p.dtype, p.requires_grad, None if p.grad is None else p.grad.clone())
        for name, p in model.named_parameters()
    }
    return modules, tables, attributes, {k: v[:4] for k, v in parameters.items()}


def values_of(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_as_found(model, before, values):
    assert photograph(model) == before
    now = values_of(model)
    assert now.keys() == values.keys()
    assert all(torch.equal(now[name], values[name]) for name in values)


def disturb(adapter):
    with torch.no_grad():
        for factor in adapter.factors.values():
            factor.weight.add_(1.0)
            factor.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("make", [tiny_model, gpt2, bert, t5])
def test_a_bare_model_is_left_as_found(make):
    model = make().train()
    next(model.parameters()).requires_grad_(False)
    model.register_forward_hook(lambda *_: None)
    before, values, random_state = photograph(model), values_of(model), torch.random.get_rng_state()
    with temporary_adapter(model, LoraShape(rank=2)) as adapter:
        disturb(adapter)
        model.eval()
        for module, _, training in before[0].values():
            assert module
            assert training
        model.train()
    assert torch.equal(random_state, torch.random.get_rng_state())
    assert_as_found(model, before, values)
    assert not hasattr(model, "peft_config")


def test_also_after_an_error():
    model = tiny_model()
    before, values = photograph(model), values_of(model)

    def interrupted():
        with temporary_adapter(model, LoraShape()) as adapter:
            disturb(adapter)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert_as_found(model, before, values)


def test_an_adapter_that_cannot_be_made_leaves_no_trace():
    model = tiny_model()
    before, values = photograph(model), values_of(model)
    with pytest.raises(OptionError, match=r"target_modules=\['nothing'\] matches no linear layer.*q_proj"):
        temporary_adapter(model, LoraShape(target_modules=("nothing",))).__enter__()
    assert_as_found(model, before, values)


def test_a_fresh_adapter_changes_no_output_and_only_it_trains():
    model = tiny_model()
    ids = torch.arange(3, 20)[None]
    expected = model(ids).logits
    with temporary_adapter(model, LoraShape(rank=4)) as adapter:
        assert adapter.is_new
        assert torch.equal(model(ids).logits, expected)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained == {f"{name}.weight" for name in adapter.factors}
        assert adapter.num_params == sum(math.prod(shape) for shape in adapter.shapes.values())
        leaves = {name.split(".lora_")[0].rpartition(".")[2] for name in adapter.factors}
        assert leaves == {"q_proj", "k_proj", "v_proj", "o_proj"}
        assert list(adapter.factors) == sorted(adapter.factors)
        b = next(name for name in adapter.factors if ".lora_B." in name)
        with torch.no_grad():
            adapter.factors[b].weight.fill_(1.0)
        assert not torch.equal(model(ids).logits, expected)
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize(
    ("make", "leaves"), [(gpt2, {"c_attn"}), (bert, {"query", "key", "value"}), (t5, {"q", "k", "v", "o"})]
)
def test_attention_projections_are_found(make, leaves):
    with temporary_adapter(make(), LoraShape()) as adapter:
        assert {name.split(".lora_")[0].rpartition(".")[2] for name in adapter.factors} == leaves


def test_a_model_without_attention_names_gets_every_linear_layer_but_its_head():
    model = tiny_model()
    for layer in model.model.layers:
        for short, long in (("a", "q_proj"), ("b", "k_proj"), ("c", "v_proj"), ("d", "o_proj")):
            setattr(layer.mlp, short, getattr(layer.self_attn, long))
            layer.self_attn.__dict__["_modules"].pop(long)
    with temporary_adapter(model, LoraShape()) as adapter:
        leaves = {name.split(".lora_")[0].rpartition(".")[2] for name in adapter.factors}
    assert leaves == {"a", "b", "c", "d", "gate_proj", "up_proj", "down_proj"}


def test_initial_weights_follow_the_seed_alone():
    def weights(seed, noise):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(noise)
            with temporary_adapter(tiny_model(), LoraShape(), seed) as adapter:
                return adapter.weights()

    first, again, other = weights(0, 1), weights(0, 2), weights(1, 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name in first if ".lora_A." in name]
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    assert not any(first[name].any() for name in first if ".lora_B." in name)
    bound = 1 / math.sqrt(64)  # uniform(-1/sqrt(fan_in), 1/sqrt(fan_in)), as PEFT draws it
    sample = torch.cat([first[name].flatten() for name in drawn])
    assert 0.95 * bound < sample.abs().max() <= bound
    assert abs(sample.std().item() / (bound / math.sqrt(3)) - 1) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_factors_are_exact_whatever_the_model(dtype):
    model = tiny_model().to(dtype)
    with temporary_adapter(model, LoraShape()) as adapter:
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        assert {factor.weight.dtype for factor in adapter.factors.values()} == {exact}
        assert model(torch.arange(5)[None]).logits.dtype == dtype


def wrapped(dtype=torch.float32, **options):
    settings = {"r": 2, "lora_alpha": 6, "lora_dropout": 0.25, "target_modules": ["q_proj", "up_proj"], **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny_model().to(dtype), peft.LoraConfig(**settings), autocast_adapter_dtype=False)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_models_own_adapter_is_borrowed_and_given_back(dtype):
    model = wrapped(dtype).train()
    some = next(p for p in model.parameters() if p.requires_grad)
    some.grad = torch.full_like(some, 3.0)
    before, values = photograph(model), values_of(model)
    ids = torch.arange(3, 20)[None]
    expected = model.eval()(ids).logits
    model.train()
    with temporary_adapter(model, LoraShape(rank=64)) as adapter:
        assert not adapter.is_new
        assert {shape for name, shape in adapter.shapes.items() if ".lora_A." in name} == {(2, 64)}
        assert {name.split(".lora_")[0].rpartition(".")[2] for name in adapter.factors} == {"q_proj", "up_proj"}
        assert {factor.weight.dtype for factor in adapter.factors.values()} == {torch.float32}
        disturb(adapter)
        assert not torch.allclose(model.eval()(ids).logits, expected, atol=1e-2)
    model.train()
    assert_as_found(model, before, values)
    assert torch.equal(some.grad, torch.full_like(some, 3.0))
    assert torch.equal(model.eval()(ids).logits, expected)


def test_only_the_active_adapter_is_borrowed():
    model = wrapped()
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["v_proj"]))
    model.set_adapter("other")
    with temporary_adapter(model, LoraShape()) as adapter:
        assert all(name.endswith(".other") and "v_proj" in name for name in adapter.factors)


def test_weights_are_copies_and_load_puts_them_back():
    with temporary_adapter(tiny_model(), LoraShape()) as adapter:
        saved = adapter.weights()
        disturb(adapter)
        assert not any(torch.equal(saved[name], factor.weight) for name, factor in adapter.factors.items())
        adapter.load(saved)
        assert all(torch.equal(saved[name], factor.weight) for name, factor in adapter.factors.items())


@pytest.mark.parametrize("kind", ["ia3", "frozen", "prompt"])
def test_adapters_without_trainable_lora_factors_are_refused(kind):
    if kind == "ia3":
        config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
        model = peft.get_peft_model(tiny_model(), config)
    elif kind == "frozen":
        model = wrapped()
        model.requires_grad_(False)
    else:
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = peft.get_peft_model(tiny_model(), config)
    with pytest.raises(PlanError, match="without trainable LoRA factors"), temporary_adapter(model, LoraShape()):
        pass
