"""BM25: how well documents match a query, by the rare words they share.

With n[t] of N documents holding term t, f[t, d] its count in document d of |d| terms, and a query that holds it
q[t] times:

    score(q, d) = sum over t of q[t] idf[t] f (k1 + 1) / (f + k1 (1 - b + b |d| / mean |d|))
    idf[t] = log(1 + (N - n[t] + 1/2) / (n[t] + 1/2))

The index holds the terms of the queries alone, so that memory grows with the matches, not with the vocabulary.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from unicodedata import category

import numpy as np


class _Strip(dict[int, "int | None"]):
    """Translation table that drops punctuation and symbols, filled as characters are met."""

    def __missing__(self, code: int) -> int | None:
        self[code] = None if category(chr(code))[0] in "PS" else code
        return self[code]


_STRIP = _Strip()


def words(text: str) -> list[str]:
    """Lower-cased words without punctuation and symbols.

    >>> words("Don't panic: 2 + 2 = 4!")
    ['dont', 'panic', '2', '2', '4']
    """
    return text.lower().translate(_STRIP).split()


def bm25(
    documents: Iterable[Sequence[Hashable]],
    queries: Sequence[Mapping[Hashable, float]],
    *,
    k1: float = 1.5,
    b: float = 0.75,
) -> tuple[np.ndarray, np.ndarray]:
    """Match every document with every query.

    Args:
        documents: N documents, each a sequence of terms; read once, one at a time.
        queries: Weight of each term, such as its count, by query; at least one query.
        k1: How slowly repeated terms saturate; 0 counts presence alone.
        b: How much long documents are held back, in [0, 1].

    Returns:
        mean: [N] float64, mean of the scores over the queries.
        best: [N] int64, the query that matches best; the first of equal ones.

    >>> mean, best = bm25([["a", "b"], ["c"]], [{"a": 1.0}, {"c": 1.0}])
    >>> best.tolist()
    [0, 1]
    """
    columns = {term: column for column, term in enumerate(dict.fromkeys(term for query in queries for term in query))}
    counted = array("q"), array("q"), array("q")  # document, column and count of each match
    lengths = array("q")
    for place, document in enumerate(documents):
        lengths.append(len(document))
        for column, count in Counter(columns[term] for term in document if term in columns).items():
            for values, value in zip(counted, (place, column, count), strict=True):
                values.append(value)
    rows, terms, counts = (np.asarray(values, dtype=np.int64) for values in counted)
    total = len(lengths)
    sizes = np.asarray(lengths, dtype=np.float64) / max(1.0, float(sum(lengths))) * total
    holders = np.bincount(terms, minlength=len(columns))
    idf = np.log1p((total - holders + 0.5) / (holders + 0.5))
    matches = idf[terms] * counts * (k1 + 1) / (counts + k1 * (1 - b + b * sizes[rows]))
    mean, best, top = np.zeros(total), np.zeros(total, dtype=np.int64), np.full(total, -np.inf)
    for place, query in enumerate(queries):
        weights = np.zeros(len(columns))
        weights[[columns[term] for term in query]] = list(query.values())
        scores = np.bincount(rows, weights=weights[terms] * matches, minlength=total)
        mean += scores / len(queries)
        best[scores > top] = place
        top = np.maximum(top, scores)
    return mean, best
