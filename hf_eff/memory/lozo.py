"""lozo: zeroth-order SGD along directions of low rank, which cost almost no random numbers.

Idea
    Gradients of fine-tuning are nearly of low rank, so look along products of two thin factors:

        Z = U V^T,    c = (L(W + eps Z) - L(W - eps Z)) / (2 eps),    W <- W - lr (c Z / r + decay W)

    U [m, r] is drawn at every step, V [n, r] for nu steps, each from a stream of its own named by (seed, step or
    window, name). The 1/r makes the mean of c Z / r the gradient. Vectors take normal directions.

Cost      P parameters, w bytes per weight, matrices m_i x n_i, n directions, m micro-batches
    weights      w P bytes
    gradients    none
    optimizer    none: U and V are drawn again when needed
    activations  none; the peak above inference is one copy of the output head and one of the largest other layer
    step         2 n m forwards and as many thin products over the weights; sum_i r (m_i + n_i) random numbers

Use when   as mezo, and where random numbers cost: on a CPU.
Avoid when backpropagation fits; with adapters of rank about r, whose factors are thin already (those take dense
           directions).
Differs    from the official code: on a refresh the applied U is the probed U (there, U is drawn from a stream that V
           has shifted, and every nu-th step is a random walk); 1/r is applied instead of being left to the learning
           rate; U and V are never stored; tensors of more than two dimensions are matrices of their first one;
           rest as mezo.

Paper      Enhancing Zeroth-order Fine-tuning for Language Models with Low-rank Structures (2024), arXiv:2410.07698
Code       optsuite/LOZO, no licence; not read into this file
"""

from __future__ import annotations

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.spec import MethodSpec, Paper
from hf_eff.engines.low_rank_zeroth_order import LowRankConfig, LowRankZerothOrder
from hf_eff.engines.zeroth_order_method import TRAITS, zeroth_order_cost


class LOZO(LowRankZerothOrder):
    """Zeroth-order SGD along U V^T.

    Args:
        config: Options.
    """

    name = "lozo"


def cost(config: LowRankConfig, facts: Facts) -> Cost:
    """Forwards, and the bytes of inference with copies of the output head and of the largest layer at work."""
    return zeroth_order_cost(config, facts)


SPEC = MethodSpec(
    name="lozo",
    kind="memory",
    slot="update",
    summary="Zeroth-order SGD along directions of low rank, which cost almost no random numbers.",
    config=LowRankConfig,
    build=LOZO,
    cost=cost,
    paper=Paper(
        title="Enhancing Zeroth-order Fine-tuning for Language Models with Low-rank Structures",
        year=2024,
        arxiv="2410.07698",
    ),
    traits=TRAITS,
    tiny={"refresh_every": 2},
)
