"""Embeddings equal the pooled last hidden state of each row alone, whatever the batch, padding or order."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_eff.contracts.memory import BatchShape
from hf_eff.contracts.selection import SelectionContext
from hf_eff.engines.embeddings import (
    POOLINGS,
    centred,
    column_embeddings,
    embedding_flops,
    mean_vector,
    pool_embeddings,
    rows_by_content,
)
from hf_eff.engines.facts import model_facts
from hf_eff.errors import BudgetExceededError, DataError, ManifestError, OptionError
from hf_eff.numerics.flops import forward_flops
from hf_eff.testing.selection_scene import pool_of, toy_pool, unlabelled
from hf_eff.testing.tiny import collator, tiny_model, tiny_tokenizer


def scene(left=False, extra=0, **changes):
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left" if left else "right"
    pad = collator(tokenizer)

    def collate(rows):
        batch = dict(pad([dict(row) for row in rows]))
        sides = (extra, 0) if left else (0, extra)
        fill = {"labels": -100}
        return {k: torch.nn.functional.pad(v, sides, value=fill.get(k, 0)) for k, v in batch.items()}

    fields = {
        "pool": toy_pool(),
        "model": tiny_model(layers=2, width=32, attn_implementation="eager"),
        "batch_tokens": 120,
        "generator": torch.Generator(),
    }
    return SelectionContext(collate=collate, **{**fields, **changes})


def literal(model, row, pooling):
    """The definition, one row at a time and from the model's own list of hidden states."""
    with torch.no_grad():
        states = model(input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states[-1][0]
    states = states.double().numpy()
    tokens = len(states)
    weights = {"mean": np.ones(tokens), "last": np.eye(tokens)[-1], "weighted": np.arange(1, tokens + 1)}[pooling]
    vector = (weights / weights.sum()) @ states
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("left", [False, True])
def test_a_vector_is_the_pooled_hidden_state_of_its_row_alone(pooling, left):
    context = scene(left=left, extra=3)
    found = pool_embeddings(context, context.pool, pooling=pooling)
    expected = [literal(context.model, row, pooling) for row in context.pool.rows]
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert found.dtype == np.float32
    assert np.abs(expected[0] - expected[1]).max() > 0.01


@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
def test_batch_size_does_not_matter(batch_tokens):
    plain, other = scene(), scene(batch_tokens=batch_tokens)
    first = pool_embeddings(plain, plain.pool, pooling="weighted")
    np.testing.assert_allclose(pool_embeddings(other, other.pool, pooling="weighted"), first, atol=2e-6)


def test_order_of_the_pool_does_not_matter_to_a_bit():
    order = np.random.default_rng(1).permutation(24).tolist()
    plain, other = scene(), scene(pool=toy_pool(order=order))
    first, second = (pool_embeddings(context, context.pool) for context in (plain, other))
    assert np.array_equal(first[order], second)


def test_what_padding_holds_does_not_count():
    plain, other = scene(), scene(extra=5)
    poison = other.collate

    def collate(rows):
        batch = poison(rows)
        return {**batch, "input_ids": torch.where(batch["attention_mask"] == 0, 77, batch["input_ids"])}

    first = pool_embeddings(plain, plain.pool)
    np.testing.assert_allclose(pool_embeddings(replace(other, collate=collate), other.pool), first, atol=2e-6)


def other_models():
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        GPT2Config,
        GPT2LMHeadModel,
        T5Config,
        T5ForConditionalGeneration,
    )

    sizes = {"vocab_size": 262}
    gpt2 = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2, **sizes)
    bert = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=64,
        **sizes,
    )  # fmt: skip
    t5 = T5Config(
        d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0,
        attn_implementation="eager", **sizes,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            "gpt2": GPT2LMHeadModel(gpt2).eval(),
            "bert": BertForMaskedLM(bert).eval(),
            "t5": T5ForConditionalGeneration(t5).eval(),
        }


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_other_families(name):
    model = other_models()[name]
    context = scene(model=model, is_causal_lm=name == "gpt2", left=name == "gpt2")
    found = pool_embeddings(context, context.pool)
    for place in (0, 11):
        ids = torch.tensor([context.pool.rows[place]["input_ids"]])
        with torch.no_grad():
            if name == "t5":
                states = model.get_encoder()(input_ids=ids)[0][0]
            else:
                states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        alone = torch.nn.functional.normalize(states.mean(dim=0), dim=0).numpy()
        np.testing.assert_allclose(found[place], alone, atol=2e-6)


