"""staff: Score with a small model, verify a few rows of every score band on the large one, and cover the bands.

Idea
    A speculative coreset: the proxy scores all rows, the model to be trained looks at a few.

        S_s[n] = length of the gradient of row n's loss under the proxy, in one LoRA factor of the last layer
        bins of equal width of S_s; of each bin b up to ``verify_rows`` random rows are scored under the model as well
        V[b] = sum of S_t over them / sum of S_s over them, within 0.1 to 10

    Bins are served from the smallest to the largest, L rows of the size being left:

        paper  min(rows in b, floor(L * V[b] / bins left))
        repo   scores of both models scaled to 0..1 and the hardest 10 % set aside first; bins of up to
               ``verify_rows`` rows are not verified; min(rows in b, floor(L * V[b] / sum of V over bins left))

    What rounding and small V leave over is drawn at random.

Cost      N pool rows, K bins, T mean tokens, F_s and F forward FLOPs of proxy and model
    flops  N*F_s*(1 + last layer and head) + ``verify_rows``*K*F*(1 + last layer and head)
    disk   9 bytes a row and model

Use when
    A small model of the same family and tokenizer was tuned on the pool, and the large one is too
    expensive to score the pool with.

Avoid when
    Widths of the two models differ so much that every V sits at a bound (the notes tell); use ``rule="repo"``.

Differs
    The proxy is used as given: tune it on the pool first, as the paper does. The graph of the score
    begins at the value projection of the last layer, and the random first factor of the LoRA is
    drawn three times. The official script scores all rows with the large model too. Without a proxy
    V is 1 and the method is coverage by score. Draws depend on content and seed, not on row order.

Paper
    Speculative Coreset Selection for Task-Specific Fine-tuning (2024), arXiv:2410.01296
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
from hf_eff.engines.gradient_trace import with_hashes
from hf_eff.engines.pool_size import SizedConfig
from hf_eff.engines.value_gradients import ValueFactor, value_gradient_norms
from hf_eff.errors import DataError
from hf_eff.numerics.verified_bins import RULES, equal_width_bins, verification_ratios, verified_shares

# N rows with a score, in an order of their content; K bins


@dataclass(frozen=True, kw_only=True)
class StaffConfig(SizedConfig):
    """Options of ``selection="staff"``."""

    rule: str = knob("paper", "Whose allocation: see the method's head.", choices=RULES, paper="paper")
    in_bin: str = knob("random", "Rows of a bin: random ones, or the highest scores.", choices=("random", "top"))
    bins: int = knob(50, "Bins of equal width of the proxy's score.", low=1, paper="50")
    verify_rows: int = knob(10, "Rows of each bin scored by the model as well.", low=1, unit="rows", paper="10")
    discard_hardest: float | None = knob(
        None, "Share of the highest scores set aside; None: 0, or 0.1 by rule='repo'.", low=0.0, high=1.0
    )
    lora_r: int = knob(8, "Rank of the factor whose gradient is the score.", low=1)
    lora_alpha: int = knob(16, "Scale of the factor: alpha / r.", low=1, paper="16")
    draws: int = knob(3, "Random first factors to average over.", low=1, paper="1")

    def factor(self, seed: int) -> ValueFactor:
        """Whose gradient is the score."""
        return ValueFactor(self.lora_r, self.lora_alpha, self.draws, seed)


class Staff:
    """Covers bands of the proxy's score, weighed by what the model says of a few rows of each."""

    def __init__(self, config: StaffConfig) -> None:
        self.config = config

    def select(self, context: SelectionContext) -> Picks:
        """Choose rows of ``context.pool``, bin by bin.

        Raises:
            BudgetExceededError: The next batch would pass a limit; it was not computed.
            DataError: No row has a finite gradient under the proxy, or none of the verified under the model.
            PlanError: The last layer has no value projection of a known name.
        """
        pool = with_hashes(context.pool)
        limit = self.config.limit(pool)  # refuses an impossible size before anything is computed
        factor = self.config.factor(context.seed)
        scores = value_gradient_norms(context.by_proxy(), pool, factor, name="proxy", description="Proxy gradients")
        rows = np.flatnonzero(np.isfinite(scores))
        if not len(rows):
            raise DataError("no row of the pool has a finite gradient; check the model's weights and dtype.")
        rows = rows[np.argsort(np.asarray(pool.row_hash)[rows], kind="stable")]
        bins = self._bins(scores[rows])
        verified = self._drawn(bins, context.generator) if context.proxy else np.zeros(0, dtype=np.int64)
        ratios = np.ones(self.config.bins)
        if len(verified):
            target = self._target_scores(context, pool, rows[verified], factor)
            ratios = self._ratios(scores[rows], target, verified, bins)
        order, shares = self._order(scores[rows], bins, ratios, self.config.units(pool)[rows], limit, context.generator)
        positions = self.config.take(rows[order], pool)
        return Picks(
            positions=positions,
            scores=scores,
            reasons=[f"gradient {scores[row]:.3g}" for row in positions],
            notes=self._about(bins, ratios, shares, len(verified)),
        )

    def _bins(self, scores: np.ndarray) -> np.ndarray:
        """[N] bin of each row, -1 for the hardest, which are set aside."""
        discard = self.config.discard_hardest
        share = discard if discard is not None else 0.1 * (self.config.rule == "repo")
        kept = np.argsort(scores, kind="stable")[: len(scores) - int(share * len(scores) + 1e-9)]
        bins = np.full(len(scores), -1, dtype=np.int64)
        bins[kept] = equal_width_bins(scores[kept], self.config.bins)
        return bins

    def _drawn(self, bins: np.ndarray, generator: torch.Generator) -> np.ndarray:
        """Rows to verify: of each bin a random few; by the repo's rule none of a bin that small."""
        shuffled = torch.randperm(len(bins), generator=generator).numpy()
        drawn = [shuffled[bins[shuffled] == number] for number in range(self.config.bins)]
        least = self.config.verify_rows if self.config.rule == "repo" else 0
        return np.concatenate(
            [members[: self.config.verify_rows] for members in drawn if len(members) > least] or [[]]
        ).astype(np.int64)

    def _target_scores(
        self, context: SelectionContext, pool: Pool, verified: np.ndarray, factor: ValueFactor
    ) -> np.ndarray:
        """Scores of some rows under the model to be trained."""
        few = np.zeros_like(pool.loss_lengths)
        few[verified] = pool.loss_lengths[verified]
        looked = replace(pool, loss_lengths=few)
        target = value_gradient_norms(context, looked, factor, name="target", description="Verification")[verified]
        if not np.isfinite(target).any():
            raise DataError("the model gives no finite gradient for any verified row; check its weights and dtype.")
        return target

    def _ratios(self, scores: np.ndarray, target: np.ndarray, verified: np.ndarray, bins: np.ndarray) -> np.ndarray:
        """[K] V, of lengths as they are or, by the repo's rule, scaled to 0..1."""
        if self.config.rule == "repo":
            scores, target = _scaled(scores), _scaled(target)
        return verification_ratios(scores[verified], target, bins[verified], self.config.bins)

    def _order(
        self,
        scores: np.ndarray,
        bins: np.ndarray,
        ratios: np.ndarray,
        units: np.ndarray,
        limit: int,
        generator: torch.Generator,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows by the bins' shares, then the others at random, those set aside last; and the shares."""
        sizes = np.bincount(bins[bins >= 0], weights=units[bins >= 0], minlength=self.config.bins).astype(np.int64)
        shares = verified_shares(sizes, ratios, limit, self.config.rule)
        shuffled = torch.randperm(len(bins), generator=generator).numpy()
        if self.config.in_bin == "top":
            wanted = shuffled[np.argsort(-scores[shuffled], kind="stable")]
        else:
            wanted = shuffled
        chosen: list[np.ndarray] = []
        for number in np.argsort(sizes, kind="stable"):
            members = wanted[bins[wanted] == number]
            chosen.append(members[np.cumsum(units[members]) <= shares[number]])
        order = np.concatenate(chosen)
        rest = shuffled[~np.isin(shuffled, order)]
        return np.concatenate([order, rest[bins[rest] >= 0], rest[bins[rest] < 0]]), shares

    def _about(self, bins: np.ndarray, ratios: np.ndarray, shares: np.ndarray, verified: int) -> dict[str, Any]:
        """What was done, JSON-able; of the bins those with rows."""
        sizes = np.bincount(bins[bins >= 0], minlength=self.config.bins)
        filled = np.flatnonzero(sizes)
        about = {"bin": filled, "rows": sizes[filled], "share": shares[filled]}
        table = {name: column.tolist() for name, column in about.items()}
        table["ratio"] = [round(float(ratio), 4) for ratio in ratios[filled]]
        return {"rule": self.config.rule, "verified": verified, "set_aside": int((bins < 0).sum()), "bins": table}


def _scaled(values: np.ndarray) -> np.ndarray:
    """Values scaled to 0..1, NaN where they are not finite."""
    low, high = np.nanmin(values), np.nanmax(values)
    scaled: np.ndarray = (values - low) / (high - low if high > low else 1.0)
    return scaled


def cost(config: StaffConfig, facts: Facts) -> Cost:
    """A pass of the proxy over the pool, and one of the model itself over the verified rows."""
    rows, length = facts.pool.num_rows or 0, round(facts.pool.mean_tokens)
    verified, factor = min(rows, config.verify_rows * config.bins), config.factor(0)
    flops = factor.flops(facts.model, BatchShape(rows, length))
    flops += factor.flops(facts.trained or facts.model, BatchShape(verified, length))
    return Cost(flops=flops, tokens=float((rows + verified) * length), disk_bytes=18.0 * rows)


SPEC = MethodSpec(
    name="staff",
    kind="selection",
    slot="pool",
    summary="Score with a small model, verify a few rows of every score band on the large one, and cover the bands.",
    config=StaffConfig,
    build=Staff,
    cost=cost,
    paper=Paper(
        title="Speculative Coreset Selection for Task-Specific Fine-tuning",
        year=2024,
        arxiv="2410.01296",
    ),
    traits=Traits(deterministic=False, needs_model=True, uses_proxy=True),
    tiny={"fraction": 0.5, "bins": 4, "verify_rows": 2, "lora_r": 2},
)
