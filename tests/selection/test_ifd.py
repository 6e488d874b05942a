"""ifd: both passes score the same tokens; toy language models have the scores that their rules imply."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_eff.contracts.cost import Facts
from hf_eff.engines.facts import model_facts
from hf_eff.errors import DataError
from hf_eff.registry import get_method
from hf_eff.testing.selection_scene import make_context, pick, pool_facts_of, pool_of, toy_pool
from hf_eff.testing.tiny import tiny_model

SPEC = get_method("selection", "ifd")
VOCAB, BOS = 262, 1
VARIANTS = ("ppl_ratio", "loss_ratio")


class TableForCausalLM(torch.nn.Module):
    """Next token by a table: the logits after a token are its row, whatever came before."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Parameter(table)

    def forward(self, input_ids, attention_mask=None):
        return {"logits": self.table[input_ids]}


class CopyForCausalLM(torch.nn.Module):
    """Repeats, with certainty, the token of some positions ago; uniform where there is none."""

    def __init__(self, period):
        super().__init__()
        self.period, self.scale = period, torch.nn.Parameter(torch.tensor(1e4))

    def forward(self, input_ids, attention_mask=None):
        logits = torch.zeros(*input_ids.shape, VOCAB)
        back = input_ids[:, : max(0, input_ids.shape[1] - self.period + 1)]
        logits[:, self.period - 1 :] = torch.nn.functional.one_hot(back, VOCAB) * self.scale
        return {"logits": logits}


def row(prompt, answer):
    return {"input_ids": [*prompt, *answer], "labels": [-100] * len(prompt) + list(answer)}


def scene(model=None, rows=None, **changes):
    """Scored by the model, without a proxy."""
    pool = toy_pool() if rows is None else pool_of(rows)
    return make_context(SPEC, pool=pool, proxy=None, **({} if model is None else {"model": model}), **changes)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_answer_independent_of_its_prompt_scores_one(variant):
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))
    model = TableForCausalLM(logits.expand(VOCAB, VOCAB).clone())
    picks = pick(SPEC, scene(model), variant=variant)
    assert picks.scores.tolist() == [1.0] * 24


def test_a_perfect_copy_scores_nothing():
    rows = [row([a, a + 1, a + 2, 9], [a, a + 1, a + 2]) for a in range(20, 30)]
    model = CopyForCausalLM(period=4)
    assert pick(SPEC, scene(model, rows), variant="loss_ratio").scores.tolist() == [0.0] * 10
    # Given its prompt the answer is certain; alone each token is one of the vocabulary.
    assert pick(SPEC, scene(model, rows)).scores == pytest.approx([1 / VOCAB] * 10)


def answer_means(model, ids, start, stop):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(1)
    return -np.mean([float(logits[t - 1, ids[t]]) for t in range(start, stop)])


def literal(model, example, variant):
    """Mean over turns of the ratio, each turn read with all before it, and alone behind one token."""
    ids, labels, scores, start = example["input_ids"], [*example["labels"], -100], [], None
    for place, label in enumerate(labels):
        if label != -100 and start is None:
            start = place
        if label == -100 and start is not None:
            if start:
                given = answer_means(model, ids, start, place)
                alone = answer_means(model, [BOS, *ids[start:place]], 1, 1 + place - start)
                scores.append(given / alone if variant == "loss_ratio" else math.exp(given - alone))
            start = None
    return np.mean(scores)


def sharp_model():
    model = tiny_model(layers=2, width=32, attn_implementation="eager")
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
    return model


def chats():
    """Rows of one to three turns, one of which begins with an answer, and answers of one token."""
    rows = toy_pool(6).rows
    chat = {name: [*rows[0][name], *rows[1][name], *rows[2][name]] for name in ("input_ids", "labels")}
    begins = {name: [*rows[3][name][-4:], *rows[4][name]] for name in ("input_ids", "labels")}
    return [*rows, chat, begins, row([7, 8, 9], [50]), row([7], [51, 52])]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("changes", [{}, {"batch_tokens": 1}, {"extra_padding": 9}])
def test_scores_are_the_definition_turn_by_turn(variant, changes):
    model = sharp_model()
    picks = pick(SPEC, scene(model, chats(), **changes), variant=variant)
    np.testing.assert_allclose(picks.scores, [literal(model, each, variant) for each in chats()], rtol=1e-4)
    assert picks.notes["num_turns"] == 12
    assert picks.notes["variant"] == variant


def test_left_padding_is_the_same():
    def left(rows):
        width = max(len(each["input_ids"]) for each in rows)
        fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
        padded = [{**each, "attention_mask": [1] * len(each["input_ids"])} for each in rows]
        return {
            name: torch.tensor([[fill[name]] * (width - len(each[name])) + list(each[name]) for each in padded])
            for name in fill
        }

    model = sharp_model()
    plain, turned = pick(SPEC, scene(model, chats())), pick(SPEC, scene(model, chats(), collate=left))
    np.testing.assert_allclose(plain.scores, turned.scores, rtol=1e-4)


