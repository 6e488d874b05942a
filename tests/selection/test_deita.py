"""deita: marks by the definition, summed over turns; no kept pair is alike, and what was skipped has a better twin."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from hf_eff.contracts.cost import Facts
from hf_eff.engines.embeddings import pool_embeddings
from hf_eff.engines.facts import model_facts
from hf_eff.engines.pooling import PadRows, make_pool
from hf_eff.errors import BudgetExceededError, DataError, OptionError, OutsideIntendedUseWarning
from hf_eff.registry import get_method
from hf_eff.selection import deita
from hf_eff.selection.deita import DeitaConfig, cost
from hf_eff.testing.selection_scene import chosen_hashes, make_context, pick, pool_facts_of, toy_pool
from hf_eff.testing.tiny import tiny_model, tiny_tokenizer

SPEC = get_method("selection", "deita")
QUESTIONS = {"complexity_prompt": "How hard is {instruction}?", "quality_prompt": "{instruction} {answer} good?"}
GIVEN = {"complexity_column": "hard", "quality_column": "good"}


def sharp_model(seed=0, **changes):
    """Random model whose marks and states differ by more than rounding."""
    model = tiny_model(layers=2, width=32, seed=seed, attn_implementation="eager", tie_word_embeddings=False, **changes)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def chat(*texts):
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


CHATS = [chat("a", "bb"), chat("why?", "so.", "and then?", "nothing"), chat("x y z", "1 2 3"), chat("q", "r", "s", "t")]


def context_of(rows, **changes):
    tokenizer = tiny_tokenizer()
    pool = make_pool(rows, processing_class=tokenizer)
    return make_context(
        SPEC, proxy=None, **{"pool": pool, "model": sharp_model(), "collate": PadRows.of(tokenizer), **changes}
    )


def mark(model, question):
    """The definition, one question at a time."""
    tokenizer = tiny_tokenizer()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1].double()
    weights = {digit: logits[tokenizer(str(digit))["input_ids"][0]].exp() for digit in range(1, 7)}
    return float(sum(digit * weight for digit, weight in weights.items()) / sum(weights.values()))


@pytest.mark.parametrize("turns", ["sum", "mean"])
def test_scores_are_products_of_marks_over_turns(turns):
    picks = pick(SPEC, context_of(CHATS), fraction=1.0, turns=turns, **QUESTIONS)
    model, expected = sharp_model(), []
    for row in CHATS:
        texts = [message["content"] for message in row["messages"]]
        pairs = list(zip(texts[::2], texts[1::2], strict=True))
        products = [
            mark(model, f"How hard is {asked}?") * mark(model, f"{asked} {told} good?") for asked, told in pairs
        ]
        expected.append(sum(products) / (len(products) if turns == "mean" else 1))
    np.testing.assert_allclose(picks.scores, expected, rtol=1e-4)
    assert len(set(np.round(expected, 3))) == 4


def test_columns_take_the_place_of_questions():
    rows = [
        {**chat("a", "b"), "hard": 2.0, "good": [3.0]},
        {**chat("a", "b", "c", "d"), "hard": 1.0, "good": [5.0, 6.0]},
        {**chat("e", "f"), "hard": 4.0, "good": [None]},
        {**chat("g", "h"), "hard": 4.0, "good": None},
    ]
    context = context_of(rows, tokenizer=None)
    picks = pick(SPEC, context, fraction=None, num_examples=2, **GIVEN)
    np.testing.assert_array_equal(picks.scores, [6.0, 11.0, np.nan, np.nan])
    assert picks.positions.tolist() == [1, 0]
    half = pick(SPEC, context_of(rows), fraction=None, num_examples=2, quality_column="good", **QUESTIONS)
    np.testing.assert_allclose(half.scores[0], 3 * mark(sharp_model(), "How hard is a?"), rtol=1e-4)


def alike(count=60):
    """Rows of two columns of marks, in twins whose tokens differ little."""
    generator, rows = np.random.default_rng(0), []
    for place in range(count):
        text = "".join(generator.choice(list("abcdefgh"), 12)) if place % 3 else "aaaabbbbcccc"
        rows.append({**chat(text, text[::-1]), "hard": float(generator.uniform(1, 6)), "good": [1.0]})
    return rows


@pytest.mark.parametrize(("tau", "center"), [(0.0, True), (0.5, True), (0.9, True), (0.9, False)])
def test_no_kept_pair_is_alike_and_skipped_rows_have_a_better_twin(tau, center):
    context = context_of(alike())
    options = {"tau": tau, "center": center, "fraction": 1.0, "fill": False, **GIVEN}
    picks = pick(SPEC, context, **options)
    vectors = pool_embeddings(context, context.pool, center=center)
    kept = picks.positions
    assert 1 < len(kept) < 60
    cosines = vectors[kept] @ vectors[kept].T
    np.fill_diagonal(cosines, -1)
    assert cosines.max() <= tau + 1e-6
    assert (np.diff(picks.scores[kept]) <= 0).all()
    for row in set(range(60)) - set(kept.tolist()):
        better = [other for other in kept if picks.scores[other] >= picks.scores[row]]
        assert max(float(vectors[row] @ vectors[other]) for other in better) > tau - 1e-6


def test_the_best_of_the_others_fill_up():
    context, options = context_of(alike()), {"tau": 0.5, "fraction": None, **GIVEN}
    alone = pick(SPEC, context, **{**options, "fraction": 1.0, "fill": False}).positions
    filled = pick(SPEC, context, num_examples=len(alone) + 4, **options)
    assert filled.positions[: len(alone)].tolist() == alone.tolist()
    rest = [row for row in np.argsort(-filled.scores) if row not in alone]
    assert filled.positions[len(alone) :].tolist() == rest[:4]
    assert [("fills up" in reason) for reason in filled.reasons] == [False] * len(alone) + [True] * 4
    assert filled.notes["unlike"] == len(alone)


def test_a_token_limit_keeps_the_ranking():
    context = context_of(alike())
    limit = int(context.pool.lengths.sum() // 3)
    picks = pick(SPEC, context, fraction=None, num_tokens=limit, tau=1.0, **GIVEN)
    ranked = np.argsort(-picks.scores)
    used = np.cumsum(context.pool.lengths[ranked])
    assert picks.positions.tolist() == ranked[used <= limit].tolist()


def test_vectors_may_come_in_a_column():
    rows = [{**row, "vector": [1.0, float(place % 2)]} for place, row in enumerate(alike(6))]
    options = {"embedding_column": "vector", "center": False, "tau": 0.9, "fill": False, **GIVEN}

    def refuse(flops, tokens):
        raise BudgetExceededError("computed")

    picks = pick(SPEC, context_of(rows, spend=refuse), fraction=1.0, **options)
    best = [max(range(odd, 6, 2), key=lambda place: picks.scores[place]) for odd in (0, 1)]
    assert sorted(picks.positions.tolist()) == sorted(best)


@pytest.mark.parametrize("batch_tokens", [1, 100, 100_000])
def test_the_batch_size_does_not_matter(batch_tokens):
    alone = pick(SPEC, context_of(CHATS, batch_tokens=1), fraction=1.0, **QUESTIONS)
    other = pick(SPEC, context_of(CHATS, batch_tokens=batch_tokens), fraction=1.0, **QUESTIONS)
    np.testing.assert_allclose(other.scores, alone.scores, rtol=1e-4)
    assert other.positions.tolist() == alone.positions.tolist()


def test_the_order_of_the_rows_does_not_matter_to_the_last_bit():
    plain, order = toy_pool(24), np.random.default_rng(3).permutation(24)
    turned = toy_pool(24, order)
    first, second = (
        pick(SPEC, make_context(SPEC, proxy=None, pool=pool, model=sharp_model())) for pool in (plain, turned)
    )
    assert np.array_equal(first.scores[order], second.scores)
    assert chosen_hashes(first, plain) == chosen_hashes(second, turned)


def test_long_questions_are_cut():
    rows = [chat("a" * 300, "b" * 300), chat("c", "d")]
    sizes = []
    context = context_of(rows, spend=lambda flops, tokens: sizes.append(tokens), batch_tokens=1)
    pick(SPEC, context, fraction=1.0, scorer_tokens=100, **QUESTIONS)
    assert sizes[0] == 100  # complexity of the long row
    # The user and assistant marks and the question's own words take room; both pieces share the rest evenly.
    assert sizes[2] in (99, 100)


def test_the_predicted_cost_is_what_is_spent():
    rows = [chat("a" * 40, chr(98 + i) * 37) for i in range(16)]
    bills = []
    context = context_of(rows, spend=lambda flops, tokens: bills.append((flops, tokens)))
    assert len(set(context.pool.lengths.tolist())) == 1
    for options in ({}, {"quality_column": "good"}, {"embedding_column": "vector"}):
        bills.clear()
        marked = [{**row, "good": [1.0], "vector": [1.0, float(i)]} for i, row in enumerate(rows)]
        context = context_of(marked, spend=lambda flops, tokens: bills.append((flops, tokens)))
        pick(SPEC, context, **options)
        facts = Facts(model=model_facts(context.model), pool=pool_facts_of(context.pool, None))
        predicted = cost(DeitaConfig(**options), facts)
        assert sum(flops for flops, _ in bills) == pytest.approx(predicted.flops, rel=0.1)
        assert sum(tokens for _, tokens in bills) == pytest.approx(predicted.tokens, rel=0.1)


def test_a_tokenizer_without_digits_is_warned_about(monkeypatch):
    monkeypatch.setattr(deita, "digit_tokens", lambda tokenizer: None)
    with pytest.warns(OutsideIntendedUseWarning, match="no single tokens for the digits 1 to 6"):
        picks = pick(SPEC, context_of(CHATS), fraction=1.0)
    assert picks.scores.tolist() == [9.0, 18.0, 9.0, 18.0]


def test_a_broken_model_is_named():
    model = sharp_model()
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    with pytest.raises(DataError, match="no row of the pool has a finite mark and embedding"):
        pick(SPEC, context_of(CHATS, model=model))


def test_notes_are_json():
    notes = json.loads(json.dumps(dict(pick(SPEC, context_of(CHATS), fraction=1.0, tau=0.3).notes)))
    assert notes["tau"] == 0.3
    assert len(notes["digit_tokens"]) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"complexity_prompt": "How hard?"}, r"complexity_prompt must hold \{instruction\}; put it in"),
        ({"quality_prompt": "{instruction}"}, r"quality_prompt must hold \{answer\}; put it in"),
        ({"tau": 1.5}, r"tau must be in \[-1.0, 1.0\]"),
    ],
)
def test_options_that_cannot_work_are_named(options, message):
    with pytest.raises(OptionError, match=message):
        DeitaConfig(**options)


def test_data_that_cannot_be_scored_is_named():
    with pytest.raises(DataError, match="has no tokenizer; pass processing_class=, or name complexity_column"):
        pick(SPEC, context_of(CHATS, tokenizer=None))
    with pytest.raises(DataError, match="the pool has no column 'hard'"):
        pick(SPEC, context_of(CHATS), **GIVEN)
    words = [{**row, "hard": "very", "good": 1.0} for row in CHATS]
    with pytest.raises(DataError, match="column 'hard' must hold numbers, or lists of them, got 'very'"):
        pick(SPEC, context_of(words), **GIVEN)
    uneven = [{**row, "hard": [1.0, 2.0, 3.0], "good": [1.0, 2.0]} for row in CHATS]
    with pytest.raises(DataError, match="3 marks of complexity and 2 of quality; give one a turn"):
        pick(SPEC, context_of(uneven), **GIVEN)


def test_an_impossible_size_costs_nothing():
    def spend(flops, tokens):
        raise BudgetExceededError("computed")

    with pytest.raises(DataError, match="num_examples=99 is more than the 4 valid rows"):
        pick(SPEC, context_of(CHATS, spend=spend), fraction=None, num_examples=99)
