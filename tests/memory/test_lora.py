"""LoRA: PEFT's adapters, made without a trace in the random state, and a forecast that fits what is held."""

import random
import warnings

import pytest
import torch
import transformers
from torch import nn

from hf_eff.contracts.cost import Facts, PoolFacts, RunFacts
from hf_eff.contracts.memory import BatchShape
from hf_eff.engines.facts import model_facts
from hf_eff.errors import MissingDependencyError, OptionError, OutsideIntendedUseWarning, PlanError
from hf_eff.memory.lora import SPEC, Lora, LoraConfig, adapt, cost
from hf_eff.numerics.flops import training_flops
from hf_eff.testing.tiny import tiny_model


def lora(**options):
    return Lora(LoraConfig(**{"r": 4, "alpha": 8, **options}))


def adapters(model):
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


def batch(rows=2, length=6):
    ids = torch.randint(3, 200, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


# -- what is made


def test_only_adapters_train_and_every_linear_layer_but_the_head_has_one():
    model = lora().prepare_model(tiny_model(layers=2), 0)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(adapters(model))
    leaves = {name.split(".lora_")[0].rpartition(".")[2] for name in adapters(model)}
    assert leaves == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(adapters(model)) == 2 * 2 * 7


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 4), (True, 8 / 4**0.5)])
def test_an_adapted_matrix_computes_the_papers_equation(rslora, scale):
    model = lora(rslora=rslora, target_modules=("q_proj",)).prepare_model(tiny_model(layers=1), 0)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    generator = torch.Generator().manual_seed(1)
    nn.init.normal_(layer.lora_B["default"].weight, generator=generator)
    x = torch.randn(3, 64, generator=generator)
    low, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = x @ layer.base_layer.weight.T + scale * (x @ low.T) @ up.T
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_the_wrapped_model_starts_as_the_given_one():
    before = tiny_model()(**batch()).loss
    assert torch.equal(lora().prepare_model(tiny_model(), 0)(**batch()).loss, before)


def test_equal_to_peft_called_by_hand():
    import peft

    ours = lora(r=3, alpha=6).prepare_model(tiny_model(), 7)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        config = peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
        theirs = peft.get_peft_model(tiny_model(), config)
    assert type(ours) is type(theirs)
    expected, found = theirs.state_dict(), ours.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_random_state_is_left_alone_and_the_seed_decides():
    states = random.getstate(), torch.get_rng_state()
    first = lora().prepare_model(tiny_model(), 1)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    torch.rand(3)  # another global state changes nothing
    again, other = lora().prepare_model(tiny_model(), 1), lora().prepare_model(tiny_model(), 2)
    names = [name for name in adapters(first) if "lora_A" in name]
    assert all(torch.equal(adapters(first)[name], adapters(again)[name]) for name in names)
    assert not any(torch.equal(adapters(first)[name], adapters(other)[name]) for name in names)


def test_adapters_of_a_16_bit_model_are_fp32():
    model = lora().prepare_model(tiny_model(layers=1).to(torch.bfloat16), 0)
    assert {parameter.dtype for parameter in adapters(model).values()} == {torch.float32}


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "up_proj")])
def test_top_layers_adapts_the_last_ones_only_and_spares_their_activations(targets):
    model = lora(top_layers=1, target_modules=targets).prepare_model(tiny_model(layers=3), 0)
    assert all(".layers.2." in name for name in adapters(model))
    assert len(adapters(model)) == 2 * (7 if targets == "all-linear" else 2)
    all_layers = lora(target_modules=targets).prepare_model(tiny_model(layers=3), 0)
    assert saved_bytes(model) < 0.7 * saved_bytes(all_layers)


def test_targets_by_name_list_text_and_pattern():
    def leaves(wanted):
        model = lora(target_modules=wanted).prepare_model(tiny_model(layers=1), 0)
        return {name.split(".lora_")[0].rpartition(".")[2] for name in adapters(model)}

    assert leaves(("q_proj", "v_proj")) == {"q_proj", "v_proj"}
    assert leaves("q_proj, v_proj") == {"q_proj", "v_proj"}
    assert leaves(r".*\.(up|down)_proj") == {"up_proj", "down_proj"}


