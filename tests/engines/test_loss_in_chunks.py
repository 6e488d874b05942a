"""Cross entropy in chunks: the loss and the gradients of torch's own, without the logits."""

import copy

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from hf_eff.contracts.memory import StepContext
from hf_eff.engines.loss_in_chunks import ChunkedHead, summed_cross_entropy
from hf_eff.errors import PlanError
from hf_eff.testing.tiny import tiny_model


def problem(tokens=20, hidden=8, vocab=33, seed=0, bias=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(tokens, hidden, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, hidden, generator=generator, dtype=dtype, requires_grad=True)
    offset = torch.randn(vocab, generator=generator, dtype=dtype, requires_grad=True) if bias else None
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[::3] = -100
    return states, weight, offset, labels


def plain(states, weight, bias, labels):
    logits = functional.linear(states, weight, bias)
    return functional.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")


# -- the function


@settings(deadline=None, max_examples=40)
@given(tokens=st.integers(1, 30), chunk=st.integers(1, 40), bias=st.booleans(), seed=st.integers(0, 100))
def test_loss_and_gradients_are_torchs(tokens, chunk, bias, seed):
    states, weight, offset, labels = problem(tokens, seed=seed, bias=bias, dtype=torch.float32)
    inputs = [each for each in (states, weight, offset) if each is not None]
    expected = plain(states, weight, offset, labels)
    found = summed_cross_entropy(states, weight, offset, labels, chunk)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    for theirs, ours in zip(
        torch.autograd.grad(expected / 7, inputs), torch.autograd.grad(found / 7, inputs), strict=True
    ):
        assert torch.allclose(theirs, ours, rtol=1e-4, atol=1e-5)


def test_what_is_frozen_gets_no_gradient_and_costs_none():
    states, weight, _, labels = problem(dtype=torch.float32)
    kept = []

    def pack(tensor):
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = summed_cross_entropy(states, weight.detach(), None, labels, 4)
    assert kept == [states.shape]
    loss.backward()
    assert weight.grad is None
    assert states.grad is not None


def test_without_gradients_only_the_loss_is_computed():
    states, weight, offset, labels = problem(dtype=torch.float32)
    with torch.no_grad():
        found = summed_cross_entropy(states, weight, offset, labels, 4)
    assert not found.requires_grad
    assert found.item() == pytest.approx(plain(states, weight, offset, labels).item(), rel=1e-6)


def test_no_labels_no_loss():
    states, weight, offset, labels = problem(dtype=torch.float32)
    loss = summed_cross_entropy(states, weight, offset, torch.full_like(labels, -100), 4)
    loss.backward()
    assert loss == 0
    assert not weight.grad.any()


def test_a_second_backward_is_an_error_and_not_a_wrong_number():
    states, weight, offset, labels = problem(dtype=torch.float32)
    loss = summed_cross_entropy(states, weight, offset, labels, 4)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_autocast_multiplies_in_bf16_and_sums_in_fp32():
    states, weight, offset, labels = problem(400, 64, 100, dtype=torch.float32)
    exact = torch.autograd.grad(plain(states, weight, offset, labels), [states, weight])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = torch.autograd.grad(plain(states, weight, offset, labels), [states, weight])
        loss = summed_cross_entropy(states, weight, offset, labels, 16)
    ours = torch.autograd.grad(loss, [states, weight])
    assert loss.dtype == torch.float32
    for truth, their, our in zip(exact, theirs, ours, strict=True):
        assert our.dtype == torch.float32
        assert (our - truth).norm() <= 1.05 * (their - truth).norm()


def test_bf16_weights_keep_their_type():
    states, weight, _, labels = problem(dtype=torch.bfloat16)
    expected = torch.autograd.grad(plain(states, weight, None, labels), [states, weight])
    found = torch.autograd.grad(summed_cross_entropy(states, weight, None, labels, 5), [states, weight])
    for theirs, ours in zip(expected, found, strict=True):
        assert ours.dtype == torch.bfloat16
        assert torch.allclose(theirs.float(), ours.float(), rtol=0.05, atol=0.05)


def test_fp16_gradients_survive_a_large_number_of_items():
    states, weight, _, labels = problem(dtype=torch.float16)
    loss = summed_cross_entropy(states, weight, None, labels, 5) / 1e6
    (found,) = torch.autograd.grad(loss, [weight], grad_outputs=torch.tensor(65536.0))  # a loss scale
    (expected,) = torch.autograd.grad(plain(states.double(), weight.double(), None, labels), [weight])
    assert torch.allclose(found.double(), expected.double() * 0.065536, rtol=0.02, atol=1e-3)


# -- the model


def batch(rows=2, length=12):
    ids = torch.randint(3, 200, (rows, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :4] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=256, n_embd=32, n_layer=2, n_head=4, n_positions=64, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0
        )
    )


MODELS = {
    "tied": lambda: tiny_model(layers=2, width=32),
    "untied": lambda: tiny_model(layers=2, width=32, tie_word_embeddings=False),
    "gpt2": gpt2,
    "phi": lambda: transformers.PhiForCausalLM(  # its head has a bias
        transformers.PhiConfig(
            vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        )
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=256,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            output_router_logits=True,
        )
    ),
}


