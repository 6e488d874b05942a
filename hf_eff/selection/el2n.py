"""el2n: Keep the rows whose predicted tokens are farthest from the right ones.

Idea
    The length of the error vector of each token, the softmax minus the one-hot of its label, averaged
    over the tokens A[n] that carry loss, and over E early checkpoints of a short training:

        score[n] = mean over checkpoints, mean over t in A[n] of ||p_t - e_{y_t}||_2,    in [0, sqrt 2]

    The highest scores are kept, after the share ``skip_hardest`` at the very top, where noise is.
    ``coverage="ccs"`` then shares the size evenly over 50 bins of equal width of the score, by
    water-filling and at random inside a bin (arXiv:2210.15809), instead of taking the highest.

Cost      N pool rows, T mean tokens, F forward FLOPs of a row, A adapter parameters, E checkpoints
    flops  E*N*F, and for each warm-up row 2*F + 6*A*T
    disk   9*E*N bytes and the warm-up's checkpoints
    peak   one LoRA step of ``gradient_tokens`` tokens above the loaded model

Use when
    The pool is clean and redundant: easy rows are dropped for one forward each.

Avoid when
    The pool is noisy, or little of it is kept: the hardest rows are then the wrong ones. Use
    ``skip_hardest`` or ``coverage="ccs"``.

Differs
    The paper averages 10 or more runs of a classifier, one error vector a row, 10 to 20 epochs into
    training; here tokens are averaged, and the checkpoints are those of one short training of a
    LoRA on a few rows. ``checkpoints=0`` scores the model as it is. Ties are broken by content.

Paper
    Deep Learning on a Data Diet: Finding Important Examples Early in Training (2021), arXiv:2107.07075
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.memory import BatchShape
from hf_eff.contracts.selection import Picks, Pool, SelectionContext
from hf_eff.contracts.spec import MethodSpec, Paper, Traits, knob
from hf_eff.engines.adapter import LoraShape
from hf_eff.engines.gradient_trace import with_hashes
from hf_eff.engines.pool_size import SizedConfig
from hf_eff.engines.signal_pass import SignalTrace, pool_signals, trace_signal
from hf_eff.engines.warmup import WarmupSettings
from hf_eff.errors import DataError
from hf_eff.numerics.flops import forward_flops
from hf_eff.numerics.output_signals import TOKEN_REDUCTIONS
from hf_eff.numerics.ranking import rank
from hf_eff.numerics.verified_bins import coverage_order, equal_width_bins


@dataclass(frozen=True, kw_only=True)
class El2nConfig(SizedConfig):
    """Options of ``selection="el2n"``."""

    reduction: str = knob("mean", "How the tokens of a row make one score.", choices=TOKEN_REDUCTIONS)
    skip_hardest: float = knob(0.0, "Share of the rows dropped from the top of the scores.", low=0.0, high=1.0)
    coverage: str = knob("none", "Highest scores, or an even share of 50 bins.", choices=("none", "ccs"))
    bins: int = knob(50, "Bins of equal width, with coverage='ccs'.", low=1, paper="50")
    checkpoints: int = knob(
        1, "Checkpoints of the warm-up to average; 0 scores the model as it is.", low=0, paper="10 runs"
    )
    warmup_fraction: float = knob(0.05, "Share of the pool to warm up on.", low=0.0, high=1.0)
    warmup_epochs: int = knob(1, "Epochs of warm-up.", low=1, unit="epochs")
    warmup_batch_size: int = knob(16, "Rows of a warm-up step.", low=1, unit="rows")
    learning_rate: float | None = knob(None, "Peak rate of the warm-up; None: the run's.", low=0.0)
    lora_r: int = knob(8, "Rank of the adapter; a model's own adapter keeps its rank.", low=1)
    lora_alpha: int = knob(32, "Scale of the adapter: alpha / r.", low=1)
    target_modules: tuple[str, ...] | None = knob(None, "Modules to adapt; None: attention projections.")
    gradient_tokens: int = knob(2048, "Tokens, padding included, of a warm-up batch.", low=1, unit="tokens")

    def trace(self, rate: float, seed: int) -> SignalTrace:
        """The warm-up and where it is looked at."""
        return SignalTrace(
            shape=LoraShape(self.lora_r, self.lora_alpha, self.target_modules),
            warmup=WarmupSettings(
                epochs=self.warmup_epochs,
                batch_size=self.warmup_batch_size,
                learning_rate=rate if self.learning_rate is None else self.learning_rate,
                seed=seed,
            ),
            train_fraction=self.warmup_fraction,
            checkpoints=self.checkpoints,
            gradient_tokens=self.gradient_tokens,
            signal="el2n",
            reduction=self.reduction,
        )


class El2n:
    """Ranks by the length of the error vector."""

    def __init__(self, config: El2nConfig) -> None:
        self.config = config

    def select(self, context: SelectionContext) -> Picks:
        """Choose rows of ``context.pool``, hardest first, or evenly over the scores.

        Raises:
            BudgetExceededError: The next batch would pass a limit; it was not computed.
            DataError: No row has a finite score, or ``skip_hardest`` leaves fewer rows than asked for.
            ManifestError: ``context.store_dir`` holds scores of other rows, options or another model.
        """
        context = context.by_proxy()
        pool = with_hashes(context.pool)
        limit = self.config.limit(pool)  # refuses an impossible size before anything is computed
        self._check_window(pool, limit)
        scores, facts = self._scores(replace(context, pool=pool))
        ranked = rank(scores, descending=True, ties=pool.row_hash)
        skipped = int(self.config.skip_hardest * len(ranked) + 1e-9)
        window = ranked[skipped:]
        if self.config.coverage == "ccs":
            bins = equal_width_bins(scores[window], self.config.bins)
            shuffled = torch.randperm(len(window), generator=context.generator).numpy()
            window = window[coverage_order(bins, shuffled)]
        positions = self.config.take(window, pool)
        return Picks(
            positions=positions,
            scores=scores,
            reasons=[f"EL2N {scores[row]:.3g}" for row in positions],
            notes={"coverage": self.config.coverage, "num_scored": len(ranked), "skipped": skipped, **facts},
        )

    def _check_window(self, pool: Pool, limit: int) -> None:
        valid = int(np.count_nonzero(pool.loss_lengths > 0))
        left = valid - int(self.config.skip_hardest * valid + 1e-9)
        if not left or (not self.config.num_tokens and left < limit):
            raise DataError(
                f"skip_hardest={self.config.skip_hardest} leaves {left} of {valid} rows and {limit} are to be kept; "
                "skip fewer or keep fewer."
            )

    def _scores(self, context: SelectionContext) -> tuple[np.ndarray, dict[str, Any]]:
        """[N] scores, NaN where a row has none, and what was done for them."""
        config = self.config
        if not config.checkpoints or not config.warmup_fraction:
            found = pool_signals(context, context.pool, ["el2n"], reduction=config.reduction, description="EL2N")
            return found["el2n"], {"checkpoint_steps": []}
        values, facts = trace_signal(context, config.trace(context.learning_rate, context.seed))
        return values.astype(np.float64).mean(axis=1), facts


def cost(config: El2nConfig, facts: Facts) -> Cost:
    """Warm-up and one forward of the pool a checkpoint; padding inside batches is neglected."""
    if config.checkpoints and config.warmup_fraction:
        flops, tokens, disk = config.trace(0.0, 0).cost(facts)
        return Cost(flops=flops, tokens=tokens, disk_bytes=disk)
    rows = facts.pool.num_rows or 0
    return Cost(
        flops=forward_flops(facts.model, BatchShape(rows, round(facts.pool.mean_tokens))),
        tokens=rows * facts.pool.mean_tokens,
    )


SPEC = MethodSpec(
    name="el2n",
    kind="selection",
    slot="pool",
    summary="Keep the rows whose predicted tokens are farthest from the right ones.",
    config=El2nConfig,
    build=El2n,
    cost=cost,
    paper=Paper(
        title="Deep Learning on a Data Diet: Finding Important Examples Early in Training",
        year=2021,
        arxiv="2107.07075",
    ),
    traits=Traits(deterministic=False, needs_model=True, uses_proxy=True),
    tiny={
        "fraction": 0.5,
        "checkpoints": 2,
        "warmup_fraction": 0.5,
        "warmup_batch_size": 4,
        "lora_r": 2,
        "learning_rate": 1e-2,
    },
    requires={"peft": "peft"},
)
