"""Near duplicates are found, what is not is left, and the work is linear."""

from __future__ import annotations

import random

import numpy as np
import pytest

from hf_eff.numerics.near_duplicates import MinHash, bands_for, greedy_duplicates, jaccard, shingles

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def vocabulary(generator, size=3000):
    return ["".join(generator.choices(LETTERS, k=generator.randrange(2, 10))) for _ in range(size)]


def documents(generator, count, length=80):
    known = vocabulary(generator)
    return [generator.choices(known, k=length) for _ in range(count)]


def edited(words, share, generator):
    """The text with a share of its words replaced, at random places."""
    places = generator.sample(range(len(words)), round(share * len(words)))
    fresh = vocabulary(generator, len(places) + 1)
    return [fresh[places.index(place)] if place in places else word for place, word in enumerate(words)]


def planted(count, seed=0):
    """Originals, then one copy of each with 0, 5 or 30 % of the words replaced; and the share of each copy."""
    generator = random.Random(seed)
    originals = documents(generator, count)
    shares = [(0.0, 0.05, 0.3)[place % 3] for place in range(count)]
    copies = [edited(words, share, generator) for words, share in zip(originals, shares, strict=True)]
    return [" ".join(words) for words in (*originals, *copies)], shares


class Search:
    """Texts, searched as the quality rules do."""

    def __init__(self, texts, threshold=0.8):
        self.sets = [shingles(text) for text in texts]
        minhash = MinHash(threshold)
        self.keys = np.stack([minhash.band_keys(each) for each in self.sets])
        self.threshold, self.compared = threshold, 0

    def similar(self, first, second):
        self.compared += 1
        return jaccard(self.sets[first], self.sets[second]) >= self.threshold

    def twins(self, order=None):
        order = range(len(self.sets)) if order is None else order
        return greedy_duplicates(list(order), self.keys, self.similar)


def test_planted_duplicates_are_found_and_nothing_else():
    count = 300
    texts, shares = planted(count)
    twins = Search(texts).twins()
    marked = set(np.flatnonzero(twins >= 0).tolist())
    wanted = {count + place for place, share in enumerate(shares) if share < 0.3}
    assert len(marked & wanted) / len(wanted) >= 0.95
    assert len(marked & wanted) / len(marked) >= 0.95
    assert all(twins[place] == place - count for place in marked & wanted)
    assert {count + place for place, share in enumerate(shares) if share == 0} <= marked


def test_a_second_search_finds_nothing():
    texts, _ = planted(60)
    kept = np.flatnonzero(Search(texts).twins() < 0)
    assert (Search([texts[place] for place in kept]).twins() < 0).all()


def test_the_ranking_decides_who_stays_and_the_row_order_nothing():
    texts, _ = planted(60)
    ranking = random.Random(1).sample(range(len(texts)), len(texts))
    twins = Search(texts).twins(ranking)
    rank = {row: place for place, row in enumerate(ranking)}
    marked = np.flatnonzero(twins >= 0)
    assert len(marked)
    assert all(rank[int(twins[row])] < rank[int(row)] for row in marked)
    turn = random.Random(2).sample(range(len(texts)), len(texts))
    back = {row: place for place, row in enumerate(turn)}
    turned = Search([texts[row] for row in turn]).twins([back[row] for row in ranking])
    assert {texts[turn[place]] for place in np.flatnonzero(turned >= 0)} == {texts[row] for row in marked}


def test_the_work_is_linear():
    compared = []
    for count in (200, 400, 800):
        search = Search(planted(count, seed=count)[0])
        search.twins()
        compared.append(search.compared / count)
    assert max(compared) <= 1.5 * min(compared)  # comparisons a text; all pairs would be 4 times as many


def test_a_bucket_that_holds_everything_stays_linear():
    # One hash value for all: the worst that a template shared by all rows can do.
    keys, count = np.zeros((500, 21), dtype=np.uint64), []

    def similar(first, second):
        count.append((first, second))
        return False

    assert (greedy_duplicates(np.arange(500), keys, similar) < 0).all()
    assert len(count) <= 8 * 500


def test_signatures_estimate_the_similarity():
    generator, minhash = random.Random(3), MinHash()
    true, estimated = [], []
    for share in (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0):
        for words in documents(generator, 12):
            first, second = (shingles(" ".join(each)) for each in (words, edited(words, share, generator)))
            true.append(jaccard(first, second))
            estimated.append(np.mean(minhash.signature(first) == minhash.signature(second)))
    errors = np.subtract(estimated, true)
    # 128 hashes: a standard deviation of at most 0.044, and of 0.005 for the mean of 84.
    assert np.abs(errors).max() < 4 * 0.044
    assert abs(errors.mean()) < 4 * 0.005


def test_jaccard_is_that_of_the_sets():
    first, second = (set(np.random.default_rng(seed).integers(0, 50, 30).tolist()) for seed in (0, 1))
    arrays = (np.array(sorted(each)) for each in (first, second))
    assert jaccard(*arrays) == len(first & second) / len(first | second)
    text, other = "the quick brown fox", "the quick brown cat"
    grams = [{each[i : i + 5] for i in range(len(each) - 4)} for each in (text, other)]
    assert jaccard(shingles(text), shingles(other)) == len(grams[0] & grams[1]) / len(grams[0] | grams[1])


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.95, 1.0])
def test_bands_miss_few_pairs_at_the_threshold_and_are_as_selective_as_that_allows(threshold):
    bands, rows = bands_for(threshold)
    assert bands * rows <= 128
    assert (1 - threshold**rows) ** bands <= 0.01
    if rows < 128:
        assert (1 - threshold ** (rows + 1)) ** (128 // (rows + 1)) > 0.01


def test_short_and_empty_texts_are_sets_of_one():
    assert len(shingles("")) == len(shingles("abc")) == len(shingles("abcde")) == 1
    assert shingles("ab") != shingles("abc")
    assert len(MinHash().band_keys(shingles(""))) == 21


def test_hashes_are_the_same_everywhere():
    keys = MinHash().band_keys(shingles("the same in every process"))
    assert int(np.bitwise_xor.reduce(keys)) == 10161072395459181427


def test_agrees_with_an_independent_implementation():
    datasketch = pytest.importorskip("datasketch")
    texts, _ = planted(30)
    index = datasketch.MinHashLSH(threshold=0.8, num_perm=128)
    hashes = {}
    for place, text in enumerate(texts):
        hashes[place] = datasketch.MinHash(num_perm=128)
        for start in range(len(text) - 4):
            hashes[place].update(text[start : start + 5].encode())
        index.insert(place, hashes[place])
    marked = np.flatnonzero(Search(texts).twins() >= 0)
    assert all(len(index.query(hashes[place])) > 1 for place in marked.tolist())