def test_adapters_count():
    peft = pytest.importorskip("peft")
    plain = scene()
    before = pool_embeddings(plain, plain.pool)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        adapted = replace(plain, model=peft.get_peft_model(plain.model, config).eval())
    after = pool_embeddings(adapted, plain.pool)
    assert np.abs(after - before).max() > 1e-3
    expected = [literal(adapted.model, row, "mean") for row in plain.pool.rows]
    np.testing.assert_allclose(after, expected, atol=2e-6)


def test_rows_without_loss_and_broken_rows_have_no_vector():
    context = scene()
    kept = context.pool.loss_lengths.copy()
    kept[[2, 9]] = 0
    pool = replace(context.pool, loss_lengths=kept)
    tokens = [set(row["input_ids"]) for row in pool.rows]
    token = next(t for t in sorted(set.union(*tokens)) if 1 <= sum(t in row for row in tokens) <= 3)
    with torch.no_grad():
        context.model.get_input_embeddings().weight[token] = float("nan")
    broken = {i for i, row in enumerate(tokens) if token in row}
    found = pool_embeddings(context, pool)
    assert set(np.flatnonzero(np.isnan(found).all(axis=1))) == {2, 9} | broken
    assert set(np.flatnonzero(np.isnan(found).any(axis=1))) == {2, 9} | broken
    assert set(rows_by_content(pool, found)) == set(range(24)) - {2, 9} - broken


def test_the_head_is_neither_run_nor_charged():
    pool = pool_of([{"input_ids": [5 + i] * 20, "labels": [5 + i] * 20} for i in range(8)])
    charged = []
    context = scene(pool=pool, spend=lambda flops, tokens: charged.append((flops, tokens)))
    with FlopCounterMode(display=False) as counter:
        pool_embeddings(context, pool)
    facts = model_facts(context.model)
    assert sum(flops for flops, _ in charged) == embedding_flops(facts, 8, 20)
    assert sum(tokens for _, tokens in charged) == 160
    # The pooling's own multiply-adds, 2 h a token, are not counted.
    assert counter.get_total_flops() - 2 * 160 * 32 == pytest.approx(embedding_flops(facts, 8, 20), rel=0.01)
    head = 2 * 160 * facts.head_matmul_params
    assert head > 0
    assert embedding_flops(facts, 8, 20) == forward_flops(facts, BatchShape(8, 20)) - head


def test_encoder_decoders_are_charged_for_the_encoder():
    model = other_models()["t5"]
    pool = pool_of([{"input_ids": [5 + i] * 20, "labels": [5 + i] * 20} for i in range(8)])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.get_encoder()(input_ids=torch.tensor([row["input_ids"] for row in pool.rows]))
    assert embedding_flops(model_facts(model), 8, 20) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_centring_subtracts_the_mean_and_scales_again():
    context = scene()
    plain, moved = pool_embeddings(context, context.pool), pool_embeddings(context, context.pool, center=True)
    expected = plain - plain.astype(np.float64).mean(axis=0)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(moved, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(moved, axis=1), 1, atol=1e-6)
    assert (plain @ plain.T).mean() > (moved @ moved.T).mean() + 0.1


def test_a_row_at_the_mean_becomes_zero_and_missing_rows_stay_missing():
    vectors = np.array([[1, 0], [1, 0], [np.nan, np.nan]], dtype=np.float32)
    found = centred(vectors, mean_vector(vectors))
    assert np.array_equal(found[:2], np.zeros((2, 2)))
    assert np.isnan(found[2]).all()


class Tally:
    def __init__(self, limit=math.inf):
        self.calls, self.limit = 0, limit

    def __call__(self, flops, tokens):
        if self.calls >= self.limit:
            raise BudgetExceededError("enough")
        self.calls += 1


