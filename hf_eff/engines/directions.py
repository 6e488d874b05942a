"""Random directions of zeroth-order training: numbers that a key names, so that no copy of them is kept.

The direction of a parameter is a function of (run seed, step, draw, parameter name). Probe and update ask for it
by the same call, ``add_``, and cannot drift apart. It does not depend on the order of the parameters, on the number
of threads, on any global random state, or on how a parameter is divided among processes.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from hf_eff.engines.keyed_sums import keyed_sums
from hf_eff.numerics.keyed_random import make_key, random_words

CHUNK = 2**20
"""Entries that have a stream of their own. Other sizes give other directions."""

_PIECE = 2**19
"""Entries at a time, 2 MiB of scratch memory; much less and calls cost more than numbers. Directions stay the same."""

_BINS = 2**16
_SIGN = -(2**31)
_ONE = 0x3F800000  # the bits of 1.0


@dataclass(frozen=True)
class Shard:
    """The rows of a parameter that this process holds.

    Attributes:
        shape: Shape of the whole parameter.
        first: Index of the first row held, along dimension 0.
    """

    shape: tuple[int, ...]
    first: int

    @property
    def offset(self) -> int:
        """Entries of the whole parameter before the first one held."""
        return self.first * math.prod(self.shape[1:])


@dataclass(frozen=True)
class Chunk:
    """A run of entries with a stream of their own, of which this process holds some.

    Attributes:
        key: Names the stream.
        count: Entries in it.
        low: Entries before the first one held.
        held: Where those held lie among all that this process holds of the parameter.
    """

    key: int
    count: int
    low: int
    held: slice


class DirectionFamily(ABC):
    """Random directions z, one per parameter, step and draw.

    Args:
        seed: Seed of the run.

    Attributes:
        name: What users type.
        reads_weights: Whether z depends on the weights it is added to.
        shards: Parameters, by name, of which this process holds a part; the others are whole.
    """

    name: ClassVar[str]
    reads_weights: ClassVar[bool] = False

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.shards: dict[str, Shard] = {}

    @abstractmethod
    def add_(
        self,
        out: Tensor,
        name: str,
        step: int,
        scale: float,
        *,
        base: Tensor | None = None,
        draw: int = 0,
        at: Tensor | None = None,
    ) -> Tensor:
        """Write ``base + scale * z`` into ``out``, computed in fp32 at least and rounded to ``out``'s type.

        Args:
            out: Where the sum goes; any shape and floating type.
            name: Parameter that z belongs to.
            step: Optimizer step that z belongs to.
            scale: Multiple of z.
            base: What z is added to, of ``out``'s shape and type; None for ``out`` itself.
            draw: Which of several directions of one step.
            at: Weights that z is taken at, where the family reads them; None for ``base``.

        Returns:
            ``out``.
        """

    @abstractmethod
    def describe(self, device: torch.device) -> dict[str, Any]:
        """What the numbers depend on beside the key: JSON-able, for a log that must be replayed exactly."""

    def update_scale(self, name: str, part: Tensor) -> float:
        """Factor that makes the mean of (z . g) z equal to the gradient g.

        Args:
            name: Parameter.
            part: What this process holds of it.
        """
        return 1.0

    def key(self, name: str, step: int, draw: int, *parts: int) -> int:
        """64-bit key of one stream."""
        return make_key(_name_hash(name), self.seed, step, draw, *parts)

    def place(self, name: str, part: Tensor) -> Shard:
        """Where ``part`` lies in the whole parameter."""
        return self.shards.get(name) or Shard(tuple(part.shape), 0)


class StreamedDirections(DirectionFamily):
    """Directions whose entries are drawn independently, piece by piece.

    Args:
        seed: Seed of the run.
        chunk: Entries that have a stream of their own, a multiple of 64.
    """

    def __init__(self, seed: int, chunk: int = CHUNK) -> None:
        if chunk < 64 or chunk % 64:
            raise ValueError(f"chunk must be a positive multiple of 64, got {chunk}")
        super().__init__(seed)
        self.chunk = chunk
        self._buffers: dict[tuple[torch.device, str], Tensor] = {}

    @classmethod
    def from_description(cls, seed: int, described: Mapping[str, Any]) -> StreamedDirections:
        """Inverse of ``describe``."""
        return cls(seed, described["chunk"])

    def add_(
        self,
        out: Tensor,
        name: str,
        step: int,
        scale: float,
        *,
        base: Tensor | None = None,
        draw: int = 0,
        at: Tensor | None = None,
    ) -> Tensor:
        """See the base class."""
        base = out if base is None else base
        at = base if at is None else at
        if not (out.is_contiguous() and base.is_contiguous() and at.is_contiguous()):
            total = torch.empty_like(out, memory_format=torch.contiguous_format)
            return out.copy_(self.add_(total, name, step, scale, base=base.contiguous(), draw=draw, at=at.contiguous()))
        target, source, weights = out.view(-1), base.view(-1), at.view(-1)
        limit = self._limit(name)
        for chunk in self._chunks(self.place(name, out), target.numel(), name, step, draw):
            tensors = (target[chunk.held], source[chunk.held], weights[chunk.held])
            if self._add_compiled(chunk, *tensors, scale, limit):
                continue
            for part, entries in self._pieces(chunk, out.device):
                to, start, size = (each[part] for each in tensors)
                kept = entries if limit == math.inf else entries.masked_fill(size.abs() > limit, 0.0)
                torch.add(start, kept, alpha=scale, out=to)
        return out

    def _chunks(self, place: Shard, count: int, name: str, step: int, draw: int) -> Iterator[Chunk]:
        """The chunks that the ``count`` entries held lie in.

        Yields:
            One after another.
        """
        total, first = math.prod(place.shape), place.offset
        for index in range(first // self.chunk, -(-(first + count) // self.chunk)):
            begin = index * self.chunk
            end = min(begin + self.chunk, total)
            low, high = max(begin, first), min(end, first + count)
            held = slice(low - first, high - first)
            yield Chunk(self.key(name, step, draw, index), end - begin, low - begin, held)

    def _pieces(self, chunk: Chunk, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
        """The entries of a chunk that are held.

        Yields:
            Where among them a piece goes, and the piece.
        """
        begin, held = 0, chunk.held.stop - chunk.held.start
        for entries in self._entries(chunk.key, chunk.count, device):
            end = begin + entries.numel()
            low, high = max(begin, chunk.low), min(end, chunk.low + held)
            if low < high:
                yield slice(low - chunk.low, high - chunk.low), entries[low - begin : high - begin]
            begin = end

    def describe(self, device: torch.device) -> dict[str, Any]:
        """Name, chunk and random number generator."""
        return {"name": self.name, "chunk": self.chunk, "rng": self._rng(device)}

    def _limit(self, name: str) -> float:
        """Size of a weight above which its entry is 0; infinite for none."""
        return math.inf

    def _add_compiled(
        self, chunk: Chunk, out: Tensor, base: Tensor, weights: Tensor, scale: float, limit: float
    ) -> bool:
        """Write the sum of one chunk by compiled code, to the same numbers; False where there is none for it."""
        return False

    @abstractmethod
    def _entries(self, key: int, count: int, device: torch.device) -> Iterator[Tensor]:
        """[count] fp32 entries of mean 0 and variance 1, in pieces; each is valid until the next is asked for."""

    @abstractmethod
    def _rng(self, device: torch.device) -> str:
        """Identifier of the generator on this kind of device."""

    def _buffer(self, role: str, count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[count] scratch memory, reused from piece to piece."""
        held = self._buffers.get((device, role))
        if held is None or held.numel() < count:
            held = self._buffers[device, role] = torch.empty(count, dtype=dtype, device=device)
        return held[:count]


