"""Zeroth-order steps: the loss at two perturbed weights, and the update along the same directions.

A method built on this decides which losses to compare and with what coefficients to move; see ``memory/mezo.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_eff.engines.directions import DirectionFamily
from hf_eff.engines.ephemeral import EphemeralWeights
from hf_eff.engines.forward_only import fixed_noise
from hf_eff.engines.stochastic_rounding import round_stochastically_

_NOISE, _ROUNDING = -1, -2  # draws that name other streams than directions


@dataclass(frozen=True)
class Term:
    """One direction in an update: the descent is along ``coefficient * z(step, draw)``."""

    step: int
    draw: int
    coefficient: float


def probe(
    weights: EphemeralWeights,
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
    device = next((p.device for p in weights.parameters.values()), torch.device("cpu"))

    def repeatable_loss() -> Tensor:
        with fixed_noise(family.key("", step, _NOISE, noise), device):
            return _wide(loss())

    def at(scale: float) -> Tensor:
        def perturbed(name: str, stored: Tensor) -> Tensor:
            return family.add_(torch.empty_like(stored), name, step, scale, base=stored, draw=draw)

        return weights.evaluate(perturbed, repeatable_loss)

    return torch.stack([at(eps), at(-eps)])


@torch.no_grad()
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

    A bf16 parameter is moved in fp32 and rounded stochastically.

    Args:
        parameters: Pairs of name and tensor.
        family: Makes the directions, the same ones that were probed.
        terms: Directions and their coefficients.
        step: Optimizer step, which names the rounding's random bits.
        lr: Learning rate.
        weight_decay: Decoupled decay.
    """
    for name, parameter in parameters:
        stored = parameter.data
        narrow = stored.dtype == torch.bfloat16
        wide = stored.float() if narrow else stored
        if weight_decay:
            wide.mul_(1.0 - lr * weight_decay)
        for term in terms:
            scale = -lr * term.coefficient * family.update_scale
            family.add_(wide, name, term.step, scale, draw=term.draw)
        if narrow:
            generator = torch.Generator(stored.device).manual_seed(family.key(name, step, _ROUNDING))
            round_stochastically_(stored, wide, generator)


def _wide(loss: Tensor) -> Tensor:
    """float64, since two nearly equal numbers are about to be subtracted; MPS has no such type."""
    return loss.detach().to(torch.float32 if loss.device.type == "mps" else torch.float64)
