"""Finding texts that are nearly the same without comparing all pairs: MinHash with banding.

A text is the set of its character 5-grams, and two texts are near duplicates when the Jaccard similarity
J = |A and B| / |A or B| of their sets is high. Of each set P hash functions keep the smallest hash; two texts share
one of them with probability J. The P numbers are cut into bands of r, and texts that agree in a whole band are
compared exactly: a pair of similarity J meets in one of P/r bands with probability 1 - (1 - J^r)^(P/r).

Characters rather than words: a text in which 5 % of the words were replaced keeps a similarity of about 0.87 by
characters and 0.63 by words. Broder (1997), doi:10.1109/SEQUEN.1997.666900.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch

from hf_eff.numerics.keyed_random import make_key, random_words

PERMUTATIONS = 128
SHINGLE = 5
_SEED = 0x5EED
_CHUNK = 4096
_MISSED = 0.01
"""Share of pairs right at the threshold that banding may miss."""
_HELD = 8
"""Kept texts of one bucket that a newcomer is compared with."""


class MinHash:
    """The same P hash functions in every process.

    Attributes:
        bands: Bands of a signature.
        rows: Hashes of a band.
    """

    def __init__(self, threshold: float = 0.8, permutations: int = PERMUTATIONS) -> None:
        """Draw the functions and shape the bands for pairs at the threshold."""
        drawn = random_words(torch.tensor([make_key(_SEED)]), 2 * permutations)[0].numpy().view(np.uint64)
        seeds = (drawn >> np.uint64(32)).astype(np.uint32)
        self._factors = seeds[:permutations, None] | np.uint32(1)  # odd: a permutation of the 32-bit words
        self._offsets = seeds[permutations:, None]
        self.bands, self.rows = bands_for(threshold, permutations)

    def signature(self, shingles: np.ndarray) -> np.ndarray:
        """[P] uint32 smallest hash of the set under each function.

        Args:
            shingles: [S] uint32, at least one.
        """
        smallest = np.full(len(self._factors), 2**32 - 1, dtype=np.uint32)
        for start in range(0, len(shingles), _CHUNK):
            hashed = self._factors * shingles[start : start + _CHUNK] + self._offsets
            smallest = np.minimum(smallest, hashed.min(axis=1))
        return smallest

    def band_keys(self, shingles: np.ndarray) -> np.ndarray:
        """[bands] uint64 key of each band of the signature; a set without shingles has keys of its own."""
        words = self.signature(shingles)[: self.bands * self.rows].reshape(self.bands, self.rows).astype(np.uint64)
        keys = np.zeros(self.bands, dtype=np.uint64)
        for column in range(self.rows):
            keys = _mixed(keys ^ words[:, column])
        return keys


def bands_for(threshold: float, permutations: int = PERMUTATIONS) -> tuple[int, int]:
    """Bands, and rows of each, that are the most selective among those that miss few pairs at the threshold.

    >>> bands_for(0.8)
    (21, 6)
    """
    for rows in range(permutations, 1, -1):
        bands = permutations // rows
        if (1 - threshold**rows) ** bands <= _MISSED:
            return bands, rows
    return permutations, 1


def shingles(text: str) -> np.ndarray:
    """[S] uint32 sorted, distinct hashes of the text's character 5-grams; a shorter text is one by itself.

    >>> len(shingles("abcdefg")), len(shingles("aaaaaaaaaa")), len(shingles("ab"))
    (3, 1, 1)
    """
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)
    count = max(1, len(codes) - SHINGLE + 1)
    codes = np.concatenate([codes, np.zeros(max(0, SHINGLE - len(codes)), dtype=np.uint64)])
    hashes = np.zeros(count, dtype=np.uint64)
    for place in range(SHINGLE):
        hashes = _mixed(hashes ^ codes[place : place + count])
    return np.unique((hashes >> np.uint64(32)).astype(np.uint32))


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Similarity of two sets given as sorted, distinct values.

    >>> jaccard(np.array([1, 2, 3]), np.array([2, 3, 4]))
    0.5
    """
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / max(1, len(first) + len(second) - shared)


def greedy_duplicates(
    order: Sequence[int] | np.ndarray, keys: np.ndarray, similar: Callable[[int, int], bool]
) -> np.ndarray:
    """Walk down a ranking and mark what is like something kept before.

    The outcome depends on the ranking and the texts alone; run again on what was kept, it marks nothing. A text
    is compared with at most 8 kept ones of each bucket it is in, so that the work is linear in N.

    Args:
        order: [M] rows, best first.
        keys: [N, bands] of ``MinHash.band_keys``.
        similar: Whether two rows are near duplicates; the second one is kept.

    Returns:
        [N] the kept row that a row is like; -1 for rows that are kept or not in ``order``.
    """
    twins = np.full(len(keys), -1, dtype=np.int64)
    places = np.asarray(order, dtype=np.int64)
    buckets = _shared_buckets(keys[places])
    held: dict[tuple[int, int], list[int]] = defaultdict(list)
    for place in np.flatnonzero((buckets >= 0).any(axis=1)).tolist():
        row = int(places[place])
        own = [(band, int(bucket)) for band, bucket in enumerate(buckets[place]) if bucket >= 0]
        others = dict.fromkeys(other for bucket in own for other in held[bucket])
        twin = next((other for other in others if similar(row, other)), None)
        if twin is not None:
            twins[row] = twin
            continue
        for bucket in own:
            if len(held[bucket]) < _HELD:
                held[bucket].append(row)
    return twins


def _shared_buckets(keys: np.ndarray) -> np.ndarray:
    """[M, bands] number of the bucket that a row shares with others in a band; -1 where it is alone in it."""
    buckets = np.full(keys.shape, -1, dtype=np.int64)
    for band in range(keys.shape[1]):
        _, numbers, counts = np.unique(keys[:, band], return_inverse=True, return_counts=True)
        crowded = counts[numbers] > 1
        buckets[crowded, band] = numbers[crowded]
    return buckets


def _mixed(words: np.ndarray) -> np.ndarray:
    """SplitMix64's output function: every input bit moves half of the output bits."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
