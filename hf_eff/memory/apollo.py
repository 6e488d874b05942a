"""apollo: the raw gradient, its channels scaled as Adam would scale them in a random low-rank space.

Idea
    Adam mostly changes how long each channel of a gradient is. APOLLO reads these factors from r random
    combinations R of the rows of G [m, n] (m the shorter side), and applies them to G itself:

        R = P G,    s_j = |Adam(R)_j| / |R_j|,    W <- (1 - lr decay) W - lr scale G diag(s)

    P [r, m] is drawn again from (seed, name) at each step and changes every T steps: it is never stored. The
    scaled gradient's norm may grow by 1 % a step. APOLLO-Mini is rank=1, scaling="tensor", scale=128.
    Embeddings, norms and the output head have plain AdamW.

Cost      for each matrix m x n of a layer; P_o parameters of everything else
    weights    w P bytes
    gradients  w P bytes; with layerwise=True none that stays
    optimizer  4 (2 n r + 1) bytes a matrix, and 8 P_o
    step       forward, backward and 2 m n r FLOPs a matrix, and m r random numbers

Use when   all weights shall move at every step and Adam's state does not fit; no singular values are needed.
Avoid when embeddings hold most of the weights: their state stays.
Differs    from the paper in nothing that is known; from the package apollo-torch: state of tensors and integers, so
           that a run resumes exactly, layerwise too; projections are not stored; bf16 weights have fp32 state and
           stochastic rounding. With scale=1 updates are shorter than AdamW's by about sqrt(r / m); the paper's
           analysis multiplies by the inverse.

Paper      APOLLO: SGD-like Memory, AdamW-level Performance (2024), arXiv:2412.05270
Code       zhuhanqing/APOLLO, CC-BY-NC-4.0: written from the paper, compared by running the package only
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.memory import OptimizerContext
from hf_eff.contracts.spec import MethodConfig, MethodSpec, Paper, Traits, knob
from hf_eff.engines.low_rank_method import LowRankMethod, low_rank_cost, require_usable

if TYPE_CHECKING:
    from hf_eff.engines.low_rank_optimizer import ScaledGradient


@dataclass(frozen=True, kw_only=True)
class ApolloConfig(MethodConfig):
    """Options of ``memory="apollo"``."""

    rank: int = knob(128, "Random dimensions r that are kept of each gradient.", low=1, paper="256; 1 for Mini")
    update_gap: int = knob(200, "Updates T between two projections.", low=1, unit="steps", paper="200")
    scale: float = knob(
        1.0, "Factor of the scaled gradient, on top of the learning rate.", low=0, paper="1; 128 for Mini"
    )
    scaling: Literal["channel", "tensor"] = knob(
        "channel",
        "One factor for each channel of the longer side, or one for the whole matrix (Mini).",
        choices=("channel", "tensor"),
        paper="channel; tensor for Mini",
    )
    norm_limit: float | None = knob(
        1.01, "Bound on the growth of a scaled gradient's norm from one step to the next; None for none.", low=1.0
    )
    target_modules: tuple[str, ...] = knob(
        (),
        "Modules of the layers whose gradients are scaled, by the last parts of their names; empty for every linear "
        "one.",
    )
    layerwise: bool = knob(
        False, "Update each weight inside the backward and free its gradient; needs max_grad_norm=0, no accumulation."
    )


class Apollo(LowRankMethod):
    """Gradient scaling read from a random subspace.

    Args:
        config: Options.
    """

    def __init__(self, config: ApolloConfig) -> None:
        super().__init__(self._optimizer, layerwise=config.layerwise)
        self.config = config

    def _optimizer(self, context: OptimizerContext) -> ScaledGradient:
        from hf_eff.engines.low_rank_optimizer import ScaledGradient, Subspace

        config = self.config
        return ScaledGradient(
            context,
            Subspace(config.rank, config.update_gap),
            scale=config.scale,
            scaling=config.scaling,
            limit=config.norm_limit,
            target_modules=config.target_modules,
        )


def cost(config: ApolloConfig, facts: Facts) -> Cost:
    """Bytes of the moments in the subspace; FLOPs of the projections.

    Raises:
        PlanError: The run has adapters, or something that layerwise updates cannot do.
    """
    require_usable(facts, "memory='apollo'", layerwise=config.layerwise)

    def flops(shape: tuple[int, int]) -> float:
        return 2.0 * shape[0] * shape[1] * min(config.rank, *shape)

    return low_rank_cost(
        facts,
        rank=config.rank,
        projection="std",
        target_modules=config.target_modules,
        stores_basis=False,
        layerwise=config.layerwise,
        step_flops=flops,
    )


SPEC = MethodSpec(
    name="apollo",
    kind="memory",
    slot="update",
    summary="The raw gradient, its channels scaled as Adam would scale them in a random low-rank space.",
    config=ApolloConfig,
    build=Apollo,
    cost=cost,
    paper=Paper(title="APOLLO: SGD-like Memory, AdamW-level Performance", year=2024, arxiv="2412.05270"),
    traits=Traits(deterministic=False, owns_optimizer=True, peft=False, quantized=False, streaming=True),
    tiny={"rank": 4, "update_gap": 2},
)
