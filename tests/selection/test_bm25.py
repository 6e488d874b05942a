"""bm25: scores are the formula over prompts, a query a group."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hf_eff.engines.pooling import make_pool
from hf_eff.errors import DataError, ScoringStoppedError
from hf_eff.registry import get_method
from hf_eff.testing.selection_scene import chosen_hashes, make_context, pick, pool_of, toy_pool, toy_target
from hf_eff.testing.tiny import tiny_tokenizer

SPEC = get_method("selection", "bm25")
POOL = [
    {"prompt": "How do cats purr?", "completion": "A dog barks."},
    {"prompt": "The DOG, the cat & the bird", "completion": "Cats."},
    {"prompt": "Birds fly south.", "completion": "Yes."},
    {"prompt": "What is the sum of dogs", "completion": "No."},
]
TARGET = [
    {"prompt": "the dog", "completion": "x", "group": "pets"},
    {"prompt": "the cat?", "completion": "y", "group": "pets"},
    {"prompt": "Birds fly", "completion": "z", "group": "wild"},
]


def context_of(pool=POOL, target=TARGET, tokenizer=None, **changes):
    pools = [make_pool(rows, processing_class=tiny_tokenizer()) for rows in (pool, target)]
    return make_context(SPEC, **{"pool": pools[0], "reference": pools[1], "tokenizer": tokenizer, **changes})


def literal(documents, query, k1=1.5, b=0.75):
    mean, found = sum(map(len, documents)) / len(documents), []
    for document in documents:
        score = 0.0
        for term in query:
            holders, f = sum(term in other for other in documents), document.count(term)
            idf = math.log(1 + (len(documents) - holders + 0.5) / (holders + 0.5))
            score += idf * f * (k1 + 1) / (f + k1 * (1 - b + b * len(document) / mean))
        found.append(score)
    return np.array(found)


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.4)])
def test_scores_are_the_formula_a_query_a_group(k1, b):
    documents = ["how do cats purr", "the dog the cat the bird", "birds fly south", "what is the sum of dogs"]
    documents = [text.split() for text in documents]
    pets = literal(documents, ["the", "dog", "the", "cat"], k1, b) / 2  # two rows
    wild = literal(documents, ["birds", "fly"], k1, b)
    picks = pick(SPEC, context_of(), fraction=None, num_examples=3, k1=k1, b=b)
    np.testing.assert_allclose(picks.scores, (pets + wild) / 2, rtol=1e-12)
    assert picks.positions.tolist() == np.argsort(-picks.scores)[:3].tolist()
    assert dict(picks.notes) == {"groups": ["pets", "wild"], "terms": "words", "rows_without_a_match": 1}
    closest = {
        row: reason.rsplit(" ", 1)[1] for row, reason in zip(picks.positions.tolist(), picks.reasons, strict=True)
    }
    assert closest == {1: "pets", 2: "wild", 3: "pets"}


def test_a_group_counts_once_however_many_rows_it_has():
    scores = pick(SPEC, context_of()).scores
    copied = [*TARGET[:2] * 5, TARGET[2]]
    np.testing.assert_allclose(pick(SPEC, context_of(target=copied)).scores, scores, rtol=1e-12)


def test_rows_without_a_prompt_are_read_whole():
    rows = [{"text": "cats purr"}, {"text": "the dog barks"}]
    picks = pick(SPEC, context_of(pool=rows), fraction=None, num_examples=1)
    assert picks.positions.tolist() == [1]
    assert picks.scores[0] == 0


def test_the_decoded_and_the_original_text_score_alike():
    tokenizer, pool = tiny_tokenizer(), make_pool(POOL, processing_class=tiny_tokenizer())
    pool.examples = None
    plain = pick(SPEC, context_of()).scores
    np.testing.assert_allclose(pick(SPEC, context_of(pool=POOL, tokenizer=tokenizer)).scores, plain)
    decoded = make_context(SPEC, pool=pool, reference=context_of().reference, tokenizer=tokenizer)
    np.testing.assert_allclose(pick(SPEC, decoded).scores, plain, rtol=1e-12)


def test_token_ids_take_the_place_of_words():
    def tokens(prompt, answer=(9,)):
        return {"input_ids": [*prompt, *answer], "labels": [-100] * len(prompt) + list(answer)}

    documents, target = [[5, 6], [7, 8, 8], [6]], [[8], [8, 6]]
    pool, reference = (pool_of([tokens(each) for each in rows], None) for rows in (documents, target))
    picks = pick(SPEC, make_context(SPEC, pool=pool, reference=reference, tokenizer=None), fraction=1.0)
    np.testing.assert_allclose(picks.scores, literal(documents, [8, 8, 6]) / 2, rtol=1e-12)
    assert picks.notes["terms"] == "token ids"


def test_tokens_can_be_asked_for():
    picks = pick(SPEC, context_of(tokenizer=tiny_tokenizer()), terms="tokens")
    assert picks.notes["terms"] == "token ids"
    assert np.isfinite(picks.scores).all()


def test_rows_without_loss_neither_count_nor_are_chosen():
    pool, target = toy_pool(12), toy_target()
    silent = {"input_ids": target.rows[0]["input_ids"], "labels": [-100] * len(target.rows[0]["labels"])}
    alone = pick(SPEC, make_context(SPEC, pool=pool, reference=target), fraction=1.0)
    mixed = pick(SPEC, make_context(SPEC, pool=pool_of([*pool.rows, silent], None), reference=target), fraction=1.0)
    assert np.isnan(mixed.scores[12])
    assert np.array_equal(mixed.scores[:12], alone.scores)
    assert mixed.positions.tolist() == alone.positions.tolist()


def test_the_order_of_the_rows_does_not_matter_to_the_last_bit():
    plain, order = toy_pool(24), np.random.default_rng(3).permutation(24)
    turned = toy_pool(24, order)
    first, second = (pick(SPEC, make_context(SPEC, pool=pool)) for pool in (plain, turned))
    assert np.array_equal(first.scores[order], second.scores)
    assert chosen_hashes(first, plain) == chosen_hashes(second, turned)


def test_a_stop_is_heard():
    with pytest.raises(ScoringStoppedError, match="BM25: stopped on request"):
        pick(SPEC, make_context(SPEC, stop_requested=lambda: True))


def test_what_is_missing_is_named():
    with pytest.raises(DataError, match="needs target rows; pass target="):
        pick(SPEC, make_context(SPEC, reference=None))
    reference = toy_target()
    reference.groups = None
    assert pick(SPEC, make_context(SPEC, reference=reference)).notes["groups"] == ["the target"]
    with pytest.raises(DataError, match="group_column='task' was given and the target has no groups"):
        pick(SPEC, make_context(SPEC, reference=reference), group_column="task")
    with pytest.raises(DataError, match="num_examples=99 is more than the 24 valid rows"):
        pick(SPEC, make_context(SPEC), fraction=None, num_examples=99)
