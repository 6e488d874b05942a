"""rds: Let every target row, or group of them, pick the pool rows most similar to it in turn.

Idea
    RDS+: embed pool and target by a mean of the model's last hidden states whose weights grow with
    the position (1, 2, 3, ...), and compare all pairs by cosine. Each target row ranks the pool; they
    take turns, each picking its best row that is still free. A target with several groups takes
    turns by group, and a group ranks a pool row by its best cosine to any of the group's rows.

        score[n] = max over target rows v of  cos(x[n], x[v])

Cost      N pool rows, V target rows, T mean tokens, P parameters without the head, h width
    flops  2*P*T*(N + V) + 2*h*N*V    (forward without the head; similarities)
    disk   4*h*(N + V) bytes          (embeddings, to resume)
    peak   8*k*V bytes                (best k rows of each target row)

Use when
    A few to a few thousand rows stand for the task. A strong and cheap reference for gradient methods.

Avoid when
    Target rows are noisy: each one gets its share of the choice, whatever it is.

Differs
    In the authors' code a turn in which the best row is taken already is lost; here the turn goes on
    to the next free row (``variant="official"`` loses it). They embed with batches of one; here
    padding is masked, which gives the same.

Paper
    Large-Scale Data Selection for Instruction Tuning (2025), arXiv:2503.01807
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.selection import Picks, SelectionContext
from hf_eff.contracts.spec import MethodSpec, Paper, Traits, knob
from hf_eff.engines.embeddings import embedding_flops, members_of, pool_embeddings, rows_by_content, target_of
from hf_eff.engines.greedy_take import most_rows
from hf_eff.engines.pool_size import SizedConfig
from hf_eff.errors import ScoringStoppedError

_TILE = 64
"""Target rows compared at a time."""


@dataclass(frozen=True, kw_only=True)
class RdsConfig(SizedConfig):
    """Options of ``selection="rds"``."""

    variant: str = knob("fixed", "Whether a turn on a taken row goes on or is lost.", choices=("fixed", "official"))
    turns: str = knob(
        "auto",
        "Who takes turns; auto: groups where the target has several, else rows.",
        choices=("auto", "row", "group"),
    )


class Rds:
    """Round-robin retrieval by weighted-mean hidden states."""

    def __init__(self, config: RdsConfig) -> None:
        self.config = config

    def select(self, context: SelectionContext) -> Picks:
        """Embed, compare and let the target pick."""
        context = context.by_proxy()
        config, pool, target = self.config, context.pool, target_of(context, "rds")
        config.limit(pool)  # refuses an impossible size before anything is computed
        goals = pool_embeddings(context, target, pooling="weighted", description="Embeddings of the target")
        vectors = pool_embeddings(context, pool, pooling="weighted")
        usable, rows = rows_by_content(target, goals), rows_by_content(pool, vectors)
        groups = members_of(target, usable)
        turns = config.turns if config.turns != "auto" else ("group" if len(groups) > 1 else "row")
        asking = groups if turns == "group" else {f"target row {row}": np.array([i]) for i, row in enumerate(usable)}
        best, lists = _rankings(
            context, vectors[rows], [goals[usable[members]] for members in asking.values()],
            most_rows(config, pool, rows),
        )  # fmt: skip
        places, askers = take_turns(lists, len(lists[0]), lose_turns=config.variant == "official")
        scores = np.full(len(pool), np.nan)
        scores[rows] = best
        positions, names = config.take(rows[places], pool), list(asking)
        return Picks(
            positions=positions,
            scores=scores,
            reasons=[
                f"cos {scores[row]:.3g}, picked for {names[asker]}"
                for row, asker in zip(positions, askers, strict=False)
            ],
            notes={"variant": config.variant, "turns": turns, "num_scored": len(rows), "num_target": len(usable)},
        )


def _rankings(
    context: SelectionContext, vectors: np.ndarray, asking: list[np.ndarray], longest: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Best cosine [M] of each pool row to any target row, and the best rows for each asker, best first."""
    best, lists = np.full(len(vectors), -np.inf), []
    for goals in context.progress(asking, total=len(asking), description="Similarities"):
        if context.stop_requested():
            raise ScoringStoppedError("Similarities: stopped on request before all target rows were compared.")
        found = np.full(len(vectors), -np.inf, dtype=np.float32)
        for start in range(0, len(goals), _TILE):
            part = goals[start : start + _TILE]
            context.spend(2.0 * vectors.size * len(part), 0.0)
            found = np.maximum(found, (vectors @ part.T).max(axis=1))
        lists.append(np.argsort(-found, kind="stable")[:longest])
        best = np.maximum(best, found)
    return best, lists


def take_turns(lists: list[np.ndarray], count: int, *, lose_turns: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows picked in turn, and who picked each.

    Args:
        lists: Rankings of the askers, each of at least ``count`` rows.
        count: Rows to pick.
        lose_turns: An asker whose next row is taken waits for its next turn.
    """
    picked: dict[int, int] = {}
    queues = [iter(ranking.tolist()) for ranking in lists]
    while len(picked) < count:
        for asker, queue in enumerate(queues):
            row = next(queue, None) if lose_turns else next((row for row in queue if row not in picked), None)
            if row is not None and len(picked) < count:
                picked.setdefault(row, asker)
    return np.fromiter(picked, dtype=np.int64), np.fromiter(picked.values(), dtype=np.int64)


def cost(config: RdsConfig, facts: Facts) -> Cost:  # noqa: ARG001 - the signature every method shares
    """Closed form of the module's head; padding inside batches of similar length is neglected."""
    pool, width = facts.pool, facts.model.hidden_size
    sides = ((pool.num_rows or 0, pool.mean_tokens), (pool.num_reference, pool.mean_reference_tokens))
    forward = sum(embedding_flops(facts.model, rows, tokens) for rows, tokens in sides)
    return Cost(
        flops=forward + 2.0 * width * sides[0][0] * sides[1][0],
        tokens=sum(rows * tokens for rows, tokens in sides),
        disk_bytes=sum(rows for rows, _ in sides) * (4.0 * width + 5),
    )


SPEC = MethodSpec(
    name="rds",
    kind="selection",
    slot="pool",
    summary="Let every target row, or group of them, pick the pool rows most similar to it in turn.",
    config=RdsConfig,
    build=Rds,
    cost=cost,
    paper=Paper(title="Large-Scale Data Selection for Instruction Tuning", year=2025, arxiv="2503.01807"),
    traits=Traits(needs_model=True, uses_proxy=True, needs_reference_set=True),
    tiny={"fraction": 0.25},
)
