import copy
import weakref

import pytest
import torch
from torch import nn

from hf_eff.engines.directions import Gaussian
from hf_eff.engines.ephemeral import EphemeralWeights, unique_parameters
from hf_eff.engines.forward_only import forward_only
from hf_eff.errors import PlanError
from hf_eff.testing.tiny import tiny_model

FAMILY = Gaussian(seed=0)
IDS = torch.arange(12).view(2, 6) + 100


def perturbed(scale):
    return lambda name, stored: FAMILY.add_(torch.empty_like(stored), name, 0, scale, base=stored)


def perturbed_copy(model, names, scale):
    """The reference: a copy of the model whose weights really are changed."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in unique_parameters(other, names).items():
            FAMILY.add_(parameter.data, name, 0, scale)
    return other


def trainable(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def evaluate(model, function, scale=1e-2):
    weights = EphemeralWeights(model, unique_parameters(model, trainable(model)))
    with forward_only(model):
        first = weights.evaluate(perturbed(scale), lambda: function(model))
        again = weights.evaluate(perturbed(scale), lambda: function(model))
    assert torch.equal(first, again)  # the first one is watched, the second is not
    return first, weights


def loss_of(model):
    return model(input_ids=IDS, labels=IDS).loss


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=262, n_embd=32, n_layer=2, n_head=2, n_positions=64)).eval()


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=262, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(vocab_size=262, **sizes)).eval()


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return MixtralForCausalLM(MixtralConfig(vocab_size=262, num_key_value_heads=2, num_local_experts=4, **sizes)).eval()


def peft_model(**options):
    import peft

    kind = options.pop("kind", "LoraConfig")
    model = peft.get_peft_model(tiny_model(layers=2), getattr(peft, kind)(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:  # adapters that start at zero would hide one that is not perturbed
                FAMILY.add_(parameter.data, name, 7, 0.05)
    return model.eval()


MODELS = {
    "llama, tied head": tiny_model,
    "llama, own head": lambda: tiny_model(tie_word_embeddings=False),
    "gpt2": gpt2,
    "t5, shared embedding": t5,
    "mixtral, experts": mixtral,
    "lora": lambda: peft_model(r=4),
    "lora on embedding": lambda: peft_model(r=4, target_modules=["embed_tokens", "q_proj"]),
    "dora": lambda: peft_model(r=4, use_dora=True),
    "ia3": lambda: peft_model(
        kind="IA3Config", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "lora and a trained head": lambda: peft_model(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "prompt tuning": lambda: peft_model(kind="PromptTuningConfig", num_virtual_tokens=4),
    "vera": lambda: peft_model(kind="VeraConfig", r=4),
}


@pytest.mark.parametrize("name", MODELS)
def test_loss_equals_that_of_a_changed_copy(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    addresses = {key: value.data_ptr() for key, value in model.state_dict().items()}
    got, _ = evaluate(model, loss_of)
    with torch.no_grad():
        plain, expected = loss_of(model), loss_of(perturbed_copy(model, trainable(model), 1e-2))
    assert torch.equal(got, expected)
    assert not torch.equal(got, plain)
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) and addresses[key] == after[key].data_ptr() for key in before)


def test_loss_of_a_classifier_equals_that_of_a_changed_copy():
    model, labels = bert(), torch.tensor([0, 1])
    got, _ = evaluate(model, lambda each: each(input_ids=IDS, labels=labels).loss)
    changed = perturbed_copy(model, trainable(model), 1e-2)
    with torch.no_grad():
        assert torch.equal(got, changed(input_ids=IDS, labels=labels).loss)


class Custom(nn.Module):
    """Reads weights in every way that a module tree does not show."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)  # reads its out_proj's weight itself
        self.recurrent = nn.LSTM(8, 8, batch_first=True)  # keeps a list of its weights
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.plain = nn.Linear(8, 8)
        self.list = nn.ParameterList([torch.ones(8)])
        self.own = nn.Parameter(torch.ones(8))
        self.outer = nn.ModuleDict({"head": nn.Linear(8, 3)})

    def forward(self, x):
        x = self.attention(x, x, x)[0]
        x = self.recurrent(x)[0]
        x = self.normed(x) * self.own + self.list[0]
        x = x @ self.plain.weight.t() + self.plain.bias
        return (x @ self.outer["head"].weight.t()).sum()


def test_weights_read_outside_their_module_are_found():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Custom(), torch.randn(2, 5, 8)
    got, weights = evaluate(model, lambda each: each(x))
    changed = perturbed_copy(model, trainable(model), 1e-2)
    changed.recurrent.flatten_parameters()
    with torch.no_grad():
        assert torch.equal(got, changed(x))
    assert {"attention.out_proj.weight", "plain.weight", "outer.head.weight", "list.0"} <= weights.resident
    assert "own" not in weights.resident


