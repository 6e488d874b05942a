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
    flops  E*(N + V)*(2*F + 6*A*T + 2*A*D), and E*(2*F + 6*A*T) for each warm-up row
    disk   E*D*(2*N + 4*V) bytes of features, 12*E*A of checkpoints
    peak   one LoRA step of ``gradient_tokens`` tokens above the loaded model

Use when
    A small target set exists that stands for the task, and the pool is mixed.

Avoid when
    E passes with gradients over the pool cost more than training on it, or nothing but the format
    of the target is known.

Differs
    Gradients of single examples are taken in batches, not one by one. Groups go by name, not by
    equal contiguous blocks. Ties are broken by content, so that the order of the rows plays no part.
    The default adapter is smaller (rank 8, not 128). Dropout of the base model stays off.

Paper
    LESS: Selecting Influential Data for Targeted Instruction Tuning (2024), arXiv:2402.04333
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.memory import BatchShape
from hf_eff.contracts.selection import Picks, Pool, SelectionContext
from hf_eff.contracts.spec import MethodSpec, Paper, Traits, knob
from hf_eff.engines.adapter import LoraShape
from hf_eff.engines.gradient_trace import GradientTrace, TraceSettings, trace_gradients, with_hashes
from hf_eff.engines.influence import Influence
from hf_eff.engines.pool_size import SizedConfig
from hf_eff.engines.warmup import WarmupSettings
from hf_eff.errors import DataError
from hf_eff.numerics.adam_direction import ADAM_VARIANTS, AdamScaling
from hf_eff.numerics.example_loss import REDUCTIONS, Reduction
from hf_eff.numerics.flops import forward_flops
from hf_eff.numerics.ranking import rank

# N pool rows, V target rows, E checkpoints, A adapter parameters, D numbers of a feature

_SMALL = 1e9
"""Parameters up to which 4,096 dims are the default."""
_VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {"adam_variant": "paper", "include_momentum": True, "val_agg": "cos_of_mean"},
    "official": {"adam_variant": "official", "include_momentum": True, "val_agg": "mean_cos"},
    "fixed": {"adam_variant": "damped", "include_momentum": False, "val_agg": "mean_cos"},
}


