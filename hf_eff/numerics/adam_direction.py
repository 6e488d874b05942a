"""The step that Adam would take on one example's gradient, in the forms that circulate.

With Adam's moments m, v after t steps and a new gradient g, the paper of LESS (arXiv:2402.04333,
section 3.1) takes the step of Adam itself:

    m' = (b1 m + (1 - b1) g) / (1 - b1^(t+1)),   v' = (b2 v + (1 - b2) g^2) / (1 - b2^(t+1))
    paper       m' / (sqrt(v') + eps)

The code published with it has no bias correction and its epsilon inside the root. Where gradients
are small against sqrt(eps) = 1e-4, as those of adapters often are, it is plain momentum:

    official    (b1 m + (1 - b1) g) / sqrt(b2 v + (1 - b2) g^2 + eps)

Both put g into its own scale. After a short warm-up on batch means the gradient of a single example
outweighs everything in v', and the step is little more than the sign of g, also in coordinates that
carry nothing. The third form keeps the step linear in g, and trusts v as far as its t steps go:

    v^ = v / (1 - b2^t),   s = (t v^ + k mean(v^)) / (t + k)
    damped      m' / (sqrt(s) + eps),   k = 1 / (1 - b2)

It is the gradient itself for t = 0 and goes over into Adam's scale as t passes the horizon k of v.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from hf_eff.errors import OptionError

# B examples, p entries of one tensor

ADAM_VARIANTS = ("paper", "official", "damped", "none")
Direction = Callable[[int, Tensor], Tensor]
"""Turns the gradients [B, p] of the tensor of a number into steps [B, p]; may work in place."""


@dataclass(frozen=True)
class AdamScaling:
    """How a gradient becomes a step.

    Attributes:
        variant: One of ``ADAM_VARIANTS``; ``"none"`` keeps the gradient itself.
        include_momentum: Whether the running mean m, the same for all examples, is part of it.
        betas: Decay rates b1, b2, each in [0, 1).
        eps: Adam's epsilon.

    Raises:
        OptionError: The variant is unknown.
    """

    variant: str = "paper"
    include_momentum: bool = True
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        """Check the variant."""
        if self.variant not in ADAM_VARIANTS:
            raise OptionError(f"adam_variant must be one of {list(ADAM_VARIANTS)}, got {self.variant!r}.")

    def at(self, first: Sequence[Tensor], second: Sequence[Tensor], step: int) -> Direction:
        """The scaling at one moment of a training.

        Args:
            first: Running means m, one [p] a tensor, without bias correction.
            second: Running means of squares v, one [p] a tensor, without bias correction.
            step: Optimizer steps t behind the moments.

        Returns:
            Function of a tensor's number and its gradients [B, p], such that the weights would move
            by minus the learning rate times the result. It may overwrite the gradients.
        """
        scales = self._damped_scales(second, step) if self.variant == "damped" else []

        def direction(index: int, gradients: Tensor) -> Tensor:
            if self.variant == "none":
                return gradients
            if self.variant == "damped":
                return self._mean(gradients, first[index], step).div_(scales[index])
            beta2 = self.betas[1]
            square = gradients.square().mul_(1 - beta2).add_(second[index], alpha=beta2)
            if self.variant == "official":
                return self._mean(gradients, first[index], None).div_(square.add_(self.eps).sqrt_())
            scale = square.div_(1 - beta2 ** (step + 1)).sqrt_().add_(self.eps)
            return self._mean(gradients, first[index], step).div_(scale)

        return direction

    def _mean(self, gradients: Tensor, first: Tensor, step: int | None) -> Tensor:
        """First moment with one more gradient; bias-corrected where the step is given."""
        beta1 = self.betas[0]
        mean = gradients.mul_(1 - beta1)
        if self.include_momentum:
            mean.add_(first, alpha=beta1)
        return mean if step is None else mean.div_(1 - beta1 ** (step + 1))

    def _damped_scales(self, second: Sequence[Tensor], step: int) -> list[Tensor]:
        beta2 = self.betas[1]
        prior = 1 / (1 - beta2)
        debiased = [moment / (1 - beta2**step) if step else moment for moment in second]
        mean = sum(float(moment.sum()) for moment in debiased) / sum(moment.numel() for moment in debiased)
        return [((moment * step + prior * mean) / (step + prior)).sqrt_().add_(self.eps) for moment in debiased]
