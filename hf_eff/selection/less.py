"""less: Keep the rows whose gradient points where the target's gradient points.

Idea
    Warm up a LoRA on a few rows. At each of E checkpoints take the step that Adam would take on each
    row, and the gradient of each target row; project both to D dims and compare their directions:

        score[n] = max over groups s of the mean over r in s of sum_e w[e] cos(step[e, n], g[e, r])

    with w[e] the learning rate of checkpoint e, as a share of their sum. ``variant`` says which
    formulas run:

        paper     Adam's step, bias-corrected, epsilon outside the root (arXiv:2402.04333, section 3.1);
                  target gradients are averaged within a group, then compared
        official  as in the authors' code: no bias correction, epsilon inside the root; cosines with
                  each target row are averaged within a group
        fixed     both put the row's own gradient into its scale, which after a short warm-up leaves
                  little more than signs, and add the running mean, one direction shared by all rows.
                  Here the scale is Adam's second moment of the warm-up alone, blended with its mean
                  over the adapter as far as its t steps fall short of 1 / (1 - beta2), and without
                  the running mean; cosines are averaged within a group

Cost      N pool rows, V target rows, T mean tokens, F forward FLOPs of a row, A adapter parameters
    flops  E*(N + V)*(2*F + 6*A*T + p*A), and E*(2*F + 6*A*T) for each warm-up row;
           p: 2 with the sparse projection, 2*D with the dense one
    disk   E*D*(2*N + 4*V) bytes of features, 12*E*A of checkpoints
    peak   one LoRA step of ``gradient_tokens`` tokens above the loaded model

Use when
    A small target set exists that stands for the task, and the pool is mixed.

Avoid when
    E passes with gradients over the pool cost more than training on it, or nothing but the format
    of the target is known.

Differs
    Gradients of single examples are taken in batches, not one by one. Groups go by name, not by
    equal contiguous blocks. The projection has two random signs a row instead of D, at the same error of
    cosines. Ties are broken by content, so that the order of the rows plays no part.
    The default adapter is smaller (rank 8, not 128). Dropout of the base model stays off.

Paper
    LESS: Selecting Influential Data for Targeted Instruction Tuning (2024), arXiv:2402.04333
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.selection import Picks, SelectionContext
from hf_eff.contracts.spec import MethodSpec, Paper, Traits, knob
from hf_eff.engines.gradient_method import TINY_TRACE, GroupedGradientConfig, picks_by_group, trace_cost, trace_pool

# N pool rows, V target rows, E checkpoints, A adapter parameters, D numbers of a feature


@dataclass(frozen=True, kw_only=True)
class LessConfig(GroupedGradientConfig):
    """Options of ``selection="less"``."""

    store_dtype: str = knob("float16", "Type of stored features.", choices=("float16", "float32"), paper="float16")


class Less:
    """Ranks the pool by how well each row's gradient agrees with those of the target."""

    def __init__(self, config: LessConfig) -> None:
        self.config = config

    def select(self, context: SelectionContext) -> Picks:
        """Choose rows of ``context.pool``, best first.

        Raises:
            BudgetExceededError: The next batch would pass a limit; it was not computed.
            DataError: There is no target or no valid row, or gradients are not finite.
            ManifestError: ``context.store_dir`` holds features of other rows, options or another model.
        """
        traced = trace_pool(context, self.config, "less", store_dtype=self.config.store_dtype)
        return picks_by_group(traced, self.config)


def cost(config: LessConfig, facts: Facts) -> Cost:
    """Closed form of the module's head."""
    return trace_cost(config, facts, bits=16 if config.store_dtype == "float16" else 32)


SPEC = MethodSpec(
    name="less",
    kind="selection",
    slot="pool",
    summary="Keep the rows whose gradient points where the target's gradient points.",
    config=LessConfig,
    build=Less,
    cost=cost,
    paper=Paper(
        title="LESS: Selecting Influential Data for Targeted Instruction Tuning", year=2024, arxiv="2402.04333"
    ),
    traits=Traits(deterministic=False, needs_model=True, uses_proxy=True, needs_reference_set=True),
    tiny={"fraction": 0.25, **TINY_TRACE},
    requires={"peft": "peft"},
)
