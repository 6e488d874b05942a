"""The step that Adam would take on one more gradient, and the variant that circulates beside it.

With moments m, v after t steps and a new gradient g, the paper of LESS (arXiv:2402.04333, section 3.1)
takes the step of Adam itself:

    m' = (b1 m + (1 - b1) g) / (1 - b1^(t+1)),   v' = (b2 v + (1 - b2) g^2) / (1 - b2^(t+1))
    step = m' / (sqrt(v') + eps)

The code published with it has no bias correction and its epsilon inside the root:

    step = (b1 m + (1 - b1) g) / sqrt(b2 v + (1 - b2) g^2 + eps)

Where gradients are small against sqrt(eps) = 1e-4, as those of adapters often are, the second is
plain momentum; the two then rank examples differently.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_eff.errors import OptionError

# B examples, p entries of one tensor

ADAM_VARIANTS = ("paper", "official", "none")


@dataclass(frozen=True)
class AdamScaling:
    """How a gradient becomes a step.

    Attributes:
        variant: ``"paper"``, ``"official"``, or ``"none"`` for the gradient itself.
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

    def direction(self, gradients: Tensor, first: Tensor, second: Tensor, step: int) -> Tensor:
        """Scale the gradients of a batch.

        Args:
            gradients: [B, p]; may be overwritten.
            first: [p] running mean m, without bias correction.
            second: [p] running mean of squares v, without bias correction.
            step: Optimizer steps t behind the moments.

        Returns:
            [B, p] such that the weights would move by minus the learning rate times it.
        """
        if self.variant == "none":
            return gradients
        beta1, beta2 = self.betas
        scale = gradients.square().mul_(1 - beta2).add_(second, alpha=beta2)
        mean = gradients.mul_(1 - beta1)
        if self.include_momentum:
            mean.add_(first, alpha=beta1)
        if self.variant == "official":
            return mean.div_(scale.add_(self.eps).sqrt_())
        scale.div_(1 - beta2 ** (step + 1)).sqrt_().add_(self.eps)
        return mean.div_(scale.mul_(1 - beta1 ** (step + 1)))
