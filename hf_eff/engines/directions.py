"""Random directions of zeroth-order training: numbers that a key names, so that no copy of them is kept.

The direction of a parameter is a function of (run seed, step, draw, parameter name). Probe and update ask for it
by the same call, ``add_``, and cannot drift apart. It does not depend on the order of the parameters, on the number
of threads or on any global random state.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from hf_eff.numerics.keyed_random import make_key, random_words

CHUNK = 2**20
"""Entries that are drawn at a time; each chunk has a stream of its own. Other sizes give other directions."""

_SIGN = -(2**31)
_ONE = 0x3F800000  # the bits of 1.0


class DirectionFamily(ABC):
    """Random directions z, one per parameter, step and draw.

    Args:
        seed: Seed of the run.

    Attributes:
        name: What users type.
        update_scale: Factor that makes the mean of (z . g) z equal to the gradient g.
    """

    name: ClassVar[str]
    update_scale: float = 1.0

    def __init__(self, seed: int) -> None:
        self.seed = seed

    @abstractmethod
    def add_(
        self, out: Tensor, name: str, step: int, scale: float, *, base: Tensor | None = None, draw: int = 0
    ) -> Tensor:
        """Write ``base + scale * z`` into ``out``, computed in fp32 at least and rounded to ``out``'s type.

        Args:
            out: Where the sum goes; any shape and floating type.
            name: Parameter that z belongs to.
            step: Optimizer step that z belongs to.
            scale: Multiple of z.
            base: What z is added to, of ``out``'s shape and type; None for ``out`` itself.
            draw: Which of several directions of one step.

        Returns:
            ``out``.
        """

    @abstractmethod
    def describe(self, device: torch.device) -> dict[str, Any]:
        """What the numbers depend on beside the key: JSON-able, for a log that must be replayed exactly."""

    def key(self, name: str, step: int, draw: int, *parts: int) -> int:
        """64-bit key of one stream."""
        return make_key(_name_hash(name), self.seed, step, draw, *parts)


class StreamedDirections(DirectionFamily):
    """Directions whose entries are drawn independently, a chunk at a time.

    Args:
        seed: Seed of the run.
        chunk: Entries drawn at a time, a multiple of 64.
    """

    def __init__(self, seed: int, chunk: int = CHUNK) -> None:
        if chunk < 64 or chunk % 64:
            raise ValueError(f"chunk must be a positive multiple of 64, got {chunk}")
        super().__init__(seed)
        self.chunk = chunk
        self._buffers: dict[tuple[torch.device, str], Tensor] = {}

    def add_(
        self, out: Tensor, name: str, step: int, scale: float, *, base: Tensor | None = None, draw: int = 0
    ) -> Tensor:
        """See the base class."""
        base = out if base is None else base
        if not (out.is_contiguous() and base.is_contiguous()):
            total = torch.empty_like(out, memory_format=torch.contiguous_format)
            return out.copy_(self.add_(total, name, step, scale, base=base.contiguous(), draw=draw))
        target, source = out.view(-1), base.view(-1)
        for index, start in enumerate(range(0, target.numel(), self.chunk)):
            part = slice(start, min(start + self.chunk, target.numel()))
            entries = self._entries(self.key(name, step, draw, index), part.stop - start, out.device)
            torch.add(source[part], entries, alpha=scale, out=target[part])
        return out

    def describe(self, device: torch.device) -> dict[str, Any]:
        """Name, chunk and random number generator."""
        return {"name": self.name, "chunk": self.chunk, "rng": self._rng(device)}

    @abstractmethod
    def _entries(self, key: int, count: int, device: torch.device) -> Tensor:
        """[count] fp32 entries of mean 0 and variance 1, valid until the next call."""

    @abstractmethod
    def _rng(self, device: torch.device) -> str:
        """Identifier of the generator on this kind of device."""

    def _buffer(self, role: str, count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[count] scratch memory, reused from chunk to chunk."""
        held = self._buffers.get((device, role))
        if held is None or held.numel() < count:
            held = self._buffers[device, role] = torch.empty(count, dtype=dtype, device=device)
        return held[:count]


class Rademacher(StreamedDirections):
    """Entries +1 or -1, each with probability one half: 64 of them cost one random word.

    The words are a hash in integer arithmetic, so the signs are the same on every device.
    """

    name = "rademacher"

    def _entries(self, key: int, count: int, device: torch.device) -> Tensor:
        num_words = -(-count // 64)
        words = random_words(torch.tensor([key], device=device), num_words)[0].view(torch.int32)
        bits = self._buffer("signs", 64 * num_words, device, torch.int32).view(32, 2 * num_words)
        # Row k moves bit 31 - k of every word to the place of the sign; the rest is overwritten with 1.0.
        torch.bitwise_left_shift(words, _shifts(device), out=bits)
        bits.bitwise_and_(_SIGN).bitwise_or_(_ONE)
        return bits.view(torch.float32).view(-1)[:count]

    def _rng(self, device: torch.device) -> str:
        return "splitmix64"


class Gaussian(StreamedDirections):
    """Standard normal entries.

    On the CPU they are made of SFC64 words by Box and Muller's transform: torch's own generator draws on one thread
    and seeds with 32 bits only. A pair takes a radius of 31 bits (entries up to 6.5) and an angle of 16 bits.
    Elsewhere the device's generator draws them.
    """

    name = "gaussian"

    def _entries(self, key: int, count: int, device: torch.device) -> Tensor:
        entries = self._buffer("entries", count + 1, device, torch.float32)
        if device.type == "cpu":
            return self._box_muller(key, entries)[:count]
        generator = torch.Generator(device=device).manual_seed(key)
        return entries[:count].normal_(generator=generator)

    def _box_muller(self, key: int, entries: Tensor) -> Tensor:
        """Fill ``entries`` with pairs r cos(t), r sin(t), with r^2 / 2 exponential and t uniform."""
        pairs = entries.numel() // 2
        cpu = entries.device
        words = np.random.SFC64(key % 2**64).random_raw(-(-3 * pairs // 4))
        raw = torch.from_numpy(words.view(np.int32))
        radius = self._buffer("radius", pairs, cpu, torch.float32)
        angle = self._buffer("angle", pairs, cpu, torch.float32)
        radius.copy_(raw[:pairs].bitwise_or_(1))  # odd, hence never zero
        radius.abs_().mul_(2.0**-31).log_().mul_(-2.0).sqrt_()
        angle.copy_(raw[pairs:].view(torch.int16)[:pairs]).mul_(math.pi * 2.0**-15)
        filled = entries[: 2 * pairs].view(2, pairs)
        torch.cos(angle, out=filled[0])
        torch.sin(angle, out=filled[1])
        filled.mul_(radius)
        return entries

    def _rng(self, device: torch.device) -> str:
        return "sfc64 + box-muller" if device.type == "cpu" else f"torch.Generator({device.type}).normal_"


FAMILIES: dict[str, type[StreamedDirections]] = {family.name: family for family in (Gaussian, Rademacher)}
"""Families by the name that users type and logs carry."""


@lru_cache(maxsize=65536)
def _name_hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


@lru_cache(maxsize=8)
def _shifts(device: torch.device) -> Tensor:
    return torch.arange(32, dtype=torch.int32, device=device)[:, None]
