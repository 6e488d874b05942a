"""Zeroth-order steps as the papers write them: perturb all weights, look at the loss, put them back."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from hf_eff.testing.update_scene import DECAY, batch, decayed


def literal_steps(
    model: nn.Module,
    steps: Iterable[int],
    direction: Callable[[str, Tensor, int], Tensor],
    scale: Callable[[Tensor], float],
    *,
    lr: float,
    eps: float = 1e-3,
) -> dict[str, Tensor]:
    """Weights after SPSA along given directions, weight decay included.

    Args:
        model: Trained in place, on ``update_scene.batch`` of each step.
        steps: Which steps.
        direction: Gives z of a parameter, of its shape, by name and step.
        scale: What a parameter's part of the update is multiplied by.
        lr: Learning rate.
        eps: Length of the perturbation.

    Returns:
        Copies of all parameters, by name.
    """
    named = dict(model.eval().named_parameters())
    for step in steps:
        inputs, kept = batch(step), {name: each.detach().clone() for name, each in named.items()}
        along = {name: direction(name, each.detach(), step) for name, each in named.items()}
        losses = []
        for sign in (1.0, -1.0):
            for name, each in named.items():
                each.data = kept[name] + sign * eps * along[name]
            with torch.no_grad():
                losses.append(float(model(**inputs).loss.double()))
        projected = (losses[0] - losses[1]) / (2 * eps)
        for name, each in named.items():
            decay = DECAY if name in decayed(model) else 0.0
            each.data = kept[name] * (1 - lr * decay) - lr * projected * scale(each) * along[name]
    return {name: each.detach().clone() for name, each in named.items()}
