"""Scoring: batches are bounded, losses are those of single rows, and nothing is left behind."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_eff.contracts.selection import SelectionContext
from hf_eff.engines.pool_pass import pool_batches, token_batches
from hf_eff.engines.scoring import model_example_losses, pool_losses, scoring_mode
from hf_eff.errors import BudgetExceededError, DataError, ScoringStoppedError
from hf_eff.selection import PadRows, make_pool
from hf_eff.testing.tiny import tiny_model, tiny_pool, tiny_tokenizer, tokenised

BERT = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}


def rows_of(lengths, vocab=60, seed=0, labels=None):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, length in enumerate(lengths):
        ids = torch.randint(3, vocab, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": labels(ids, number) if labels else [-100, *ids[1:]]})
    return rows


def context_of(model, rows, **fields):
    defaults = {"collate": PadRows(), "generator": torch.Generator(), "batch_tokens": 64, "model": model}
    return SelectionContext(pool=make_pool(rows), **{**defaults, **fields})


# -- batches


@pytest.mark.parametrize("seed", range(20))
def test_batches_partition_the_rows_and_stay_within_the_limit(seed):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 90, size=57)
    batches = token_batches(lengths, 200)
    assert sorted(np.concatenate(batches).tolist()) == list(range(57))
    assert all(len(batch) * lengths[batch].max() <= 200 for batch in batches)
    firsts = [int(lengths[batch].max()) for batch in batches]
    assert firsts == sorted(firsts, reverse=True)
    # no batch could have taken the first row of the next one
    assert all((len(batch) + 1) * lengths[batch].max() > 200 for batch in batches[:-1])


def test_a_row_above_the_limit_is_a_batch_of_its_own():
    assert [batch.tolist() for batch in token_batches([5, 500, 5], 10)] == [[1], [0, 2]]


def test_an_empty_pool_gives_no_batches():
    assert token_batches([], 10) == []


def test_the_generator_shuffles_batches_not_their_content():
    lengths = np.arange(1, 60)
    plain = token_batches(lengths, 100)
    mixed = token_batches(lengths, 100, torch.Generator().manual_seed(1))
    assert [b.tolist() for b in mixed] != [b.tolist() for b in plain]
    assert sorted(b.tolist() for b in mixed) == sorted(b.tolist() for b in plain)


def test_ties_make_batches_independent_of_row_order():
    lengths, keys = np.array([3, 5, 3, 3, 5]), np.array(list("cabed"))
    order = np.array([4, 2, 0, 3, 1])
    first = [set(keys[batch]) for batch in token_batches(lengths, 6, ties=keys.tolist())]
    second = [set(keys[order][batch]) for batch in token_batches(lengths[order], 6, ties=keys[order].tolist())]
    assert first == second


# -- no traces


def everything_about(model):
    return {
        "modes": [module.training for module in model.modules()],
        "flags": [p.requires_grad for p in model.parameters()],
        "weights": [p.detach().clone() for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "grad_ids": [id(p.grad) for p in model.parameters()],
        "hooks": [
            list(m._forward_hooks) + list(m._forward_pre_hooks) + list(m._backward_hooks) for m in model.modules()
        ],
        "tensor_hooks": [
            list(p._backward_hooks or ()) + list(p._post_accumulate_grad_hooks or ()) for p in model.parameters()
        ],
    }


def random_state():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


def test_nothing_is_left_behind_even_after_an_error():
    model = tiny_model(layers=2, width=16)
    model.train()
    model.model.layers[0].eval()
    model.model.layers[1].self_attn.q_proj.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.full_like(model.model.norm.weight, 3.0)
    calls = []
    model.model.register_forward_hook(lambda *_: calls.append("mine"))
    model.model.embed_tokens.weight.register_hook(lambda g: g)
    before, rng = everything_about(model), random_state()

    with pytest.raises(RuntimeError, match="in the middle"), scoring_mode(model):  # noqa: PT012
        assert not any(module.training for module in model.modules())
        assert all(p.grad is None for p in model.parameters())
        model.model.layers[0].train()
        model.lm_head.register_forward_hook(lambda *_: calls.append("leaked"))
        model.model.norm.weight.register_hook(lambda g: g)
        model.model.norm.weight.register_post_accumulate_grad_hook(lambda p: None)
        model.model.norm.weight.requires_grad_(False)
        loss = model(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)).loss
        loss.backward()
        torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
        raise RuntimeError("in the middle")

    after = everything_about(model)
    assert random_state() == rng
    for key in ("modes", "flags", "hooks", "tensor_hooks", "grad_ids"):
        assert after[key] == before[key], key
    for a, b in zip(before["weights"] + before["grads"], after["weights"] + after["grads"], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    calls.clear()
    model(input_ids=torch.ones(1, 4, dtype=torch.long))
    assert calls == ["mine"]


# -- losses


def assert_rows_alone_give_the_same(model, rows, *, is_causal_lm, collate=None, rtol=1e-4):
    """Batched losses equal transformers' own loss at batch one."""
    batch = (collate or PadRows())(rows)
    with torch.no_grad():
        losses, _ = model_example_losses(model, batch, is_causal_lm=is_causal_lm)
        single = [
            model(**{k: torch.as_tensor(v)[None] for k, v in row.items() if k != "attention_mask"}).loss for row in rows
        ]
    torch.testing.assert_close(losses, torch.stack(single).float(), rtol=rtol, atol=1e-5)


