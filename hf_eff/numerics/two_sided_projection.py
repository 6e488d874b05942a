"""Random projection of matrix gradients from both sides: P_o G P_i^T instead of one long matrix.

The gradient G [o, i] of a weight is shortened on both sides by Rademacher matrices (as in LoGra,
arXiv:2405.13954), to at most d numbers a weight. The results of all weights are added up under random signs and
shifts, so that every weight uses all d numbers. A weight's own error is larger than that of a dense
projection, up to sqrt(2) / d^(1/4) of its size for a gradient of rank one, since two short sketches multiply;
over many weights these errors average out and the cosine's error approaches that of a dense projection.

The work is about 2 o i (k_o + k_i) an example and weight instead of 2 o i d, and the matrices have
o k_o + i k_i entries instead of o i d. A gradient that is known as slopes and inputs, G = sum over t of g_t x_t^T,
need not be written out.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_eff.errors import OptionError
from hf_eff.numerics.keyed_random import make_key, random_words
from hf_eff.numerics.projection import Projector, RademacherProjector

# B examples, T tokens, o outputs and i inputs of a weight, k_o and k_i what is left of them, D projected dims


@dataclass(frozen=True)
class TwoSidedProjector(Projector):
    """Projects gradients of matrices given as a stream; keeps ``dims`` numbers an example.

    Attributes:
        shapes: [o, i] of each weight, in the fixed order in which weights are numbered.
        dims: Width D of the projection, at least 1.
        seed: Names the matrices; any integer.

    Raises:
        OptionError: ``dims`` or a shape is below one.
    """

    shapes: tuple[tuple[int, int], ...]
    dims: int
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.dims < 1 or not self.shapes or min(min(shape) for shape in self.shapes) < 1:
            raise OptionError(f"a projection needs dims >= 1 and matrices of >= 1 entries, got dims={self.dims!r}.")

    @property
    def num_entries(self) -> int:
        """Entries of all weights together."""
        return sum(self._sizes)

    @property
    def flops(self) -> float:
        """FLOPs of projecting one example."""
        if self.is_identity:
            return 0.0
        total = 0.0
        for index, (outputs, inputs) in enumerate(self.shapes):
            kept_outputs, kept_inputs = self.kept(index)
            total += 2.0 * outputs * inputs * kept_inputs * (kept_inputs < inputs)
            total += 2.0 * outputs * kept_inputs * kept_outputs * (kept_outputs < outputs)
        return total

    def fingerprint(self) -> str:
        """Digest of everything the matrices depend on."""
        parts = ["two-sided-splitmix64-1", [list(shape) for shape in self.shapes], self.dims, self.seed]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def project(self, pieces: Iterable[tuple[int, Tensor]], rows: int) -> Tensor:
        """See ``Projector``."""
        if self.is_identity:
            return RademacherProjector(self._sizes, self.dims).project(pieces, rows)

        def core(index: int, values: Tensor) -> Tensor:
            outputs, inputs = self.shapes[index]
            if values.shape != (rows, outputs * inputs):
                raise OptionError(
                    f"tensor {index} must be [{rows}, {outputs * inputs}] to be projected, got {list(values.shape)}."
                )
            shortened = self._shorten(values.view(rows, outputs, inputs), index, side=1)
            return self._shorten(shortened.transpose(1, 2), index, side=0).transpose(1, 2)

        return self._total(((index, core(index, values)) for index, values in pieces), rows)

    def project_factors(self, pieces: Iterable[tuple[int, Tensor, Tensor]], rows: int) -> Tensor:
        """Project gradients known as slopes [B, T, o] and inputs [B, T, i], without writing them out.

        Args:
            pieces: A weight's number, slopes and inputs.
            rows: Number of examples B.

        Returns:
            [B, width]: what ``project`` makes of the sums of outer products.
        """
        if self.is_identity:
            whole = ((index, torch.bmm(g.transpose(1, 2), x).flatten(1)) for index, g, x in pieces)
            return RademacherProjector(self._sizes, self.dims).project(whole, rows)

        def core(index: int, slopes: Tensor, inputs: Tensor) -> Tensor:
            short = self._shorten(slopes, index, side=0), self._shorten(inputs, index, side=1)
            return torch.bmm(short[0].transpose(1, 2), short[1])

        return self._total(((index, core(index, slopes, inputs)) for index, slopes, inputs in pieces), rows)

    def kept(self, index: int) -> tuple[int, int]:
        """k_o and k_i of a weight: at most D in all, and a short side is kept whole."""
        outputs, inputs = self.shapes[index]
        root = math.isqrt(self.dims)
        if min(outputs, inputs) > root:
            return root, root
        if outputs <= inputs:
            return outputs, min(inputs, self.dims // outputs)
        return min(outputs, self.dims // inputs), inputs

    @property
    def _sizes(self) -> tuple[int, ...]:
        return tuple(outputs * inputs for outputs, inputs in self.shapes)

    def _shorten(self, values: Tensor, index: int, side: int) -> Tensor:
        """[B, n, k] from [B, n, o or i]; a side that is kept whole is left as it is."""
        size, kept = self.shapes[index][side], self.kept(index)[side]
        if kept == size:
            return values
        matrix = RademacherProjector((size,), kept, make_key(self.seed, index, side))
        flat = values.reshape(-1, size)
        return matrix.project([(0, flat)], len(flat)).view(*values.shape[:-1], kept)

    def _total(self, cores: Iterable[tuple[int, Tensor]], rows: int) -> Tensor:
        """[B, D] sum of what is left of each weight, under signs and a shift that belong to the weight."""
        total: Tensor | None = None
        for index, core in cores:
            flat = core.flatten(1)
            if total is None:
                total = flat.new_zeros(rows, self.width, dtype=torch.promote_types(flat.dtype, torch.float32))
            words = random_words(torch.tensor([make_key(self.seed, index, 2)], device=flat.device), flat.shape[1] + 1)
            signs = (words[0, 1:] >> 63 | 1).to(total.dtype)
            shift = int(words[0, 0]) % self.dims
            places = (torch.arange(flat.shape[1], device=flat.device) + shift) % self.dims
            total[:, places] += flat * signs
        return torch.zeros(rows, self.width) if total is None else total
