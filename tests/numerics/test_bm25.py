"""BM25 is its formula, and reads documents once."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_eff.numerics.bm25 import bm25, words

DOCUMENTS = [["the", "cat", "sat"], ["the", "dog", "sat", "the", "dog", "ran"], ["birds", "fly"]]


def literal(documents, query, k1, b):
    """The formula, term by term."""
    count, mean = len(documents), sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for term in query:
            holders = sum(term in other for other in documents)
            idf = math.log(1 + (count - holders + 0.5) / (holders + 0.5))
            f = document.count(term)
            score += idf * f * (k1 + 1) / (f + k1 * (1 - b + b * len(document) / mean)) if f else 0.0
        scores.append(score)
    return scores


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (1.2, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("query", [["the", "dog"], ["dog", "dog", "cat"], ["unseen"], ["birds", "unseen", "sat"]])
def test_three_documents_by_the_formula(query, k1, b):
    mean, _ = bm25(DOCUMENTS, [{term: query.count(term) for term in query}], k1=k1, b=b)
    np.testing.assert_allclose(mean, literal(DOCUMENTS, query, k1, b), rtol=1e-12)


def test_one_score_by_hand():
    mean, _ = bm25(DOCUMENTS, [{"cat": 1.0}])
    # 11 terms in 3 documents; "cat" is once in the first, of 3 terms, and nowhere else.
    by_hand = math.log(1 + 2.5 / 1.5) * 2.5 / (1 + 1.5 * (0.25 + 0.75 * 3 / (11 / 3)))
    np.testing.assert_allclose(mean, [by_hand, 0, 0], rtol=1e-12)


texts = st.lists(st.sampled_from("abcdef"), max_size=8)


@given(st.lists(texts, min_size=1, max_size=6), st.lists(st.lists(st.sampled_from("abcdefg"), max_size=5), min_size=1))
def test_the_mean_and_the_best_query_are_those_of_the_formula(documents, queries):
    documents = [*documents, ["a"]]  # a corpus of empty documents has no mean length
    table = np.array([literal(documents, query, 1.5, 0.75) for query in queries])
    mean, best = bm25(documents, [{term: query.count(term) for term in query} for query in queries])
    np.testing.assert_allclose(mean, table.mean(axis=0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(table[best, np.arange(len(documents))], table.max(axis=0), rtol=1e-9, atol=1e-12)


def test_documents_are_read_once_and_may_be_a_stream():
    streamed, _ = bm25(iter(DOCUMENTS), [{"dog": 1.0}])
    listed, _ = bm25(DOCUMENTS, [{"dog": 1.0}])
    assert np.array_equal(streamed, listed)


def test_the_order_of_documents_does_not_matter_to_the_last_bit():
    order = [2, 0, 1]
    queries = [{"the": 1.0, "dog": 2.0}, {"sat": 0.5}]
    mean, best = bm25(DOCUMENTS, queries)
    turned_mean, turned_best = bm25([DOCUMENTS[i] for i in order], queries)
    assert np.array_equal(mean[order], turned_mean)
    assert np.array_equal(best[order], turned_best)


def test_terms_may_be_token_ids():
    mean, best = bm25([[5, 6], [7]], [{5: 1.0}, {7: 1.0}])
    assert best.tolist() == [0, 1]
    assert (mean > 0).all()


def test_nothing_in_common_and_nothing_at_all_score_zero():
    mean, best = bm25([[], ["a"], []], [{"b": 1.0}, {}])
    assert mean.tolist() == [0, 0, 0]
    assert best.tolist() == [0, 0, 0]
    assert bm25([[], []], [{"b": 1.0}])[0].tolist() == [0, 0]
    assert bm25([], [{"b": 1.0}])[0].tolist() == []


def test_words_drop_case_and_punctuation_of_every_script():
    assert words("Hello, WORLD! (it's) snake_case") == ["hello", "world", "its", "snakecase"]
    assert words("¿Qué… «tal»? 你好。") == ["qué", "tal", "你好"]
    assert words("हिन्दी") == ["हिन्दी"]  # vowel signs are no punctuation
    assert words(" \n\t") == []