def test_causal_language_model():
    model = tiny_model(layers=2, width=32)
    rows = rows_of([4, 9, 13, 6], vocab=200)
    assert_rows_alone_give_the_same(model, rows, is_causal_lm=True)


def left_padded(rows):
    width = max(len(row["input_ids"]) for row in rows)
    pad = lambda row, name, fill: [fill] * (width - len(row["input_ids"])) + list(row[name])  # noqa: E731
    return {
        "input_ids": torch.tensor([pad(row, "input_ids", 0) for row in rows]),
        "labels": torch.tensor([pad(row, "labels", -100) for row in rows]),
        "attention_mask": torch.tensor(
            [[0] * (width - len(row["input_ids"])) + [1] * len(row["input_ids"]) for row in rows]
        ),
    }


def test_padding_on_the_left_does_not_move_absolute_positions():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()
    assert_rows_alone_give_the_same(model, rows_of([4, 9, 13]), is_causal_lm=True, collate=left_padded)


def test_encoder_decoder():
    torch.manual_seed(0)
    config = T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    rows = rows_of([5, 9], labels=lambda ids, n: ids[: 3 + n])
    assert_rows_alone_give_the_same(model, rows, is_causal_lm=False)


def test_masked_language_model_and_token_classifier():
    torch.manual_seed(0)
    rows = rows_of([5, 9, 7], labels=lambda ids, n: [t if i % 2 else -100 for i, t in enumerate(ids)])
    assert_rows_alone_give_the_same(BertForMaskedLM(BertConfig(**BERT)).eval(), rows, is_causal_lm=False)
    rows = rows_of([5, 9, 7], labels=lambda ids, n: [t % 3 for t in ids])
    model = BertForTokenClassification(BertConfig(**BERT, num_labels=3)).eval()
    assert_rows_alone_give_the_same(model, rows, is_causal_lm=False)


@pytest.mark.parametrize(
    ("num_labels", "label"),
    [(3, lambda n: n % 3), (1, lambda n: 0.5 * n), (3, lambda n: [1.0, 0.0, float(n)])],
    ids=["classes", "regression", "multi_label"],
)
def test_sequence_classifier_regressor_and_multi_label(num_labels, label):
    torch.manual_seed(0)
    rows = rows_of([5, 9, 7], labels=lambda ids, n: label(n))
    model = BertForSequenceClassification(BertConfig(**BERT, num_labels=num_labels)).eval()
    assert_rows_alone_give_the_same(model, rows, is_causal_lm=False)


def test_unknown_heads_are_asked_row_by_row():
    torch.manual_seed(0)
    model = BertForQuestionAnswering(BertConfig(**BERT)).eval()
    rows = [{"input_ids": r["input_ids"], "start_positions": 1, "end_positions": 3} for r in rows_of([6, 6, 6])]
    assert_rows_alone_give_the_same(model, rows, is_causal_lm=False)


def test_a_users_own_loss_is_respected_and_a_model_without_loss_is_named():
    class Own(nn.Module):
        def forward(self, input_ids, labels=None, attention_mask=None):
            logits = torch.zeros(len(input_ids), 3)
            return {"loss": 7.0 * labels.float().mean(), "logits": logits}

    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.tensor([1, 2])}
    assert model_example_losses(Own(), batch, is_causal_lm=False)[0].tolist() == [7.0, 14.0]
    model = BertForSequenceClassification(BertConfig(**BERT)).eval()
    with pytest.raises(DataError, match="BertForSequenceClassification returns no loss"):
        model_example_losses(model, {"input_ids": batch["input_ids"]}, is_causal_lm=False)


