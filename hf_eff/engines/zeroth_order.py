"""Zeroth-order steps: the loss at two perturbed weights, and the update along the same directions.

A method built on this decides which losses to compare and with what coefficients to move; see
``zeroth_order_method.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from hf_eff.engines.directions import DirectionFamily
from hf_eff.engines.forward_only import fixed_noise
from hf_eff.engines.part_rounding import round_part_

_NOISE, _ROUNDING = -1, -2  # draws that name other streams than directions


@dataclass(frozen=True)
class Term:
    """One direction in an update: the descent is along ``coefficient * z(step, draw)``."""

    step: int
    draw: int
    coefficient: float


class Evaluates(Protocol):
    """A model's parameters, and its evaluation with others in their place."""

    parameters: dict[str, nn.Parameter]

    def evaluate(self, value: Callable[[str, Tensor], Tensor], function: Callable[[], Tensor]) -> Tensor:
        """Call ``function`` with every parameter replaced by ``value(name, stored tensor)``."""


def probe(
    weights: Evaluates,
    family: DirectionFamily,
    loss: Callable[[], Tensor],
    *,
    step: int,
    eps: float,
    draw: int = 0,
    noise: int = 0,
) -> Tensor:
    """Losses at ``weights + eps z`` and ``weights - eps z``; the weights themselves stay bitwise as they are.

    Args:
        weights: The model's parameters.
        family: Makes z.
        loss: Runs the model on one batch; called inside ``forward_only``.
        step: Optimizer step that z belongs to.
        eps: Length of the perturbation along z.
        draw: Which of several directions of the step.
        noise: Names the random numbers that the model itself may draw, with the step: a batch's index, for instance.

    Returns:
        [2] float64: the loss above and the loss below. Their difference over 2 eps estimates z . gradient.
    """
    at = partial(loss_along, weights, family, loss, step=step, draw=draw, noise=noise)
    return torch.stack([at(eps), at(-eps)])


def loss_along(
    weights: Evaluates,
    family: DirectionFamily,
    loss: Callable[[], Tensor],
    scale: float,
    *,
    step: int,
    draw: int = 0,
    noise: int = 0,
) -> Tensor:
    """Loss at ``weights + scale z``, as a float64 scalar; at the weights themselves where ``scale`` is 0.

    Args:
        weights: The model's parameters.
        family: Makes z.
        loss: Runs the model on one batch; called inside ``forward_only``.
        scale: Multiple of z.
        step: Optimizer step that z belongs to.
        draw: Which of several directions of the step.
        noise: Names the random numbers that the model itself may draw, as for ``probe``.
    """
    device = next((p.device for p in weights.parameters.values()), torch.device("cpu"))

    def repeatable_loss() -> Tensor:
        with fixed_noise(family.key("", step, _NOISE, noise), device):
            return _wide(loss())

    def perturbed(name: str, stored: Tensor) -> Tensor:
        return family.add_(torch.empty_like(stored), name, step, scale, base=stored, draw=draw)

    return weights.evaluate(perturbed, repeatable_loss) if scale else repeatable_loss()


def update(
    parameters: Iterable[tuple[str, Tensor]],
    family: DirectionFamily,
    terms: Sequence[Term],
    *,
    step: int,
    lr: float,
    weight_decay: float = 0.0,
) -> None:
    """Move each parameter: ``p <- (1 - lr weight_decay) p - lr sum_i c_i z_i``.

    Args:
        parameters: Pairs of name and tensor.
        family: Makes the directions, the same ones that were probed.
        terms: Directions and their coefficients.
        step: Optimizer step, which names the rounding's random bits.
        lr: Learning rate.
        weight_decay: Decoupled decay.
    """

    def descend(name: str, wide: Tensor, before: Tensor) -> None:
        scale = -lr * family.update_scale(name, wide)
        for term in terms:
            family.add_(wide, name, term.step, scale * term.coefficient, draw=term.draw, at=before)

    move(parameters, family, descend, step=step, decay=lr * weight_decay)


@torch.no_grad()
def move(
    parameters: Iterable[tuple[str, Tensor]],
    family: DirectionFamily,
    descend: Callable[[str, Tensor, Tensor], None],
    *,
    step: int,
    decay: float = 0.0,
) -> None:
    """Shrink each parameter by the share ``decay`` and add what ``descend`` adds.

    A bf16 parameter is moved in fp32 and rounded stochastically. Of a sharded one this process's part is moved.

    Args:
        parameters: Pairs of name and tensor.
        family: Names the rounding's random bits, and says which tensors are parts of larger ones.
        descend: ``descend(name, wide, before)`` adds to ``wide`` in place; ``before`` are the weights as they were,
            where the family reads them.
        step: Optimizer step, which names the rounding's random bits.
        decay: Share of the weights that is taken away.
    """
    for name, parameter in parameters:
        stored = local_part(parameter.data)
        narrow = stored.dtype == torch.bfloat16
        wide = stored.float() if narrow else stored
        before = stored.clone() if family.reads_weights and not narrow else stored
        if decay:
            wide.mul_(1.0 - decay)
        descend(name, wide, before)
        if narrow:
            generator = torch.Generator(stored.device).manual_seed(family.key(name, step, _ROUNDING))
            round_part_(stored, wide, generator, family.place(name, stored))


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a sharded tensor, on the same memory; any other tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def _wide(loss: Tensor) -> Tensor:
    """float64, since two nearly equal numbers are about to be subtracted; MPS has no such type."""
    return loss.detach().to(torch.float32 if loss.device.type == "mps" else torch.float64)
