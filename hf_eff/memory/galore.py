"""galore: AdamW on each matrix gradient's leading singular directions, which shrinks Adam's state.

Idea
    Every T steps take the r leading singular directions P of a weight's gradient G [m, n] (m the shorter side),
    keep Adam's moments for R = P^T G [r, n] only, and project its direction back:

        R = P^T G,      N = Adam(R),      W <- (1 - lr decay) W - lr scale P N

    Embeddings, norms and the output head have plain AdamW.

Cost      for each matrix m x n of a layer; P_o parameters of everything else
    weights    w P bytes
    gradients  w P bytes; with layerwise=True none that stays
    optimizer  4 (2 n r + m r) bytes a matrix, and 8 P_o
    step       forward, backward and 4 m n r FLOPs a matrix; every T steps the singular directions

Use when   all weights shall move at every step and Adam's state does not fit.
Avoid when embeddings hold most of the weights (their state stays); when runs are shorter than a few times
           update_gap, which then train in one or two subspaces only.
Differs    from the official code (galore-torch 1.0): singular directions by a randomised search by default (about 3
           times faster on a CPU); the state is tensors and integers, so that a run resumes exactly, layerwise too;
           weight decay comes first and eps is added to the corrected root, as in torch's AdamW; bf16 weights
           have fp32 state and stochastic rounding.

Paper      GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection (2024), arXiv:2403.03507
Code       jiaweizzhao/GaLore, Apache-2.0; compared by running the package galore-torch
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.memory import OptimizerContext
from hf_eff.contracts.spec import MethodConfig, MethodSpec, Paper, Traits, knob
from hf_eff.engines.low_rank_method import LowRankMethod, low_rank_cost, require_usable
from hf_eff.numerics.subspace_shapes import refresh_flops

if TYPE_CHECKING:
    from hf_eff.engines.low_rank_optimizer import ProjectedAdamW


@dataclass(frozen=True, kw_only=True)
class GaLoreConfig(MethodConfig):
    """Options of ``memory="galore"``."""

    rank: int = knob(128, "Dimensions r that are kept of each gradient.", low=1, paper="128 to 1024")
    update_gap: int = knob(200, "Updates T between two projections.", low=1, unit="steps", paper="200")
    scale: float = knob(
        0.25, "Factor of the projected-back direction, on top of the learning rate.", low=0, paper="0.25"
    )
    projection: Literal["std", "left", "right"] = knob(
        "std",
        "Side that is projected: the shorter one (the right one of a square), or always the same.",
        choices=("std", "left", "right"),
        paper="std",
    )
    svd: Literal["randomized", "exact"] = knob(
        "randomized",
        "How singular directions are found: a randomised search with two power iterations, or a full decomposition "
        "(0.17 s instead of 0.05 s for 1536 x 576 on one CPU core).",
        choices=("randomized", "exact"),
        paper="exact",
    )
    target_modules: tuple[str, ...] = knob(
        (),
        "Modules of the layers whose weights are projected, by the last parts of their names; empty for every linear "
        "one.",
    )
    layerwise: bool = knob(
        False, "Update each weight inside the backward and free its gradient; needs max_grad_norm=0, no accumulation."
    )


class GaLore(LowRankMethod):
    """Adam in the leading subspace of each gradient.

    Args:
        config: Options.
    """

    def __init__(self, config: GaLoreConfig) -> None:
        super().__init__(self._optimizer, layerwise=config.layerwise)
        self.config = config

    def _optimizer(self, context: OptimizerContext) -> ProjectedAdamW:
        from hf_eff.engines.low_rank_optimizer import ProjectedAdamW, Subspace

        config = self.config
        return ProjectedAdamW(
            context,
            Subspace(config.rank, config.update_gap, config.projection),
            scale=config.scale,
            exact=config.svd == "exact",
            target_modules=config.target_modules,
        )


def cost(config: GaLoreConfig, facts: Facts) -> Cost:
    """Bytes of the moments in the subspace and of the projections; FLOPs with new projections averaged over the gap.

    Raises:
        PlanError: The run has adapters, or something that layerwise updates cannot do.
    """
    require_usable(facts, "memory='galore'", layerwise=config.layerwise)

    def flops(shape: tuple[int, int]) -> float:
        refresh = refresh_flops(shape, config.rank, exact=config.svd == "exact")
        return 4.0 * shape[0] * shape[1] * min(config.rank, *shape) + refresh / config.update_gap

    return low_rank_cost(
        facts,
        rank=config.rank,
        projection=config.projection,
        target_modules=config.target_modules,
        stores_basis=True,
        layerwise=config.layerwise,
        step_flops=flops,
    )


SPEC = MethodSpec(
    name="galore",
    kind="memory",
    slot="update",
    summary="AdamW on each matrix gradient's leading singular directions, which shrinks Adam's state.",
    config=GaLoreConfig,
    build=GaLore,
    cost=cost,
    paper=Paper(
        title="GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", year=2024, arxiv="2403.03507"
    ),
    traits=Traits(deterministic=False, owns_optimizer=True, peft=False, quantized=False, streaming=True),
    tiny={"rank": 4, "update_gap": 2, "scale": 1.0},
)