class Rademacher(StreamedDirections):
    """Entries +1 or -1, each with probability one half: 64 of them cost one random word.

    The words are a hash in integer arithmetic, so the signs are the same on every device.
    """

    name = "rademacher"

    def _entries(self, key: int, count: int, device: torch.device) -> Iterator[Tensor]:
        num_words = _num_words(count)
        words = random_words(torch.tensor([key], device=device), num_words // 2)[0].view(torch.int32)
        rows = min(32, max(1, _PIECE // num_words))
        for first in range(0, 32, rows):
            # Row k moves bit 31 - k of every word to the place of the sign; the rest is overwritten with 1.0.
            shifts = _shifts(device)[first : first + rows]
            bits = self._buffer("signs", len(shifts) * num_words, device, torch.int32).view(-1, num_words)
            torch.bitwise_left_shift(words, shifts, out=bits)
            bits.bitwise_and_(_SIGN).bitwise_or_(_ONE)
            yield bits.view(torch.float32).view(-1)[: max(0, count - first * num_words)]

    def _rng(self, device: torch.device) -> str:
        return "splitmix64"

    def _add_compiled(
        self, chunk: Chunk, out: Tensor, base: Tensor, weights: Tensor, scale: float, limit: float
    ) -> bool:
        sums = keyed_sums() if out.device.type == "cpu" else None
        if sums is None or limit != math.inf or not sums.takes(out, base):
            return False
        sums.add_signs_(out, base, chunk.key, chunk.low, _num_words(chunk.count), scale)
        return True


class Gaussian(StreamedDirections):
    """Standard normal entries.

    On the CPU each is one of 65,536 quantiles of the normal distribution, named by 16 bits of an SFC64 word: mean 0
    and variance 1 exactly, fourth moment 2.99, none beyond 4.3. torch's own generator draws on one thread and seeds
    with 32 bits only. Elsewhere the device's generator draws them.
    """

    name = "gaussian"

    def _entries(self, key: int, count: int, device: torch.device) -> Iterator[Tensor]:
        if device.type != "cpu":
            generator = torch.Generator(device=device).manual_seed(key)
            yield self._buffer("entries", count, device, torch.float32).normal_(generator=generator)
            return
        words, table = np.random.SFC64(key % 2**64), _quantiles()
        for first in range(0, count, _PIECE):
            size = min(_PIECE, count - first)
            raw = torch.from_numpy(words.random_raw(-(-size // 4)).view(np.int16))[:size]
            index = self._buffer("index", size, device, torch.int32)
            entries = self._buffer("entries", size, device, torch.float32)
            yield torch.index_select(table, 0, index.copy_(raw).add_(_BINS // 2), out=entries)

    def _rng(self, device: torch.device) -> str:
        return "sfc64 + quantiles" if device.type == "cpu" else f"torch.Generator({device.type}).normal_"

    def _add_compiled(
        self, chunk: Chunk, out: Tensor, base: Tensor, weights: Tensor, scale: float, limit: float
    ) -> bool:
        sums = keyed_sums() if out.device.type == "cpu" else None
        if sums is None or not sums.takes(out, base, weights):
            return False
        sums.add_quantiles_(out, base, weights, chunk.key, chunk.low, scale, _quantiles(), limit)
        return True


FAMILIES: dict[str, type[StreamedDirections]] = {family.name: family for family in (Gaussian, Rademacher)}
"""Families of independent entries, by the name that users type and logs carry."""


@lru_cache(maxsize=65536)
def _name_hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _num_words(count: int) -> int:
    """32-bit words whose bits are the signs of ``count`` entries: both halves of as few 64-bit ones as do."""
    return 2 * -(-count // 64)


@lru_cache(maxsize=8)
def _shifts(device: torch.device) -> Tensor:
    return torch.arange(32, dtype=torch.int32, device=device)[:, None]


@lru_cache(maxsize=1)
def _quantiles() -> Tensor:
    """[65536] fp32 middles, in probability, of as many equally likely slices of N(0, 1), scaled to variance 1."""
    upper = torch.special.ndtri((torch.arange(_BINS // 2, _BINS, dtype=torch.float64) + 0.5) / _BINS)
    upper /= upper.square().mean().sqrt()
    return torch.cat([-upper.flip(0), upper]).float()
