"""Random words that are a hash of a key: the same on every device, with no state to save or restore.

SplitMix64 (Steele, Lea and Flood, 2014): output i of the stream of a key is a mix of
``key + i * 0x9E3779B97F4A7C15``, all in 64-bit integer arithmetic.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_STEP = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
_MODULUS = 2**64
_FEW = 2**16
"""Words at once that numpy makes."""


def make_key(*parts: int) -> int:
    """Hash a few integers into a 64-bit key, as a signed integer that a tensor can hold.

    >>> make_key(0, 1) == make_key(1, 0)
    False
    """
    state = 0
    for part in parts:
        state = ((state ^ part) + _STEP) % _MODULUS
        for shift, factor in _ROUNDS:
            state = ((state ^ (state >> shift)) * factor) % _MODULUS
    return _signed(state)


def random_words(keys: Tensor, count: int) -> Tensor:
    """The first outputs of one stream a key.

    Args:
        keys: [K] int64.
        count: Words of each stream, n. A longer stream begins with the shorter one.

    Returns:
        [K, n] int64, every bit fair.
    """
    if keys.device.type == "cpu" and len(keys) * count <= _FEW:
        return torch.from_numpy(_words_by_numpy(keys.contiguous().numpy().view(np.uint64), count).view(np.int64))
    counter = torch.arange(1, count + 1, device=keys.device, dtype=torch.int64).mul_(_signed(_STEP))
    words = keys[:, None] + counter
    for shift, factor in _ROUNDS:
        # int64 shifts copy the sign bit down; the mask makes the shift a logical one.
        words.bitwise_xor_((words >> shift).bitwise_and_(2 ** (64 - shift) - 1)).mul_(_signed(factor))
    return words


def _words_by_numpy(keys: np.ndarray, count: int) -> np.ndarray:
    """[K, n] uint64, the same numbers: for a few words numpy takes a quarter of the time that torch does."""
    words = keys[:, None] + _counter()[:count]
    shifted = np.empty_like(words)
    for shift, factor in _ROUNDS:
        np.bitwise_xor(words, np.right_shift(words, np.uint64(shift), out=shifted), out=words)
        np.multiply(words, np.uint64(factor), out=words)
    return words


@lru_cache(maxsize=1)
def _counter() -> np.ndarray:
    """[_FEW] uint64 multiples 1, 2, ... of the step; read-only."""
    multiples = np.arange(1, _FEW + 1, dtype=np.uint64) * np.uint64(_STEP)
    multiples.flags.writeable = False
    return multiples


def content_order(hashes: Sequence[str], *key: int) -> np.ndarray:
    """Positions in an order that looks random and depends on content alone, not on the order of the rows.

    Args:
        hashes: [N] content hash of each row; rows of equal content keep their order.
        key: Integers that name the order, such as a seed and an epoch.

    >>> rows = ["aa", "bb", "cc"]
    >>> order = [rows[i] for i in content_order(rows, 0)]
    >>> order == [rows[::-1][i] for i in content_order(rows[::-1], 0)]
    True
    """
    prefix = "/".join(str(part) for part in key)
    digests = [hashlib.blake2b(f"{prefix}/{value}".encode(), digest_size=16).hexdigest() for value in hashes]
    return np.argsort(np.asarray(digests), kind="stable")


def _signed(value: int) -> int:
    return value - _MODULUS if value >= _MODULUS // 2 else value