@pytest.mark.parametrize("items", [None, 50, torch.tensor(50)])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_models_loss_and_gradients_stay(name, items):
    model = MODELS[name]().train()
    other, extra = copy.deepcopy(model), {} if items is None else {"num_items_in_batch": items}
    expected = model(**batch(), **extra)
    expected.loss.backward()
    head = ChunkedHead(other, 5)
    with head.active():
        found = other(**batch(), **extra)
        found.loss.backward()
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert found.logits is None
    theirs, ours = dict(model.named_parameters()), dict(other.named_parameters())
    for key in theirs:
        if theirs[key].grad is not None:
            assert torch.allclose(theirs[key].grad, ours[key].grad, rtol=1e-3, atol=1e-6), key


def test_logits_exist_where_they_are_asked_for():
    model = tiny_model(layers=1, width=32)
    expected = model(**batch()).logits
    with ChunkedHead(model, 5).active():
        without_labels = {name: value for name, value in batch().items() if name != "labels"}
        assert torch.equal(model(**without_labels).logits, expected)
        assert model(**batch(), return_dict=False)[1] is None
    assert torch.equal(model(**batch()).logits, expected)


def test_the_model_is_as_it_was_also_after_an_error():
    model = tiny_model(layers=1, width=32)
    before = {key: value for key, value in model.__dict__.items() if not key.startswith("_")}
    wrong = {"input_ids": torch.full((1, 2), 10**6), "labels": torch.zeros(1, 2, dtype=torch.long)}
    with ChunkedHead(model, 5).active(), pytest.raises(IndexError):
        model(**wrong)
    assert {key: value for key, value in model.__dict__.items() if not key.startswith("_")} == before
    assert "_loss_function" not in model.__dict__
    assert "forward" not in model.lm_head.__dict__


def test_logits_never_exist_as_a_whole():
    model, largest = tiny_model(layers=1, width=32, vocab_size=2000), []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (2000,) and out.shape != (32, 2000):
                largest.append(out.numel() // 2000)
            return out

    with ChunkedHead(model, 3).active(), Watch():
        model(**batch()).loss.backward()
    assert max(largest) == 3


# -- whether it may take over


def context_of(model, loss=None, inputs=None):
    def model_loss(model, inputs, num_items):
        return model(**inputs, num_items_in_batch=num_items).loss

    return StepContext(
        model=model,
        unwrapped=model,
        inputs=inputs or batch(),
        num_items=16,
        micro_step=0,
        micro_steps=1,
        global_step=0,
        stock=lambda *args, **changes: torch.zeros(()),
        loss=loss or model_loss,
        mean_over_ranks=lambda value: value,
    )


@pytest.mark.parametrize("name", sorted(MODELS))
def test_plain_models_agree(name):
    model = MODELS[name]().train()
    assert ChunkedHead(model, 5).agrees(context_of(model))
    assert model.training


def test_a_batch_without_loss_leaves_the_question_open():
    model = tiny_model(layers=1, width=32)
    silent = {**batch(), "labels": torch.full((2, 12), -100)}
    assert ChunkedHead(model, 5).agrees(context_of(model, inputs=silent)) is None


def gemma():
    return transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            vocab_size=256,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
        )
    )


def granite():
    return transformers.GraniteForCausalLM(
        transformers.GraniteConfig(
            vocab_size=256,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            logits_scaling=8.0,
        )
    )


@pytest.mark.parametrize("make", [gemma, granite])
def test_capped_and_scaled_logits_are_refused(make):
    model = make()
    with pytest.raises(PlanError, match="scales, caps or adds"):
        ChunkedHead(model, 5).agrees(context_of(model))


def test_a_loss_of_the_trainers_own_is_refused():
    model = tiny_model(layers=1, width=32)

    def smoothed(model, inputs, num_items):
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        logits = model(**inputs).logits[:, :-1].flatten(0, 1)
        return functional.cross_entropy(logits, labels[:, 1:].flatten(), label_smoothing=0.1)

    with pytest.raises(PlanError, match="label_smoothing_factor"):
        ChunkedHead(model, 5).agrees(context_of(model, smoothed))


def test_a_loss_that_adds_to_the_models_is_found_out():
    model = tiny_model(layers=1, width=32)

    def regularised(model, inputs, num_items):
        output = model(**inputs)
        return output.loss + (0 if output.logits is None else output.logits.square().mean() + 1)

    with pytest.raises(PlanError, match="not the usual next-token cross entropy"):
        ChunkedHead(model, 5).agrees(context_of(model, regularised))


def test_other_heads_and_losses_are_refused():
    with pytest.raises(PlanError, match="no transformers language model"):
        ChunkedHead(nn.Linear(2, 2), 5)
    model = tiny_model(layers=1, width=32)
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(PlanError, match="plain linear output head"):
        ChunkedHead(model, 5)
    other = tiny_model(layers=1, width=32)
    other.loss_function = lambda **kwargs: None
    with pytest.raises(PlanError, match="another loss"):
        ChunkedHead(other, 5)
