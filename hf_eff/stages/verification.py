"""Checking a proxy: some of the rows it scored are scored again with the model itself.

Rows to verify are drawn evenly over ten bins of the proxy's scores. Where ranks agree (Spearman at least 0.6) the
proxy's choice stands; where they agree somewhat (0.3 to 0.6) its scores are fitted to the model's, source by source,
or bin by bin where there are no sources; where they do not, the proxy knows nothing and rows are drawn at random.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hf_eff.contracts.selection import Picks, Pool, SelectionContext
from hf_eff.engines.pool_size import SizedConfig
from hf_eff.errors import PlanError, SelectionFallbackWarning
from hf_eff.numerics.agreement import bootstrap_interval, isotonic, jaccard, spearman
from hf_eff.numerics.ranking import rank
from hf_eff.options import Chosen
from hf_eff.stages.pipeline import Run

ACCEPT, RECALIBRATE = 0.6, 0.3
"""Spearman correlations from which the proxy's ranking stands, and from which it is recalibrated."""
BINS, ROWS_PER_BIN = 10, 10


@dataclass(frozen=True)
class Verification:
    """What a check of a proxy found.

    Attributes:
        rows: [n] verified positions.
        proxy: [n] their scores by the proxy, higher is better.
        model: [n] their scores by the model.
    """

    rows: np.ndarray
    proxy: np.ndarray
    model: np.ndarray

    @property
    def correlation(self) -> float:
        """Spearman correlation of the two scorings."""
        return spearman(self.proxy, self.model)

    @property
    def verdict(self) -> str:
        """``"accept"``, ``"recalibrate"`` or ``"fall back"``."""
        if self.correlation >= ACCEPT:
            return "accept"
        return "recalibrate" if self.correlation >= RECALIBRATE else "fall back"

    def describe(self, share: float, seed: int) -> dict[str, Any]:
        """JSON-able facts: agreement in ranks, and in the best ``share`` of the verified rows."""
        top = max(1, round(share * len(self.rows)))
        best = (np.argsort(-scores, kind="stable")[:top] for scores in (self.proxy, self.model))
        interval = bootstrap_interval(
            lambda drawn: spearman(self.proxy[drawn], self.model[drawn]), len(self.rows), np.random.default_rng(seed)
        )
        return {
            "num_verified": len(self.rows),
            "spearman": self.correlation,
            "spearman_95": list(interval),
            "jaccard_at_k": jaccard(*best),
            "verdict": self.verdict,
        }


def run_verified(
    chosen: Chosen, context: SelectionContext, share: float, run: Run, fall_back: Callable[[SelectionContext], Picks]
) -> Picks:
    """Select with the proxy, and check it against the model on some rows.

    Args:
        chosen: A method that can score with a proxy.
        context: With both a model and a proxy.
        share: Share of the scored rows to verify; at least ten a bin.
        run: Runs the method.
        fall_back: Draws rows at random instead.

    Raises:
        PlanError: The method does not score, scores without a proxy, or has no size to keep to.
    """
    config = chosen.config
    if context.proxy is None or not chosen.spec.traits.uses_proxy or not isinstance(config, SizedConfig):
        raise PlanError(
            f"verify={share} compares a proxy with the model: give proxy_model= and a method that scores with one, "
            f"which {chosen.spec.address} does not."
        )
    picks = run(chosen, context)
    if picks.scores is None:
        raise PlanError(f"{chosen.spec.address} gives no scores to verify; leave verify out.")
    ours = np.asarray(picks.scores, dtype=np.float64) * (1.0 if picks.higher_is_better else -1.0)
    checked = _verify(chosen, config, context, ours, share, run)
    kept = len(picks.positions) / max(1, int(np.isfinite(ours).sum()))
    notes = {"verification": checked.describe(kept, context.seed)}
    if checked.verdict == "accept":
        return replace(picks, notes={**picks.notes, **notes})
    if checked.verdict == "fall back":
        warnings.warn(
            SelectionFallbackWarning(
                f"the proxy's scores and the model's correlate by {checked.correlation:.2f} only over "
                f"{len(checked.rows)} rows of {chosen.spec.address}; rows are drawn at random instead."
            ),
            stacklevel=2,
        )
        fallen = fall_back(context)
        return replace(fallen, notes={**fallen.notes, **notes})
    scores = _recalibrated(checked, ours, context.pool)
    order = rank(scores, descending=True, ties=context.pool.row_hash)
    return Picks(
        positions=config.take(order, context.pool),
        scores=scores,
        reasons="proxy score fitted to the model's",
        notes={**picks.notes, **notes},
    )


def _verify(
    chosen: Chosen, config: SizedConfig, context: SelectionContext, ours: np.ndarray, share: float, run: Run
) -> Verification:
    """Score a sample again with the model, all of it kept so that nothing but scores depends on the size."""
    rows = _sample(ours, share, np.random.default_rng(context.seed))
    everything = dataclasses.replace(config, fraction=1.0, num_examples=None, num_tokens=None)
    folder = None if context.store_dir is None else context.store_dir / "verification"
    inner = replace(context, pool=context.pool.take(rows), proxy=None, prior=None, store_dir=folder)
    picks = run(Chosen(chosen.spec, everything), inner)
    theirs = np.asarray(picks.scores, dtype=np.float64) * (1.0 if picks.higher_is_better else -1.0)
    finite = np.isfinite(theirs)
    return Verification(rows[finite], ours[rows][finite], theirs[finite])


def _sample(scores: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    """Positions drawn evenly over bins of equal numbers of rows."""
    ordered = np.argsort(scores, kind="stable")[: int(np.isfinite(scores).sum())]
    per_bin = max(ROWS_PER_BIN, round(share * len(ordered) / BINS))
    drawn = [generator.permutation(part)[:per_bin] for part in np.array_split(ordered, BINS)]
    return np.sort(np.concatenate(drawn))


def _recalibrated(checked: Verification, scores: np.ndarray, pool: Pool) -> np.ndarray:
    """The proxy's scores on the model's scale, stratum by stratum."""
    strata = _strata(checked, scores, pool)
    fitted = np.full(len(scores), np.nan)
    finite = np.isfinite(scores)
    for stratum in np.unique(strata):
        members, verified = finite & (strata == stratum), strata[checked.rows] == stratum
        x, y = checked.proxy[verified], checked.model[verified]
        if not len(x):  # nothing is known of it but what holds overall
            x, y = checked.proxy, checked.model
        fitted[members] = isotonic(x, y, scores[members])
    return fitted


def _strata(checked: Verification, scores: np.ndarray, pool: Pool) -> np.ndarray:
    """[N] Sources where each has enough verified rows, else bins of the proxy's scores."""
    if pool.sources is not None:
        names, codes = np.unique(np.asarray(pool.sources), return_inverse=True)
        if (np.bincount(codes[checked.rows], minlength=len(names)) >= ROWS_PER_BIN).all():
            return codes
    edges = np.nanquantile(scores, np.linspace(0, 1, BINS + 1)[1:-1])
    return np.searchsorted(edges, np.where(np.isfinite(scores), scores, -np.inf), side="right")
