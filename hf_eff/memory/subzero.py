"""subzero: zeroth-order SGD in random subspaces of each matrix, drawn anew every T_0 steps.

Idea
    Fix two thin orthonormal factors for a while and look only along products with a small random core:

        Z = kappa U S V^T,    c = (L(W + eps Z) - L(W - eps Z)) / (2 eps),    W <- W - lr (c Z + decay W)

    U [m, r] and V [n, r] come from QR of normal matrices, every T_0 steps; S [r, r] is drawn at every step.
    kappa = sqrt(m n) / r gives Z the norm of independent normal entries, so that eps and learning rates of mezo
    carry over and the mean of c Z over subspaces is the gradient. Vectors take normal directions.

Cost      P parameters, w bytes per weight, matrices m_i x n_i, n directions, m micro-batches
    weights      w P bytes
    gradients    none
    optimizer    none in checkpoints
    activations  none; the peak above inference is one copy of the output head, one of the largest other layer, and
                 4 r sum_i (m_i + n_i) bytes, at most 1 GiB: U and V of the window, which are made again otherwise
    step         2 n m forwards and as many thin products over the weights; a QR of each factor every T_0 steps

Use when   as mezo, and where random numbers cost: on a CPU.
Avoid when backpropagation fits. The smaller variance that the paper shows is that of the gradient's part inside the
           subspace: counted against the whole gradient, E|c Z|^2 = m n (1 + 2 / r^2) |G|^2 for a matrix is not less
           than mezo's.
Differs    from the paper: kappa is sqrt(m n) / r, as in the official code, and not 1. From that code: a refresh is
           named by the step and survives a resume; several directions a step; the factors are in no checkpoint;
           a matrix whose shorter side is under 4 r is reshaped to the squarest one always, not in some modes.

Paper      Zeroth-Order Fine-Tuning of LLMs in Random Subspaces (2024), arXiv:2410.08989
Code       zimingyy/SubZero, GPL-3.0; not read into this file
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_eff.contracts.cost import Cost, Facts, ModelFacts
from hf_eff.contracts.memory import OptimizerContext
from hf_eff.contracts.spec import MethodSpec, Paper, knob
from hf_eff.engines.zeroth_order_method import (
    TRAITS,
    ZerothOrder,
    ZerothOrderConfig,
    matrix_shapes,
    zeroth_order_cost,
)
from hf_eff.numerics.flops import everything_trains
from hf_eff.numerics.subspace_matrices import CACHE_BYTES, squared

if TYPE_CHECKING:
    from hf_eff.engines.directions import DirectionFamily

_FLOAT_BYTES = 4.0


@dataclass(frozen=True, kw_only=True)
class SubZeroConfig(ZerothOrderConfig):
    """Options of ``memory="subzero"``."""

    rank: int = knob(
        8,
        "Dimensions r of both subspaces; a matrix whose shorter side is no longer takes dense directions.",
        low=1,
        paper="24 (prompt tuning); 8 in the code",
    )
    refresh_every: int = knob(
        1000, "Steps T_0 for which the subspaces stay.", low=1, unit="steps", paper="1000; 2000 in the code"
    )


class SubZero(ZerothOrder):
    """Zeroth-order SGD along kappa U S V^T.

    Args:
        config: Options.
    """

    name = "subzero"
    config: SubZeroConfig

    def family(self, context: OptimizerContext) -> DirectionFamily:
        """Scaled U S V^T for matrices, normal entries for vectors."""
        from hf_eff.engines.subspace_directions import Subspace

        return Subspace(context.seed, self.config.rank, self.config.refresh_every)


def cost(config: SubZeroConfig, facts: Facts) -> Cost:
    """As for any directions, and the factors of the window."""
    return zeroth_order_cost(config, facts, held_bytes=_factor_bytes(config, facts.model))


def _factor_bytes(config: SubZeroConfig, model: ModelFacts) -> float:
    part = model.trainable or everything_trains(model)
    shapes = [squared(shape, config.rank) for shape in matrix_shapes(model, part)]
    entries = sum(sum(shape) for shape in shapes if min(shape) > config.rank)
    return min(CACHE_BYTES, _FLOAT_BYTES * config.rank * entries)


SPEC = MethodSpec(
    name="subzero",
    kind="memory",
    slot="update",
    summary="Zeroth-order SGD in random subspaces of each matrix, drawn anew every so many steps.",
    config=SubZeroConfig,
    build=SubZero,
    cost=cost,
    paper=Paper(title="Zeroth-Order Fine-Tuning of LLMs in Random Subspaces", year=2024, arxiv="2410.08989"),
    traits=TRAITS,
    tiny={"rank": 4, "refresh_every": 2},
)