def test_the_fused_head_that_trl_patches_in_is_bypassed():
    from trl.trainer.utils import add_fused_lm_head

    plain = tiny_model(layers=2, width=32)
    patched = copy.deepcopy(plain)
    add_fused_lm_head(patched)
    batch = PadRows()(rows_of([4, 9, 13], vocab=200))
    expected, _ = model_example_losses(plain, batch, is_causal_lm=True)
    found, counts = model_example_losses(patched, batch, is_causal_lm=True)
    assert torch.equal(expected, found)
    assert counts.tolist() == [3, 8, 12]
    calls = []
    patched.lm_head.register_forward_hook(lambda *_: calls.append(1))
    model_example_losses(patched, batch, is_causal_lm=True)
    assert calls == [1]


def test_adapters_are_part_of_the_model_and_gradients_flow():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(layers=2, width=32), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    losses, _ = model_example_losses(model, PadRows()(rows_of([4, 9], vocab=200)), is_causal_lm=True)
    losses.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)


# -- a whole pool


def test_pool_losses_do_not_depend_on_the_batch_size_and_skip_invalid_rows():
    model = tiny_model(layers=2, width=32)
    rows = [*tokenised(tiny_pool(20), tiny_tokenizer()).select_columns(["input_ids", "labels"])]
    rows[3]["labels"] = [-100] * len(rows[3]["labels"])
    one = pool_losses(context_of(model, rows, batch_tokens=1), make_pool(rows))
    many = pool_losses(context_of(model, rows, batch_tokens=400), make_pool(rows))
    np.testing.assert_allclose(one, many, rtol=1e-4)
    assert np.flatnonzero(np.isnan(one)).tolist() == [3]


def test_every_batch_is_paid_for_before_it_runs():
    model, rows = tiny_model(layers=2, width=16), rows_of([8] * 6, vocab=200)
    forwards, bills = [], []
    model.register_forward_hook(lambda *_: forwards.append(1))

    def spend(flops, tokens):
        assert len(forwards) == len(bills)
        if len(bills) == 2:
            raise BudgetExceededError("third batch")
        bills.append((flops, tokens))

    context = context_of(
        model, rows, batch_tokens=16, spend=spend, forward_flops=lambda batch, length: 1000.0 * batch * length
    )
    model.train()
    with pytest.raises(BudgetExceededError, match="third batch"):
        pool_losses(context, context.pool)
    assert bills == [(16_000.0, 16.0)] * 2
    assert len(forwards) == 2
    assert model.training


def test_batches_of_a_pool_do_not_depend_on_its_order():
    rows = rows_of([8, 8, 8, 8, 5, 5, 5, 3], vocab=200)
    found = []
    for order in (range(8), [6, 2, 7, 0, 5, 3, 1, 4]):
        context = context_of(None, [rows[i] for i in order], batch_tokens=16)
        hashes = context.pool.row_hash
        found.append([[hashes[i] for i in positions] for positions, _ in pool_batches(context, context.pool, "x")])
    assert found[0] == found[1]


def test_both_stacks_of_an_encoder_decoder_are_paid_for():
    config = T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    rows = rows_of([5, 9], labels=lambda ids, n: ids[: 3 + n])
    bills = []
    context = context_of(
        T5ForConditionalGeneration(config).eval(),
        rows,
        is_causal_lm=False,
        spend=lambda flops, tokens: bills.append(tokens),
    )
    losses = pool_losses(context, context.pool)
    assert np.isfinite(losses).all()
    assert bills == [2 * (9 + 4)]


def test_a_stop_request_ends_scoring_between_batches():
    model, rows = tiny_model(layers=2, width=16), rows_of([8] * 6, vocab=200)
    answers = iter([False, True])
    context = context_of(model, rows, batch_tokens=16, stop_requested=lambda: next(answers))
    with pytest.raises(ScoringStoppedError, match="Scoring: stopped on request"):
        pool_losses(context, context.pool)


def test_hidden_states_can_still_be_asked_for_after_scoring():
    """transformers installs its capture hooks on first use; taking them away would lose later outputs."""
    model = tiny_model(2, 32)
    ids = torch.tensor([[5, 6, 7]])
    with scoring_mode(model):
        inside = model(input_ids=ids, output_hidden_states=True).hidden_states
    outside = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(outside) == len(inside) == 3
