"""Adam on a few dimensions of each matrix gradient: projected Adam (GaLore) and gradient scaling (APOLLO)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hf_eff.contracts.memory import OptimizerContext
from hf_eff.engines.matrices import block_matrices
from hf_eff.engines.module_tree import find_blocks
from hf_eff.engines.parameter_optimizer import ParameterOptimizer
from hf_eff.errors import OptionError, PlanError
from hf_eff.numerics.gradient_subspace import add_back_, leading_basis, project, random_basis
from hf_eff.numerics.layer_shapes import is_named
from hf_eff.numerics.subspace_shapes import Projection, Side, projected_side, refresh_flops

_BASIS = 2
_TINY = 1e-30


@dataclass(frozen=True)
class Subspace:
    """How gradients are projected.

    Attributes:
        rank: Dimensions that are kept; all of a matrix that has fewer.
        every: Updates of a parameter between two projections.
        projection: Which side is replaced.
    """

    rank: int
    every: int
    projection: Projection = "std"


class LowRankOptimizer(ParameterOptimizer):
    """AdamW whose moments live in a subspace for the weight matrices of the layers; plain AdamW for the rest.

    Args:
        context: See ``ParameterOptimizer``.
        address: What the user typed, for messages.
        subspace: Rank, interval and side.
        target_modules: Names, or last parts of names, of the modules whose weights are projected; empty for every
            linear layer inside the layers.

    Raises:
        PlanError: No matrix is left to project.
        OptionError: A name in ``target_modules`` fits no linear layer.
    """

    def __init__(
        self, context: OptimizerContext, address: str, subspace: Subspace, target_modules: Sequence[str] = ()
    ) -> None:
        super().__init__(context, address)
        self.subspace = subspace
        self._targets = {id(weight) for weight in _targets(context, address, target_modules)}

    def update_group(self, group: Mapping[str, Any], named: Sequence[tuple[str, Tensor]]) -> None:
        """Matrices one by one, the others together."""
        self.adamw(group, [(name, parameter) for name, parameter in named if not self.is_projected(parameter)])
        for name, parameter in named:
            if self.is_projected(parameter):
                self.update(name, parameter, group)

    @torch.no_grad()
    def update(self, name: str, parameter: Tensor, group: Mapping[str, Any]) -> None:
        """See ``ParameterOptimizer``."""
        if not self.is_projected(parameter):
            self.adamw(group, [(name, parameter)])
            return
        assert parameter.grad is not None  # noqa: S101 - callers pass parameters with a gradient
        gradient = parameter.grad.float() if parameter.dtype == torch.bfloat16 else parameter.grad
        wide = self.wide(parameter)
        if self._move(name, wide, gradient, self.state[parameter], group):
            self.write(name, parameter, wide)

    def is_projected(self, parameter: Tensor) -> bool:
        """Whether a parameter's gradient is projected."""
        return id(parameter) in self._targets

    def side(self, matrix: Tensor) -> Side:
        """The side of a matrix that is replaced."""
        return projected_side((matrix.shape[0], matrix.shape[1]), self.subspace.projection)

    def flops(self, global_step: int) -> float:
        """FLOPs of the projections in one step."""
        shapes = [
            (each.shape[0], each.shape[1])
            for _, named in self.grouped()
            for _, each in named
            if self.is_projected(each)
        ]
        refreshes = global_step % self.subspace.every == 0
        return sum(self.matrix_flops(shape, refreshes=refreshes) for shape in shapes)

    @abstractmethod
    def matrix_flops(self, shape: tuple[int, int], *, refreshes: bool) -> float:
        """FLOPs of projecting one matrix, with a new projection or without."""

    @abstractmethod
    def _move(self, name: str, wide: Tensor, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> bool:
        """Move one matrix; False where nothing can be done with this gradient."""


class ProjectedAdamW(LowRankOptimizer):
    """GaLore: the Adam direction of R, projected back and scaled.

    Args:
        context: See ``ParameterOptimizer``.
        subspace: Rank, interval and side.
        scale: Factor of the projected-back direction.
        exact: Full singular value decompositions instead of randomised ones.
        target_modules: See ``LowRankOptimizer``.
    """

    def __init__(
        self,
        context: OptimizerContext,
        subspace: Subspace,
        *,
        scale: float = 0.25,
        exact: bool = False,
        target_modules: Sequence[str] = (),
    ) -> None:
        super().__init__(context, "memory='galore'", subspace, target_modules)
        self.scale = scale
        self.exact = exact

    def matrix_flops(self, shape: tuple[int, int], *, refreshes: bool) -> float:
        """See ``LowRankOptimizer``: to the subspace and back."""
        rank = min(self.subspace.rank, *shape)
        flops = 4.0 * shape[0] * shape[1] * rank
        return flops + (refresh_flops(shape, rank, exact=self.exact) if refreshes else 0.0)

    def _move(self, name: str, wide: Tensor, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> bool:
        side, step = self.side(gradient), state.get("step", 0)
        if step % self.subspace.every == 0:
            if not bool(gradient.isfinite().all()):  # it has no directions
                return False
            generator = None if self.exact else self.generator(gradient.device, name, step, _BASIS)
            state["projector"] = leading_basis(gradient, self.subspace.rank, side, generator)
        direction = _adam_direction(project(gradient, state["projector"], side), state, group)
        lr, decay = group["lr"], group["weight_decay"]
        add_back_(wide, direction, state["projector"], side, beta=1.0 - lr * decay, alpha=-lr * self.scale)
        return True


class ScaledGradient(LowRankOptimizer):
    """APOLLO: the gradient itself, its channels scaled as Adam scales those of R.

    Args:
        context: See ``ParameterOptimizer``.
        subspace: Rank, interval and side.
        scale: Factor of the scaled gradient.
        scaling: One factor for each channel of the side that is not projected, or one for the matrix.
        limit: Bound on the growth of the scaled gradient's norm from one step to the next; None for none.
        target_modules: See ``LowRankOptimizer``.
    """

    def __init__(
        self,
        context: OptimizerContext,
        subspace: Subspace,
        *,
        scale: float = 1.0,
        scaling: Literal["channel", "tensor"] = "channel",
        limit: float | None = 1.01,
        target_modules: Sequence[str] = (),
    ) -> None:
        super().__init__(context, "memory='apollo'", subspace, target_modules)
        self.scale = scale
        self.scaling = scaling
        self.limit = limit

    def matrix_flops(self, shape: tuple[int, int], *, refreshes: bool) -> float:
        """See ``LowRankOptimizer``: to the subspace only."""
        return 2.0 * shape[0] * shape[1] * min(self.subspace.rank, *shape)

    def _move(self, name: str, wide: Tensor, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> bool:
        side, step = self.side(gradient), state.get("step", 0)
        draw = step // self.subspace.every
        basis = random_basis(gradient, self.subspace.rank, side, self.generator(gradient.device, name, draw, _BASIS))
        small = project(gradient, basis, side).float()
        direction = _adam_direction(small, state, group)
        factors = self._factors(small, direction, side)
        length = _scaled_norm(gradient, factors)
        if self.limit is not None and "norm" in state:
            factors = factors * (self.limit * state["norm"] / length.clamp_min(_TINY)).clamp_max(1.0)
            length = torch.minimum(length, self.limit * state["norm"])
        state["norm"] = length
        lr, decay = group["lr"], group["weight_decay"]
        if decay:
            wide.mul_(1.0 - lr * decay)
        wide.addcmul_(gradient, factors, value=-lr * self.scale)
        return True

    def _factors(self, small: Tensor, direction: Tensor, side: Side) -> Tensor:
        """How much Adam lengthens R: [1, b], [a, 1], or [1, 1] for one factor."""
        along = (0, 1) if self.scaling == "tensor" else (0,) if side == "left" else (1,)
        before = torch.linalg.vector_norm(small, dim=along, keepdim=True)
        return torch.linalg.vector_norm(direction, dim=along, keepdim=True) / before.clamp_min(_TINY)


def _adam_direction(small: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> Tensor:
    """Update the moments of ``small``; their ratio with both bias corrections, as in AdamW."""
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(small), torch.zeros_like(small)
    beta1, beta2 = group["betas"]
    state["step"] = step = state.get("step", 0) + 1
    first = state["exp_avg"].lerp_(small, 1.0 - beta1)
    second = state["exp_avg_sq"].mul_(beta2).addcmul_(small, small, value=1.0 - beta2)
    spread = second.sqrt().div_((1.0 - beta2**step) ** 0.5).add_(group["eps"])
    return torch.div(first, spread, out=spread).div_(1.0 - beta1**step)


def _scaled_norm(gradient: Tensor, factors: Tensor) -> Tensor:
    """Norm of ``gradient * factors`` without making it."""
    if factors.shape == (1, 1):
        return factors.reshape(()) * torch.linalg.vector_norm(gradient)
    along = 0 if factors.shape[0] == 1 else 1
    channels = torch.linalg.vector_norm(gradient, dim=along, keepdim=True)
    return torch.linalg.vector_norm(channels * factors)


def _targets(context: OptimizerContext, address: str, target_modules: Sequence[str]) -> Sequence[Tensor]:
    """Trainable two-dimensional weights of the layers' linear modules that were asked for."""
    found = {
        f"{name}.{matrix.path}": matrix.weight
        for (name, _), inside in zip(find_blocks(context.model), block_matrices(context.model), strict=True)
        for matrix in inside
        if matrix.known and matrix.weight.dim() == 2 and matrix.weight.is_floating_point()
    }
    for wanted in target_modules:
        if not any(is_named(path, wanted) for path in found):
            raise OptionError(
                f"{address}: target_modules names {wanted!r}, and no linear module in a layer is so called."
            )
    trained = {id(p) for name, p in context.model.named_parameters() if name in context.candidates}
    chosen = [
        weight
        for path, weight in found.items()
        if id(weight) in trained and (not target_modules or any(is_named(path, each) for each in target_modules))
    ]
    if not chosen:
        raise PlanError(f"{address} finds no trainable weight matrix inside the layers; use memory='full'.")
    return chosen