@dataclass(frozen=True, kw_only=True)
class LessConfig(SizedConfig):
    """Options of ``selection="less"``."""

    default_fraction: ClassVar[float] = 0.05

    variant: str = knob("fixed", "Whose formulas: see the method's card.", choices=tuple(_VARIANTS))
    adam_variant: str | None = knob(None, "Scaling of pool gradients; None: by variant.", choices=ADAM_VARIANTS)
    include_momentum: bool | None = knob(None, "Add Adam's running mean to each gradient; None: by variant.")
    val_agg: str | None = knob(
        None, "Average cosines, or target gradients; None: by variant.", choices=("mean_cos", "cos_of_mean")
    )
    group_reduce: str = knob("max", "How groups make one score.", choices=("max", "mean"), paper="max")
    group_column: str | None = knob(None, "Column of the target that names each row's group.")
    similarity: str = knob("cosine", "Compare directions, or also lengths.", choices=("cosine", "dot"), paper="cosine")
    reduction: str = knob("mean", "An example's loss per token, in all, or between.", choices=REDUCTIONS)
    dims: int | None = knob(
        None, "Width of the projection; None: 4096 up to 1e9 parameters, else 8192.", low=1, paper="8192"
    )
    proj_seed: int = knob(0, "Names the projection.", low=0)
    warmup_fraction: float = knob(0.05, "Share of the pool to warm up on; 0: none.", low=0.0, high=1.0, paper="0.05")
    warmup_epochs: int = knob(4, "Epochs of warm-up, each a checkpoint.", low=0, unit="epochs", paper="4")
    warmup_batch_size: int = knob(16, "Rows of a warm-up step.", low=1, unit="rows", paper="128")
    learning_rate: float | None = knob(2e-5, "Peak rate of the warm-up; None: the run's.", low=0.0, paper="2e-5")
    lora_r: int = knob(8, "Rank of the adapter; a model's own adapter keeps its rank.", low=1, paper="128")
    lora_alpha: int = knob(32, "Scale of the adapter: alpha / r.", low=1, paper="512")
    lora_dropout: float = knob(0.1, "Dropout of the adapter, in the warm-up only.", low=0.0, high=0.99, paper="0.1")
    target_modules: tuple[str, ...] | None = knob(
        None, "Modules to adapt; None: attention projections.", paper="q, k, v, o"
    )
    store_dtype: str = knob("float16", "Type of stored features.", choices=("float16", "float32"), paper="float16")
    dtype: str = knob(
        "auto", "Type of the forward: that of the weights, or autocast.", choices=("auto", "bfloat16"), paper="bfloat16"
    )
    gradient_tokens: int = knob(
        2048,
        "Tokens, padding included, of a batch with gradients; never above the scoring batch.",
        low=1,
        unit="tokens",
    )

    @property
    def resolved(self) -> dict[str, Any]:
        """The options that the variant decides unless they are given."""
        given = {name: getattr(self, name) for name in _VARIANTS[self.variant]}
        return {**_VARIANTS[self.variant], **{name: value for name, value in given.items() if value is not None}}

    @property
    def num_checkpoints(self) -> int:
        """E; without a warm-up the adapter as it is makes one."""
        return self.warmup_epochs if self.warmup_epochs and self.warmup_fraction else 1

    def width(self, model_params: int) -> int:
        """Dims asked for, for a model of that size."""
        return self.dims or (4096 if model_params <= _SMALL else 8192)


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
        target, pool = with_hashes(_target(context)), with_hashes(context.pool)
        self.config.limit(pool)  # refuses an impossible size before anything is computed
        groups = self._groups(target)
        trace = trace_gradients(replace(context, pool=pool), target, self._settings(context))
        return self._picks(pool, trace, groups)

    def _groups(self, target: Pool) -> Sequence[str]:
        """Group of each target row."""
        if self.config.group_column is not None and target.groups is None:
            raise DataError(
                f"group_column={self.config.group_column!r} was given and the target has no groups; "
                "in a trainer, pass eval_dataset as a dict with one set a group."
            )
        return target.groups or ["the target"] * len(target)

    def _settings(self, context: SelectionContext) -> TraceSettings:
        config = self.config
        warmup = WarmupSettings(
            epochs=config.warmup_epochs,
            batch_size=config.warmup_batch_size,
            learning_rate=context.learning_rate if config.learning_rate is None else config.learning_rate,
            dropout=config.lora_dropout,
            seed=context.seed,
            compute_dtype=torch.bfloat16 if config.dtype == "bfloat16" else None,
        )
        return TraceSettings(
            shape=LoraShape(config.lora_r, config.lora_alpha, config.target_modules),
            warmup=warmup,
            warmup_fraction=config.warmup_fraction,
            scaling=AdamScaling(config.resolved["adam_variant"], config.resolved["include_momentum"]),
            dims=config.width(sum(parameter.numel() for parameter in context.model.parameters())),
            proj_seed=config.proj_seed,
            reduction=cast("Reduction", config.reduction),
            store_dtype=config.store_dtype,
            gradient_tokens=config.gradient_tokens,
        )

    def _picks(self, pool: Pool, trace: GradientTrace, members: Sequence[str]) -> Picks:
        """Compare, rank and take. ``members`` names the group of each target row."""
        config = self.config
        influence = Influence(config.similarity, config.resolved["val_agg"], config.group_reduce)
        queries = [influence.queries(target, members) for target in trace.targets]
        groups = sorted(set.intersection(*map(set, queries)))
        stacked = [torch.stack([query[group] for group in groups]) for query in queries]
        scores, closest = influence.scores(trace.pools, stacked, trace.weights)
        order = rank(scores, descending=True, ties=pool.row_hash)
        if not len(order):
            raise DataError("no row of the pool has a finite gradient; check the model's weights and dtype.")
        positions = config.take(order, pool)
        word = "cos" if config.similarity == "cosine" else "influence"
        notes = {"variant": config.variant, **config.resolved, "checkpoint_weights": list(trace.weights)}
        return Picks(
            positions=positions,
            scores=scores,
            reasons=[f"{word} {scores[row]:.3g} to {groups[closest[row]]}" for row in positions],
            notes={**notes, **trace.facts, "groups": groups, "num_scored": len(order)},
        )


def _target(context: SelectionContext) -> Pool:
    if context.reference is None or not (context.reference.loss_lengths > 0).any():
        raise DataError(
            "selection='less' needs target rows with tokens that carry loss; pass target= (eval_dataset in a trainer)."
        )
    return context.reference


def cost(config: LessConfig, facts: Facts) -> Cost:
    """Closed form of the module's head, with the adapter's size estimated from the widths of attention."""
    model, pool, passes = facts.model, facts.pool, config.num_checkpoints
    rows, length = pool.num_rows or 0, max(1, math.ceil(pool.mean_tokens))
    # Query and output projections are [h, W]; key and value are no larger.
    adapter = sum(4 * config.lora_r * (model.hidden_size + block.attention_width) for block in model.blocks)
    if model.is_peft and model.trainable is not None:
        adapter = model.trainable.params
    width = min(config.width(model.params), max(1, adapter))
    warms_up = rows and config.warmup_epochs and config.warmup_fraction
    warmup = passes * max(1, round(config.warmup_fraction * rows)) if warms_up else 0
    featured = passes * (rows + pool.num_reference)
    row_flops = 2 * forward_flops(model, BatchShape(1, length)) + 6.0 * adapter * length
    item = 2 if config.store_dtype == "float16" else 4
    return Cost(
        flops=(warmup + featured) * row_flops + featured * 2.0 * adapter * width,
        tokens=(warmup + featured) * float(length),
        disk_bytes=passes * (float(width) * (item * rows + 4 * pool.num_reference) + 12.0 * adapter),
    )


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
    traits=Traits(deterministic=False, needs_model=True, needs_reference_set=True),
    tiny={
        "fraction": 0.25,
        "dims": 256,
        "lora_r": 4,
        "warmup_fraction": 0.25,
        "warmup_epochs": 2,
        "warmup_batch_size": 4,
        "learning_rate": 1e-2,
    },
    requires={"peft": "peft"},
)
