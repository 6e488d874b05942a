"""mezo: zeroth-order SGD by two forwards a step; no backward, no gradients, no optimizer state.

Idea
    Draw a random direction z, look at the loss on both sides, move along z (SPSA, Definition 1):

        c = (L(w + eps z) - L(w - eps z)) / (2 eps),        w <- w - lr (c z + decay w)

    z is never stored: it is drawn again, parameter by parameter, from (seed, step, name). The perturbed
    weights exist only while the module that holds them runs; the stored ones are not touched by a probe.

Cost      P parameters, w bytes per weight, V vocabulary, h hidden size, n directions, m micro-batches
    weights      w P bytes
    gradients    none
    optimizer    none (a replay log of about a hundred bytes a step)
    activations  none; the peak above inference is one copy of the output head (w V h), one of the
                 largest other layer at work, and 6 MiB for random numbers
    step         2 n m forwards and 2 n m + n passes of random numbers over the weights; (n + 1) m forwards
                 one-sided; n J passes more with momentum over J steps

Use when   only inference fits, or the loss has no gradient; with adapters, whose few parameters
           make the estimate less noisy.
Avoid when backpropagation fits: MeZO needs 10 to 100 times as many steps. The learning rate has to be
           small, about 1e-7 to 1e-6 for all weights and 1e-5 to 1e-4 for adapters.
Differs    from the paper's Algorithm 1: weights are not perturbed and restored in place (which drifts by 4%
           in 100 steps of bf16), so a bf16 run is possible; one direction serves the whole accumulation window;
           bf16 updates are rounded stochastically; c is taken from losses averaged over processes; the loss
           reported is (L+ + L-) / 2; momentum draws the directions of earlier steps again instead of keeping a
           copy of the weights; distribution='sparse' moves small weights only, as Sparse MeZO (2402.15751) does.
           The official code reports L+ and refuses accumulation.

Paper      Fine-Tuning Language Models with Just Forward Passes (2023), arXiv:2305.17333
Code       princeton-nlp/MeZO, MIT; its in-place loop is timed beside ours in benchmarks/zeroth_order.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.memory import OptimizerContext
from hf_eff.contracts.spec import MethodSpec, Paper, knob
from hf_eff.engines.zeroth_order_method import TRAITS, ZerothOrder, ZerothOrderConfig, zeroth_order_cost
from hf_eff.errors import OptionError

if TYPE_CHECKING:
    from hf_eff.engines.directions import DirectionFamily
    from hf_eff.engines.update_rules import UpdateRule


@dataclass(frozen=True, kw_only=True)
class MeZOConfig(ZerothOrderConfig):
    """Options of ``memory="mezo"``."""

    distribution: Literal["gaussian", "rademacher", "sparse"] = knob(
        "gaussian",
        "Entries of z: standard normal; +1 and -1 (also unbiased, and cheaper to draw on a CPU); or normal on the "
        "smallest weights and zero on the others (Sparse MeZO).",
        choices=("gaussian", "rademacher", "sparse"),
        paper="gaussian",
    )
    density: float = knob(0.25, "Share of each matrix's entries that distribution='sparse' moves.", low=1e-6, high=1.0)
    momentum: float = knob(
        0.0,
        "Decay of a mean over the estimates of earlier steps, whose directions are drawn again; 0 for none.",
        low=0.0,
        high=0.9999,
        paper="0",
    )
    momentum_tolerance: float = knob(
        0.01, "Relative weight from which on an earlier step is left out of the mean.", low=1e-6, high=0.5
    )

    def __post_init__(self) -> None:
        """Check combinations.

        Raises:
            OptionError: Momentum with a mask that follows the weights: earlier directions cannot be drawn again.
        """
        super().__post_init__()
        if self.momentum and self.distribution == "sparse":
            raise OptionError(
                f"{self._address('momentum')} must be 0 with distribution='sparse', got {self.momentum}: the mask of "
                "an earlier step is not known once the weights have moved; use distribution='gaussian'."
            )


class MeZO(ZerothOrder):
    """Zeroth-order SGD along dense random directions.

    Args:
        config: Options.
    """

    name = "mezo"
    config: MeZOConfig

    def family(self, context: OptimizerContext) -> DirectionFamily:
        """Independent entries."""
        from hf_eff.engines.directions import FAMILIES
        from hf_eff.engines.ephemeral import unique_parameters
        from hf_eff.engines.sparse_directions import SparseGaussian, thresholds_of

        if self.config.distribution != "sparse":
            return FAMILIES[self.config.distribution](context.seed)
        parameters = unique_parameters(context.model, context.candidates)
        return SparseGaussian(context.seed, thresholds_of(parameters, self.config.density))

    def rule(self) -> UpdateRule | None:
        """Momentum over the last steps, where there is any."""
        from hf_eff.engines.update_rules import RecentMomentum, momentum_window

        beta = self.config.momentum
        return RecentMomentum(beta, momentum_window(beta, self.config.momentum_tolerance)) if beta else None


def cost(config: MeZOConfig, facts: Facts) -> Cost:
    """Forwards, and the bytes of inference with copies of the output head and of the largest layer at work."""
    return zeroth_order_cost(config, facts)


SPEC = MethodSpec(
    name="mezo",
    kind="memory",
    slot="update",
    summary="Zeroth-order SGD by two forwards a step; no backward, no gradients, no optimizer state.",
    config=MeZOConfig,
    build=MeZO,
    cost=cost,
    paper=Paper(title="Fine-Tuning Language Models with Just Forward Passes", year=2023, arxiv="2305.17333"),
    traits=TRAITS,
)
