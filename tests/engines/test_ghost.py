"""ghost: inner products and norms against gradients that autograd writes out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hf_eff.engines import ghost
from hf_eff.engines.adapter import LoraShape, temporary_adapter
from hf_eff.engines.ghost import Outer, gradient_parts, gram, parameter_modules, squared_norms
from hf_eff.engines.scoring import scoring_mode
from hf_eff.errors import DataError, PlanError
from hf_eff.testing.tiny import tiny_model

LENGTHS = (9, 4, 7, 12)


def llama(**changes):
    """Norm weights off one, so that a norm that forgets its weight is found out."""
    model = tiny_model(layers=2, width=32, **changes)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
        return GPT2LMHeadModel(GPT2Config(**shape)).eval()


def rows_of(vocabulary=97, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in LENGTHS:
        ids = torch.randint(3, vocabulary, (length,), generator=generator)
        # Repeated tokens: an embedding's rows then meet inside one example.
        ids[-1] = ids[0]
        labels = ids.clone()
        labels[: length // 2] = -100
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    return rows


def padded(rows):
    batch = {}
    for key, fill in (("input_ids", 0), ("labels", -100), ("attention_mask", 0)):
        batch[key] = nn.utils.rnn.pad_sequence([row[key] for row in rows], batch_first=True, padding_value=fill)
    return batch


def explicit(model, parameters, rows):
    """[B, p] by a loop over single rows, autograd and a cross-entropy of our own."""
    found = []
    for row in rows:
        logits = model(input_ids=row["input_ids"][None], use_cache=False).logits[0, :-1]
        loss = cross_entropy(logits, row["labels"][1:], ignore_index=-100)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        found.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(found)


def own_parameters(modules):
    unique = {id(p): p for module in modules.values() for p in module.parameters(recurse=False) if p.requires_grad}
    return list(unique.values())


def check(model, modules, tolerance):
    rows, other = rows_of(), rows_of(seed=1)[:3]
    with scoring_mode(model):
        parts = gradient_parts(model, modules, padded(rows), is_causal_lm=True)
        more = gradient_parts(model, modules, padded(other), is_causal_lm=True)
        first = explicit(model, own_parameters(modules), rows)
        second = explicit(model, own_parameters(modules), other)
    scale = first.norm(dim=1, keepdim=True)
    for found, a, b in (
        (gram(parts), first, first),
        (gram(parts, more), first, second),
        (gram(more, parts), second, first),
    ):
        allowed = tolerance * a.norm(dim=1)[:, None] * b.norm(dim=1)
        assert ((found - a @ b.T).abs() <= allowed).all()
    assert ((squared_norms(parts) - scale[:, 0] ** 2).abs() <= tolerance * scale[:, 0] ** 2).all()
    return parts


def test_llama_with_every_parameter_tied_head_included():
    model = llama()
    modules = parameter_modules(model)
    assert {"lm_head", "model.embed_tokens", "model.norm"} <= set(modules)
    parts = check(model, modules, 1e-5)
    # The tied weight is one parameter with two parts.
    assert sorted(len(group) for group in parts.values())[-2:] == [1, 2]


def test_llama_with_an_untied_head():
    model = llama(tie_word_embeddings=False)
    parts = check(model, parameter_modules(model), 1e-5)
    assert all(len(group) == 1 for group in parts.values())


def test_gpt2_with_conv1d_biases_layer_norms_and_positions():
    model = gpt2()
    parts = check(model, parameter_modules(model), 1e-5)
    assert {"transformer.wpe.weight", "transformer.h.0.attn.c_attn.bias", "transformer.ln_f.weight"} <= set(parts)


def test_float64_to_rounding():
    # GPT-2's norms and attention keep float64; Llama's norm computes in float32.
    model = gpt2().double()
    check(model, parameter_modules(model), 1e-10)


@pytest.mark.parametrize("entries", [1, 10**9])
def test_both_forms_agree_whatever_the_block(entries, monkeypatch):
    monkeypatch.setattr(ghost, "_ENTRIES", entries)
    model, forms = llama(), []
    modules = parameter_modules(model.model.layers[1], "model.layers.1")
    parts = gradient_parts(model, modules, padded(rows_of()), is_causal_lm=True)
    for written_out in (True, False):
        turned = {
            name: [Outer(p.slopes, p.inputs, written_out) if isinstance(p, Outer) else p for p in group]
            for name, group in parts.items()
        }
        forms.append((gram(turned), squared_norms(turned)))
    assert torch.allclose(forms[0][0], forms[1][0], rtol=1e-4, atol=1e-7)
    assert torch.allclose(forms[0][1], forms[1][1], rtol=1e-5)


def test_the_cheaper_form_is_chosen():
    model = llama()
    parts = gradient_parts(model, parameter_modules(model), padded(rows_of()), is_causal_lm=True)
    head = next(part for group in parts.values() for part in group if isinstance(part, Outer) and len(group) == 2)
    assert not head.written_out  # 2 x 12^2 <= 262 x 32
    long = ghost._outer("q_proj", torch.zeros(1, 40, 32), torch.zeros(1, 40, 32))
    assert long.written_out  # 2 x 40^2 > 32 x 32
    assert ghost._outer("q.lora_A.x", torch.zeros(1, 2, 8), torch.zeros(1, 2, 64)).written_out


def test_lora_factors_are_written_out():
    pytest.importorskip("peft")
    model = llama()
    with scoring_mode(model), temporary_adapter(model, LoraShape(rank=3, alpha=7)) as adapter:
        generator = torch.Generator().manual_seed(0)
        adapter.load({n: 0.1 * torch.randn(s, generator=generator) for n, s in adapter.shapes.items()})
        parts = check(model, adapter.factors, 1e-5)
    assert all(part.written_out for group in parts.values() for part in group)


def test_a_module_called_twice_is_one_parameter():
    model = llama()
    model.model.layers[1] = model.model.layers[0]
    check(model, parameter_modules(model), 1e-5)


def test_padding_tokens_of_an_embedding_have_no_gradient():
    model = llama()
    assert model.model.embed_tokens.padding_idx == 0
    rows = rows_of()
    rows[0]["input_ids"][2] = 0
    untied = llama(tie_word_embeddings=False)
    modules = {"model.embed_tokens": untied.model.embed_tokens}
    found = squared_norms(gradient_parts(untied, modules, padded(rows), is_causal_lm=True))
    expected = explicit(untied, own_parameters(modules), rows).square().sum(dim=1)
    assert torch.allclose(found, expected, rtol=1e-5)


def test_frozen_parameters_do_not_count_and_grad_is_not_touched():
    model = llama(tie_word_embeddings=False)
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    parts = gradient_parts(model, parameter_modules(model), padded(rows_of()), is_causal_lm=True)
    assert list(parts) == ["lm_head.weight"]
    assert torch.equal(model.lm_head.weight.grad, torch.ones_like(model.lm_head.weight))
    assert not any(module._forward_hooks for module in model.modules())


def test_positions_that_are_shared_by_the_rows_are_refused():
    model, batch = gpt2(), padded(rows_of())
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
    with pytest.raises(DataError, match="sees 1 rows for a batch of 4"):
        gradient_parts(model, parameter_modules(model), batch, is_causal_lm=True)


def test_modules_of_unknown_form_are_refused_by_name():
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return 3 * super().forward(ids)

    model = llama()
    model.model.embed_tokens = Scaled(262, 32)
    with pytest.raises(PlanError, match=r"model\.embed_tokens .Scaled.: known are linear"):
        parameter_modules(model)