def test_interrupted_anywhere_and_resumed_is_bit_identical(tmp_path):
    whole = Tally()
    expected = pool_embeddings(scene(spend=whole), toy_pool())
    assert whole.calls >= 4
    for limit in range(whole.calls):
        folder, rest = tmp_path / str(limit), Tally()
        with pytest.raises(BudgetExceededError):
            pool_embeddings(scene(spend=Tally(limit), store_dir=folder), toy_pool())
        found = pool_embeddings(scene(spend=rest, store_dir=folder), toy_pool())
        assert rest.calls == whole.calls - limit
        assert np.array_equal(found, expected)


def test_a_batch_that_is_done_in_part_is_redone_as_a_whole(tmp_path):
    expected = pool_embeddings(scene(store_dir=tmp_path), toy_pool())
    (flags,) = tmp_path.rglob("done.bin")
    done = np.fromfile(flags, dtype=np.uint8)
    done[7] = 0
    done.tofile(flags)
    collated, plain = [], scene(store_dir=tmp_path)
    context = replace(plain, collate=lambda rows: collated.append(len(rows)) or plain.collate(rows))
    assert np.array_equal(pool_embeddings(context, toy_pool()), expected)
    assert len(collated) == 1
    assert collated[0] > 1


def test_pool_and_target_and_poolings_share_a_folder_and_another_model_is_refused(tmp_path):
    context = scene(store_dir=tmp_path)
    first = pool_embeddings(context, context.pool)
    part = context.pool.take(range(5))
    np.testing.assert_allclose(pool_embeddings(context, part), first[:5], atol=2e-6)
    assert not np.allclose(pool_embeddings(context, context.pool, pooling="last"), first)
    assert np.array_equal(pool_embeddings(replace(context, spend=Tally(0)), context.pool), first)
    with pytest.raises(ManifestError, match="model is"):
        pool_embeddings(scene(store_dir=tmp_path, model=tiny_model(layers=2, width=32, seed=1)), context.pool)


def test_the_model_is_left_as_found():
    context = scene()
    context.model.train()
    before = torch.random.get_rng_state()
    pool_embeddings(context, context.pool)
    assert context.model.training
    assert torch.equal(before, torch.random.get_rng_state())


def test_columns_bring_their_own_vectors():
    pool = toy_pool(4)
    pool.examples = [{"vector": vector} for vector in ([3, 4], [0, 0], None, [0, -2])]
    found = column_embeddings(pool, "vector")
    np.testing.assert_allclose(found[[0, 3]], [[0.6, 0.8], [0, -1]], atol=1e-7)
    assert np.isnan(found[[1, 2]]).all()
    pool.loss_lengths[0] = 0
    assert np.isnan(column_embeddings(pool, "vector")[0]).all()


def test_bad_columns_are_named():
    pool = toy_pool(2)
    with pytest.raises(DataError, match="came without its columns"):
        column_embeddings(pool, "vector")
    for examples, message in (
        ([{"v": [1.0]}, {"v": [1.0]}], "no column 'vector'"),
        ([{"vector": [1.0]}, {"vector": [1.0, 2.0]}], "all of one length"),
        ([{"vector": None}, {"vector": None}], "must hold one vector a row"),
        ([{"vector": "text"}, {"vector": "text"}], "lists of numbers"),
    ):
        pool.examples = examples
        with pytest.raises(DataError, match=message):
            column_embeddings(pool, "vector")


def test_bad_poolings_and_models_are_named():
    with pytest.raises(OptionError, match="pooling must be one of"):
        pool_embeddings(scene(), toy_pool(), pooling="max")
    empty = unlabelled(toy_pool(3))
    with pytest.raises(DataError, match="no row of the pool has a finite embedding"):
        rows_by_content(empty, pool_embeddings(scene(pool=empty), empty))
    with pytest.raises(DataError, match="no row of the pool has a finite embedding"):
        mean_vector(np.full((3, 2), np.nan, dtype=np.float32))


def test_rows_come_in_the_order_of_their_content():
    pool = toy_pool(6)
    vectors = np.ones((6, 2), dtype=np.float32)
    vectors[3] = np.nan
    hashes = [pool.row_hash[row] for row in rows_by_content(pool, vectors)]
    assert hashes == sorted(set(pool.row_hash) - {pool.row_hash[3]})
    assert rows_by_content(replace(pool, row_hash=None), vectors).tolist() == [0, 1, 2, 4, 5]