def test_a_new_classification_head_trains_beside_the_adapters():
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=3
    )
    model = lora().prepare_model(transformers.BertForSequenceClassification(config), 0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("classifier" in name and "lora" not in name for name in trained)


@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_other_families_are_adapted_and_learn(family):
    if family == "t5":
        base = transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=256, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0
            )
        )
    else:
        base = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        model = lora().prepare_model(base.eval(), 0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# -- what is refused or warned about


def test_a_model_with_an_adapter_is_refused():
    wrapped = lora().prepare_model(tiny_model(layers=1), 0)
    with pytest.raises(PlanError, match="already has a PEFT adapter"):
        lora().prepare_model(wrapped, 0)


@pytest.mark.parametrize(
    "options", [{"target_modules": ("nowhere",)}, {"target_modules": ("nowhere",), "top_layers": 1}]
)
def test_targets_that_match_nothing_are_named(options):
    with pytest.raises(PlanError, match="nowhere"):
        lora(**options).prepare_model(tiny_model(layers=1), 0)


def test_dropout_warns_with_the_measured_reason():
    with pytest.warns(OutsideIntendedUseWarning, match=r"dropout=0.05.*1112 MiB.*688"):
        lora(dropout=0.05)


def test_wrong_options_are_refused_by_address():
    with pytest.raises(OptionError, match=r"LoraConfig\.r must be in"):
        LoraConfig(r=0)
    with pytest.raises(OptionError, match="dropout must be in"):
        LoraConfig(dropout=1.0)
    with pytest.raises(OptionError, match="top_layers needs"):
        LoraConfig(top_layers=2, target_modules=r".*proj")


# -- forecast


def facts_of(model, **run):
    return Facts(
        model=model_facts(model),
        pool=PoolFacts(num_rows=100, mean_tokens=16, max_tokens=16),
        run=RunFacts(batch_size=2, length=16, **run),
    )


def saved_bytes(model, rows=2, length=16):
    """Bytes that autograd keeps of one forward, parameters excluded, each storage once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.train()(**batch(rows, length)).loss
    total = sum(seen.values())
    del loss
    return total


def unused_flops(facts, shape):
    """Input gradients of the lowest block's first matrices, which a forecast without the model cannot leave out."""
    return 2 * shape.tokens * sum(facts.trainable.unused_input_gradients)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("top_layers", [None, 2])
def test_adapted_facts_count_a_llama_exactly(kv_heads, top_layers):
    base = tiny_model(num_key_value_heads=kv_heads)
    config = LoraConfig(r=4, top_layers=top_layers)
    predicted = adapt(config, facts_of(base)).model
    real = model_facts(Lora(config).prepare_model(tiny_model(num_key_value_heads=kv_heads), 0))
    assert predicted.trainable.params == real.trainable.params
    assert predicted.params == real.params
    assert predicted.weight_bytes == real.weight_bytes
    assert predicted.trainable.block_matmul_params == real.trainable.block_matmul_params
    assert [block.matmul_params for block in predicted.blocks] == [block.matmul_params for block in real.blocks]
    assert predicted.is_peft
    shape = BatchShape(rows=2, length=16)
    assert training_flops(predicted, shape) == training_flops(real, shape) + unused_flops(real, shape)


def test_adapted_facts_of_other_families_are_close():
    bert = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    gpt2 = transformers.GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    t5 = transformers.T5Config(vocab_size=256, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4)
    for make in (
        lambda: transformers.BertForMaskedLM(bert),
        lambda: transformers.GPT2LMHeadModel(gpt2),
        lambda: transformers.T5ForConditionalGeneration(t5),
    ):
        predicted = adapt(LoraConfig(r=4), facts_of(make())).model.trainable
        real = model_facts(lora().prepare_model(make(), 0)).trainable
        assert predicted.params == pytest.approx(real.params, rel=0.15)


def test_cost_is_the_held_bytes_and_the_flops_of_the_step():
    predicted = cost(LoraConfig(r=4), facts_of(tiny_model(), accumulation=3))
    model = lora().prepare_model(tiny_model(), 0)
    size = sum(parameter.numel() for parameter in adapters(model).values())
    assert predicted.bytes["gradients"] == 4 * size
    assert predicted.bytes["optimizer"] == pytest.approx(8 * size, rel=1e-3)
    real, shape = model_facts(model), BatchShape(rows=2, length=16)
    assert predicted.step_flops == lora().step_flops(real, [shape] * 3, 0) + 3 * unused_flops(real, shape)


def test_dropout_costs_what_autograd_then_keeps():
    plain, dropped = LoraConfig(), LoraConfig(dropout=0.05)
    facts = facts_of(tiny_model())
    more = cost(dropped, facts).bytes["activations"] - cost(plain, facts).bytes["activations"]
    with pytest.warns(OutsideIntendedUseWarning):
        noisy = Lora(LoraConfig(dropout=0.05)).prepare_model(tiny_model(), 0)
    held = saved_bytes(noisy) - saved_bytes(Lora(LoraConfig()).prepare_model(tiny_model(), 0))
    assert more == pytest.approx(held, rel=0.1)


# -- variants


def moved_by_training(config, steps=3, **model):
    wrapped = Lora(config).prepare_model(tiny_model(layers=2, **model), 0)
    before = {name: parameter.detach().clone() for name, parameter in wrapped.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        wrapped.train()(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return wrapped, {name for name, parameter in wrapped.named_parameters() if not torch.equal(before[name], parameter)}


def test_lora_fa_trains_the_second_matrix_only():
    wrapped, moved = moved_by_training(LoraConfig(r=4, variant="lora_fa"))
    assert moved == {name for name in adapters(wrapped) if "lora_B" in name}


def test_lora_fa_has_the_gradient_of_lora():
    gradients = []
    for variant in ("lora", "lora_fa"):
        model = lora(variant=variant).prepare_model(tiny_model(layers=2), 0)
        for name, parameter in adapters(model).items():
            if "lora_B" in name:
                nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
        model.train()(**batch()).loss.backward()
        gradients.append({name: p.grad for name, p in adapters(model).items() if "lora_B" in name})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_velora_approximates_the_first_matrix_gradient_by_groups_of_the_input():
    config = LoraConfig(r=4, alpha=4, variant="velora", velora_groups=16, target_modules=("q_proj",))
    model = Lora(config).prepare_model(tiny_model(layers=1), 0)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    generator = torch.Generator().manual_seed(1)
    low, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.normal_(up, generator=generator)
    x, outer = torch.randn(10, 64, generator=generator), torch.randn(10, 64, generator=generator)
    (layer.train()(x) * outer).sum().backward()
    pieces = x.reshape(10, 16, 4)
    direction = pieces.reshape(-1, 4).mean(dim=0)
    direction = direction / direction.norm()
    approximate = ((pieces @ direction)[..., None] * direction).reshape(10, 64)
    assert torch.allclose(low.grad, (outer @ up).T @ approximate, atol=1e-4)
    assert torch.allclose(up.grad, outer.T @ (x @ low.T), atol=1e-4)


@pytest.mark.parametrize("top_layers", [None, 1])
@pytest.mark.parametrize("variant", ["lora", "lora_fa", "velora"])
def test_variants_keep_what_the_forecast_says(variant, top_layers):
    config = LoraConfig(r=4, variant=variant, velora_groups=8, top_layers=top_layers)
    held = saved_bytes(Lora(config).prepare_model(tiny_model(), 0))
    assert cost(config, facts_of(tiny_model())).bytes["activations"] == pytest.approx(held, rel=0.08)


def test_variants_keep_less_in_the_order_of_the_papers():
    kept = {
        variant: saved_bytes(lora(variant=variant, velora_groups=8).prepare_model(tiny_model(), 0))
        for variant in ("lora", "velora", "lora_fa")
    }
    full = saved_bytes(tiny_model())
    assert kept["lora_fa"] < kept["velora"] < kept["lora"] < full


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_lora_fa_facts_count_a_llama_exactly(kv_heads):
    config = LoraConfig(r=4, variant="lora_fa")
    predicted = adapt(config, facts_of(tiny_model(num_key_value_heads=kv_heads))).model
    real = model_facts(Lora(config).prepare_model(tiny_model(num_key_value_heads=kv_heads), 0))
    assert predicted.params == real.params
    assert predicted.trainable.params == real.trainable.params
    assert predicted.trainable.block_matmul_params == real.trainable.block_matmul_params
    facts = facts_of(tiny_model())
    trained = adapt(config, facts).model.trainable.params
    assert cost(config, facts).bytes["optimizer"] == pytest.approx(8 * trained, rel=1e-3)


def test_variants_learn_and_leave_the_random_state_alone():
    for variant in ("lora_fa", "velora"):
        state = torch.get_rng_state()
        model = lora(variant=variant, velora_groups=8).prepare_model(tiny_model(layers=2), 0)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(model(**batch()).loss, tiny_model(layers=2)(**batch()).loss)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(5):
            loss = model.train()(**batch()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]


def test_dropout_with_a_variant_is_refused():
    with pytest.raises(OptionError, match=r"dropout=0\.1.*variant='lora_fa'"):
        LoraConfig(variant="lora_fa", dropout=0.1)


def test_an_old_peft_is_named(monkeypatch):
    import peft

    monkeypatch.delattr(peft, "VeloraConfig")
    with pytest.raises(MissingDependencyError, match=r"needs peft 0\.21"):
        lora(variant="velora").prepare_model(tiny_model(layers=1), 0)


def test_spec_is_consistent():
    assert SPEC.requires == {"peft": "peft"}
    assert not SPEC.traits.peft
    assert SPEC.build(SPEC.config.from_dict(SPEC.tiny)).config.r == 4


def test_a_4_bit_base_stays_as_it_is_while_its_adapters_learn():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny_model(layers=2)
    for layer in model.model.layers:
        old = layer.mlp.up_proj
        new = bitsandbytes.nn.Linear4bit(old.in_features, old.out_features, bias=False, compute_dtype=torch.float32)
        new.weight = bitsandbytes.nn.Params4bit(old.weight.detach(), requires_grad=False)
        layer.mlp.up_proj = new.to("cpu")
    model.is_loaded_in_4bit = True
    wrapped = lora().prepare_model(model, 0)
    packed = [layer.mlp.up_proj.base_layer.weight.clone() for layer in model.model.layers]
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    before = {name: parameter.detach().clone() for name, parameter in adapters(wrapped).items()}
    for _ in range(2):  # the second factor starts at zero, so the first one moves from the second step on
        wrapped(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not any(torch.equal(before[name], parameter) for name, parameter in adapters(wrapped).items())
    for layer, old in zip(model.model.layers, packed, strict=True):
        assert torch.equal(layer.mlp.up_proj.base_layer.weight, old)
