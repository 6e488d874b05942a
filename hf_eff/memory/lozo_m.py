"""lozo_m: LOZO with momentum, whose state is one thin factor a matrix.

Idea
    Momentum of estimates that share V for nu steps needs the left factors alone:

        N <- beta N + (1 - beta) c U,        W <- W - lr (N V^T / r + decay W)
        when V changes:  N <- N (V_old^T V_new) / n

    N is [m, r]. V_old is drawn again, and the [r, r] product comes first, so no [m, n] tensor is made.

Cost      P parameters, w bytes per weight, matrices m_i x n_i, vectors of d_j entries
    weights      w P bytes
    gradients    none
    optimizer    4 (sum_i r m_i + sum_j d_j) bytes
    activations  none; as lozo
    step         as lozo

Use when   lozo is used and its estimates are noisy.
Avoid when as lozo; under FSDP2 (the state is not divided).
Differs    from the official code: as lozo; N is carried over without a tensor of the matrix's size; N is saved with the
           optimizer, in fp32 also where the weights are bf16; vectors have momentum too.

Paper      Enhancing Zeroth-order Fine-tuning for Language Models with Low-rank Structures (2024), arXiv:2410.07698
Code       optsuite/LOZO, no licence; not read into this file
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_eff.contracts.cost import Cost, Facts, ModelFacts
from hf_eff.contracts.spec import MethodSpec, Paper, knob
from hf_eff.engines.low_rank_zeroth_order import LowRankConfig, LowRankZerothOrder
from hf_eff.engines.zeroth_order_method import TRAITS, matrix_shapes, zeroth_order_cost
from hf_eff.numerics.flops import everything_trains

if TYPE_CHECKING:
    from hf_eff.engines.update_rules import UpdateRule

_FLOAT_BYTES = 4.0


@dataclass(frozen=True, kw_only=True)
class LOZOMConfig(LowRankConfig):
    """Options of ``memory="lozo_m"``."""

    momentum: float = knob(0.9, "Decay beta of the mean of left factors.", low=0.0, high=0.9999, paper="0.9")


class LOZOM(LowRankZerothOrder):
    """Zeroth-order SGD along U V^T with momentum.

    Args:
        config: Options.
    """

    name = "lozo_m"
    config: LOZOMConfig

    def rule(self) -> UpdateRule:
        """Momentum of left factors."""
        from hf_eff.engines.low_rank_momentum import LowRankMomentum

        return LowRankMomentum(self.config.momentum)


def cost(config: LOZOMConfig, facts: Facts) -> Cost:
    """As without momentum, and the left factors."""
    plain = zeroth_order_cost(config, facts)
    return dataclasses.replace(plain, bytes={**plain.bytes, "optimizer": _state_bytes(config, facts.model)})


def _state_bytes(config: LOZOMConfig, model: ModelFacts) -> float:
    part = model.trainable or everything_trains(model)
    shapes = [shape for shape in matrix_shapes(model, part) if min(shape) > config.rank]
    vectors = part.params - sum(rows * columns for rows, columns in shapes)
    return _FLOAT_BYTES * (vectors + config.rank * sum(rows for rows, _ in shapes))


SPEC = MethodSpec(
    name="lozo_m",
    kind="memory",
    slot="update",
    summary="LOZO with momentum, whose state is one thin factor a matrix.",
    config=LOZOMConfig,
    build=LOZOM,
    cost=cost,
    paper=Paper(
        title="Enhancing Zeroth-order Fine-tuning for Language Models with Low-rank Structures",
        year=2024,
        arxiv="2410.07698",
    ),
    traits=dataclasses.replace(TRAITS, stateless_optimizer=False, fsdp2=False),
    tiny={"refresh_every": 20},
)