def test_both_passes_score_the_same_tokens():
    context, seen = scene(sharp_model(), chats()), []

    def counting(rows):
        batch = collate(rows)
        seen.append((batch["input_ids"].shape, int((batch["labels"] != -100).sum())))
        return batch

    collate = context.collate
    pick(SPEC, replace(context, collate=counting, batch_tokens=1))
    given = sum(count for _, count in seen[:10])
    alone = sum(count for _, count in seen[10:])
    # The row that begins with an answer has four tokens that no prompt goes before.
    assert given == alone + 4
    assert len(seen) == 10 + 12


def pairs(shuffled):
    """Questions q whose answer is q + 50, behind a table that knows so, more or less."""
    answers = np.arange(100, 140)
    if shuffled:
        answers = np.random.default_rng(0).permutation(answers)
    return [row([5, question], [int(answer), 6]) for question, answer in zip(range(50, 90), answers, strict=True)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_shuffled_pairs_score_above_one_more_often(variant):
    table = torch.zeros(VOCAB, VOCAB)
    table[range(50, 90), range(100, 140)] = 4.0
    share = {
        shuffled: np.mean(pick(SPEC, scene(TableForCausalLM(table), pairs(shuffled)), variant=variant).scores >= 1)
        for shuffled in (False, True)
    }
    assert share[False] == 0.0
    assert share[True] > 0.9


def test_unhelpful_prompts_are_dropped_or_last():
    table = torch.zeros(VOCAB, VOCAB)
    table[range(50, 90), range(100, 140)] = torch.linspace(-2, 4, 40)
    context = scene(TableForCausalLM(table), pairs(False))
    below = np.flatnonzero(pick(SPEC, context).scores < 1)
    assert 0 < len(below) < 40
    dropped = pick(SPEC, context, unhelpful="drop", fraction=1.0)
    assert dropped.positions.tolist() == below[np.argsort(-dropped.scores[below])].tolist()
    assert dropped.notes["num_unhelpful"] == 40 - len(below)
    last = pick(SPEC, context, unhelpful="last", fraction=1.0)
    assert last.positions[: len(below)].tolist() == dropped.positions.tolist()
    assert (np.diff(last.scores[last.positions[len(below) :]]) >= 0).all()
    with pytest.raises(DataError, match="none of 40 scored rows is below 1"):
        pick(SPEC, scene(TableForCausalLM(-table.abs()), pairs(False)), unhelpful="drop")


def test_rows_without_a_prompt_are_invalid():
    rows = [row([], [7, 8, 9]), row([5], [7, 8]), {"input_ids": [4, 5, 6], "labels": [4, 5, 6]}]
    picks = pick(SPEC, scene(sharp_model(), rows), fraction=1.0)
    assert np.isnan(picks.scores).tolist() == [True, False, True]
    assert picks.positions.tolist() == [1]
    with pytest.raises(DataError, match="no row of the pool has a prompt"):
        pick(SPEC, scene(sharp_model(), rows[::2]))
    bare = pool_of(rows)
    bare.rows[0].pop("labels")
    assert np.isnan(pick(SPEC, make_context(SPEC, pool=bare, proxy=None), fraction=1.0).scores[0])


def test_the_first_token_is_found_or_asked_for():
    model = sharp_model()
    plain = pick(SPEC, scene(model)).scores
    for tokenizer in (None, SimpleNamespace(bos_token_id=None, eos_token_id=BOS)):
        # The model's own configuration has the same beginning-of-text token.
        assert np.array_equal(pick(SPEC, scene(model, tokenizer=tokenizer)).scores, plain)
    with pytest.raises(DataError, match="neither tokenizer nor model has"):
        pick(SPEC, scene(TableForCausalLM(torch.zeros(VOCAB, VOCAB)), tokenizer=None))


def test_the_proxy_scores_where_there_is_one():
    context = make_context(SPEC)
    with torch.no_grad():
        context.model.model.norm.weight.fill_(float("nan"))
    picks = pick(SPEC, context)
    alone = pick(SPEC, replace(context, model=context.proxy.model, proxy=None))
    assert np.array_equal(picks.scores, alone.scores)
    assert (picks.notes["scored_by"], alone.notes["scored_by"]) == ("the proxy", "the model")


def test_notes_report_by_answer_length():
    notes = pick(SPEC, scene(sharp_model(), chats()), fraction=0.5).notes["by_answer_tokens"]
    assert json.loads(json.dumps(notes)) == notes
    assert sum(bucket["rows"] for bucket in notes.values()) == 10
    assert sum(bucket["kept"] for bucket in notes.values()) == 5
    assert notes["1-4"]["rows"] == sum(
        sum(label != -100 for label in each["labels"][1:]) < 5 for each in chats() if each["labels"][0] == -100
    )


def test_both_passes_are_charged_and_predicted():
    # Answers of half a row, as the forecast supposes.
    rows, bills = [row([5 + i] * 10, [9 + i] * 10) for i in range(16)], []
    context = scene(None, rows, spend=lambda flops, tokens: bills.append((flops, tokens)))
    pick(SPEC, context)
    predicted = SPEC.cost(
        SPEC.config(), Facts(model=model_facts(context.model), pool=pool_facts_of(context.pool, None))
    )
    assert sum(tokens for _, tokens in bills) == predicted.tokens == 16 * (20 + 11)
    assert sum(flops for flops, _ in bills) == pytest.approx(predicted.flops, rel=1e-12)