def test_weights_behind_another_tensor_are_refused():
    class Alias(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            self.view = self.weight.data[1:]

        def forward(self):
            return (self.weight[1:] * self.view).sum()

    with pytest.raises(PlanError, match=r"reads \['weight'\] through another tensor"):
        evaluate(Alias(), lambda model: model())


def test_only_the_module_at_work_and_the_head_hold_a_copy():
    model = tiny_model(tie_word_embeddings=False)
    parameters = unique_parameters(model, trainable(model))
    stored = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    replaced = []

    def look(*_):
        replaced.append({name for name, parameter in parameters.items() if parameter.data_ptr() != stored[name]})

    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(look)
    evaluate(model, loss_of)
    allowed = {name.rpartition(".")[0] for name in stored}
    for names in replaced:
        assert len({name.rpartition(".")[0] for name in names - {"lm_head.weight"}} & allowed) <= 1
    assert {"lm_head.weight"} <= set.intersection(*replaced)
    assert set().union(*replaced) == set(stored)


def test_copies_take_no_more_than_the_head_and_one_module():
    model = tiny_model()
    parameters = unique_parameters(model, trainable(model))
    weights = EphemeralWeights(model, parameters)
    held = peak = 0

    def release(size):
        nonlocal held
        held -= size

    def value(name, stored):
        nonlocal held, peak
        made = stored.clone()
        weakref.finalize(made.untyped_storage(), release, made.nbytes)
        held += made.nbytes
        peak = max(peak, held)
        return made

    with forward_only(model):
        weights.evaluate(value, lambda: loss_of(model))
    head, layer = parameters["lm_head.weight"].nbytes, model.model.layers[0].mlp.up_proj.weight.nbytes
    assert head < peak <= head + layer
    assert held == 0


@pytest.mark.parametrize("place", ["model.layers.1.mlp.down_proj", "model.norm", "model.layers.0"])
def test_an_error_inside_leaves_every_weight_as_it_was(place):
    model = tiny_model()
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    handle = model.get_submodule(place).register_forward_pre_hook(lambda *_: 1 / 0)
    weights = EphemeralWeights(model, unique_parameters(model, trainable(model)))
    with pytest.raises(ZeroDivisionError), forward_only(model):
        weights.evaluate(perturbed(1e-2), lambda: loss_of(model))
    handle.remove()
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_an_error_in_the_replacement_leaves_every_weight_as_it_was():
    model = tiny_model()
    addresses = [parameter.data_ptr() for parameter in model.parameters()]

    def value(name, stored):
        if name.endswith("layers.2.mlp.up_proj.weight"):
            raise MemoryError
        return stored + 1

    weights = EphemeralWeights(model, unique_parameters(model, trainable(model)))
    with pytest.raises(MemoryError), forward_only(model):
        weights.evaluate(value, lambda: loss_of(model))
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses


def test_no_hook_stays():
    model = tiny_model()
    evaluate(model, loss_of)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_an_enclosing_autocast_sees_the_new_weights():
    """Autocast keeps the 16-bit copies of weights until its outermost block ends."""
    model = tiny_model()
    weights = EphemeralWeights(model, unique_parameters(model, trainable(model)))
    with forward_only(model), torch.autocast("cpu", torch.bfloat16):
        got = [weights.evaluate(perturbed(scale), lambda: loss_of(model)) for scale in (0.02, -0.02)]
    expected = []
    for scale in (0.02, -0.02):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected.append(loss_of(perturbed_copy(model, trainable(model), scale)))
    assert torch.equal(torch.stack(got), torch.stack(expected))
    assert not torch.equal(got[0], got[1])


def test_tied_weights_go_by_their_first_name():
    model = tiny_model()
    names = set(unique_parameters(model, trainable(model)))
    assert "lm_head.weight" in names
    assert "model.embed_tokens.weight" not in names
    assert list(unique_parameters(model, ["model.embed_tokens.weight"])) == ["lm_head.weight"]


def test_frozen_weights_are_never_replaced():
    model = tiny_model(tie_word_embeddings=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    touched = set()

    def value(name, stored):
        touched.add(name)
        return stored.clone()

    weights = EphemeralWeights(model, unique_parameters(model, trainable(model)))
    with forward_only(model):
        weights.evaluate(value, lambda: loss_of(model))
    assert touched == set(trainable(model))


def test_copies_that_are_held_are_made_once_and_put_back_even_after_an_error():
    model = tiny_model(layers=2, width=32)
    parameters = unique_parameters(model, trainable(model))
    stored = {name: (parameter.data_ptr(), parameter.detach().clone()) for name, parameter in parameters.items()}
    weights = EphemeralWeights(model, parameters)
    ids = torch.arange(6, 12)[None]
    shifted = perturbed(1e-2)
    weights.evaluate(shifted, lambda: model(input_ids=ids))  # finds what is read where
    made = []

    def count(name, stored):
        made.append(name)
        return shifted(name, stored)

    def twice():
        return [model(input_ids=ids).logits, model(input_ids=ids).logits]

    with torch.no_grad():
        fresh = weights.evaluate(count, twice)
        often = len(made)
        made.clear()
        weights.holds = True
        held = weights.evaluate(count, twice)
    assert all(torch.equal(a, b) for a, b in zip(fresh, held, strict=True))
    assert sorted(made) == sorted(parameters)
    assert often > len(parameters)
    with pytest.raises(ZeroDivisionError):
        weights.evaluate(shifted, lambda: [model(input_ids=ids), 1 / 0])
    for name, parameter in parameters.items():
        address, value = stored[name]
        assert parameter.data_ptr() == address
        assert torch.equal(parameter, value)
