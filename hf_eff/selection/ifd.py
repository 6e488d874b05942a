"""ifd: Keep the rows whose prompt helps least, though it helps, in predicting the answer.

Idea
    The mean loss of the answer's tokens given the prompt, L_c, against that of the same tokens alone,
    L_d. Every turn of a chat has its own score, with the turns before it as prompt; a row has their mean:

        ppl_ratio   exp(L_c - L_d)    Superfiltering, the default
        loss_ratio  L_c / L_d         Cherry

    A score of 1 or more says that the prompt does not help: prompt and answer do not belong together.
    Such rows are dropped; of the others the highest scores are kept.

Cost      N rows, T mean tokens of a row and A of its answers, F_s forward FLOPs of the scorer per token
    flops  N*F_s*(T + A)      (predicted with A = T/2: the plan does not know where answers begin)
    disk   0

Use when
    Instructions with answers, no target set, and a small model of the same tokenizer to score with.

Avoid when
    Answers are a few tokens long (scores are then high and noisy), or rows have no prompt.

Differs
    Both passes score the same tokens, from the first token of the answer on: alone, the answer stands
    behind the beginning-of-text token (end-of-text where there is none). The official code scores one
    token less alone, and calls answers of one token 0. Answers are the labels of the tokenised row, so
    that no second tokenisation can shift them. Chats are scored turn by turn.

Paper
    Superfiltering: Weak-to-Strong Data Filtering for Fast Instruction-Tuning (2024), arXiv:2402.00530
    From Quantity to Quality: Boosting LLM Performance with Self-Guided Data Selection for Instruction
    Tuning (Cherry, 2023), arXiv:2308.12032
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.memory import BatchShape
from hf_eff.contracts.selection import Picks, Pool, SelectionContext
from hf_eff.contracts.spec import MethodSpec, Paper, Traits, knob
from hf_eff.engines.gradient_trace import with_hashes
from hf_eff.engines.pool_pass import scored_batches
from hf_eff.engines.pool_size import SizedConfig
from hf_eff.engines.scoring import scoring_mode
from hf_eff.engines.signal_pass import output_logits
from hf_eff.errors import DataError
from hf_eff.numerics.example_loss import IGNORE_INDEX
from hf_eff.numerics.flops import forward_flops
from hf_eff.numerics.output_signals import label_signals
from hf_eff.numerics.ranking import rank

# N rows, M turns of all rows, B rows of a batch, T positions

_BUCKETS = (1, 5, 17, 65, 257, 1025)
"""Fewest answer tokens of each bucket of the report."""
_MAX_NATS = 700.0


@dataclass(frozen=True, kw_only=True)
class IfdConfig(SizedConfig):
    """Options of ``selection="ifd"``."""

    default_fraction: ClassVar[float] = 0.05

    variant: str = knob(
        "ppl_ratio", "Ratio of perplexities, or of losses.", choices=("ppl_ratio", "loss_ratio"), paper="either"
    )
    unhelpful: str = knob(
        "drop", "Rows whose prompt does not help: never kept, or last.", choices=("drop", "last"), paper="drop"
    )


@dataclass(frozen=True)
class _Turns:
    """Answers of a pool: runs of labels with something before them.

    Attributes:
        rows: [M] row of each turn, ascending.
        spans: [M, 2] where it starts and ends in the row.
    """

    rows: np.ndarray
    spans: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """[M] tokens."""
        return self.spans[:, 1] - self.spans[:, 0]

    def alone(self) -> _Turns:
        """The same answers, each in a row of its own behind one token."""
        return _Turns(np.arange(len(self.rows)), np.stack([np.ones_like(self.lengths), self.lengths + 1], axis=1))


class Ifd:
    """Ranks by how little, short of not at all, the prompt helps."""

    def __init__(self, config: IfdConfig) -> None:
        self.config = config

    def select(self, context: SelectionContext) -> Picks:
        """Choose rows of ``context.pool``, highest score below 1 first.

        Raises:
            BudgetExceededError: The next batch would pass a limit; it was not computed.
            DataError: No row has a prompt, the tokenizer has no token to begin with, or no score is below 1.
        """
        pool = with_hashes(context.pool)
        self.config.limit(pool)  # refuses an impossible size before anything is computed
        scorer = replace(context.by_proxy(), pool=pool)
        turns = _turns(pool)
        if not len(turns.rows):
            raise DataError("no row of the pool has a prompt before its answer, which IFD compares with; mask prompts.")
        alone = _alone(pool, turns, _first_token(scorer))
        given = _answer_losses(scorer, pool, turns, "Answers given prompts")
        direct = _answer_losses(scorer, alone, turns.alone(), "Answers alone")
        scores = _row_means(_ratio(given, direct, self.config.variant), turns, len(pool))
        helped = np.where(scores < 1, scores, np.nan)
        ranked = rank(helped, descending=True, ties=pool.row_hash)
        unhelpful = rank(np.where(scores >= 1, scores, np.nan), descending=False, ties=pool.row_hash)
        if self.config.unhelpful == "last":
            ranked = np.concatenate([ranked, unhelpful])
        elif not len(ranked) and len(unhelpful):
            raise DataError(f"none of {len(unhelpful)} scored rows is below 1; check prompts, or unhelpful='last'.")
        positions = self.config.take(ranked, pool)
        return Picks(
            positions=positions,
            scores=scores,
            reasons=[f"IFD {scores[row]:.3g}" for row in positions],
            notes={
                "variant": self.config.variant,
                "scored_by": "the proxy" if context.proxy else "the model",
                "num_turns": len(turns.rows),
                "num_unhelpful": len(unhelpful),
                "by_answer_tokens": _by_length(scores, turns, positions),
            },
        )


def _turns(pool: Pool) -> _Turns:
    """Runs of loss tokens, but for those that begin a row: nothing stands before them."""
    rows, spans = [], []
    for row in np.flatnonzero(pool.loss_lengths > 0).tolist():
        labels = pool.rows[row].get("labels")
        answered = np.asarray(() if labels is None else labels) != IGNORE_INDEX
        edges = np.flatnonzero(np.diff(np.concatenate([[False], answered, [False]]).astype(np.int8))).reshape(-1, 2)
        for span in edges[edges[:, 0] > 0]:
            rows.append(row)
            spans.append(span)
    return _Turns(np.asarray(rows, dtype=np.int64), np.asarray(spans, dtype=np.int64).reshape(-1, 2))


def _first_token(context: SelectionContext) -> int:
    """The token that an answer alone stands behind."""
    config = getattr(context.model, "config", None)
    for name in ("bos_token_id", "eos_token_id"):
        for owner in (context.tokenizer, config):
            found = getattr(owner, name, None)
            found = found[0] if isinstance(found, (list, tuple)) and found else found
            if isinstance(found, int):
                return found
    raise DataError("neither tokenizer nor model has a beginning- or end-of-text token for IFD to put before answers.")


class _Rows(Sequence[Mapping[str, Any]]):
    """Answers alone, made when they are asked for."""

    def __init__(self, pool: Pool, turns: _Turns, first: int) -> None:
        self._pool, self._turns, self._first = pool, turns, first

    def __len__(self) -> int:
        return len(self._turns.rows)

    def __getitem__(self, turn: Any) -> Any:
        start, stop = self._turns.spans[turn].tolist()
        row = self._pool.rows[int(self._turns.rows[turn])]
        answer = [int(token) for token in row["labels"][start:stop]]
        return {"input_ids": [self._first, *answer], "labels": [IGNORE_INDEX, *answer]}


def _alone(pool: Pool, turns: _Turns, first: int) -> Pool:
    """One row a turn: its answer behind the first token."""
    hashes = pool.row_hash or ()
    return Pool(
        rows=_Rows(pool, turns, first),
        index=np.arange(len(turns.rows)),
        lengths=turns.lengths + 1,
        loss_lengths=turns.lengths,
        row_hash=[f"{hashes[row]}{start:08x}" for row, (start, _) in zip(turns.rows, turns.spans, strict=True)],
    )


def _answer_losses(context: SelectionContext, pool: Pool, turns: _Turns, description: str) -> np.ndarray:
    """[M] mean loss of each answer behind all that comes before it, one forward a row."""
    counts = np.bincount(turns.rows, minlength=len(pool))
    ends = np.cumsum(counts)
    losses = np.full(len(turns.rows), np.nan)
    answered = replace(pool, loss_lengths=np.where(counts > 0, pool.loss_lengths, 0))

    def score(_positions: np.ndarray, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        signals, scored = label_signals(output_logits(context, batch), batch["labels"], shift=True)
        return signals.loss.cpu(), scored.cpu()

    with scoring_mode(context.model), torch.no_grad():
        for positions, (found, scored) in scored_batches(context, answered, description, score):
            for row, tokens, mask in zip(positions, found, scored, strict=True):
                places = slice(int(ends[row] - counts[row]), int(ends[row]))
                losses[places] = _run_means(tokens[mask], turns.lengths[places], int(row))
    return losses


def _run_means(tokens: Tensor, lengths: np.ndarray, row: int) -> np.ndarray:
    """Means of the last runs of these lengths; tokens of an answer without a prompt come before them."""
    if int(lengths.sum()) > len(tokens):
        raise DataError(
            f"row {row} has {lengths.sum()} answer tokens and {len(tokens)} in its batch; use a plain collator."
        )
    values = tokens[len(tokens) - int(lengths.sum()) :].double().numpy()
    means: np.ndarray = np.add.reduceat(values, np.cumsum(lengths) - lengths) / lengths
    return means


def _ratio(given: np.ndarray, alone: np.ndarray, variant: str) -> np.ndarray:
    """[M] scores of turns, NaN where one of the losses is not finite."""
    usable = np.isfinite(given) & np.isfinite(alone)
    if variant == "ppl_ratio":
        return np.exp(np.minimum(np.where(usable, given - alone, np.nan), _MAX_NATS))
    ratio = np.divide(given, alone, out=np.full(len(given), np.nan), where=usable & (alone > 0))
    # An answer that is certain without its prompt gains nothing from it.
    return np.where(usable & (alone == 0), 1.0, ratio)


def _row_means(values: np.ndarray, turns: _Turns, size: int) -> np.ndarray:
    """[N] mean over a row's turns, NaN for rows without any."""
    counts = np.bincount(turns.rows, minlength=size)
    sums = np.bincount(turns.rows, weights=values, minlength=size)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _by_length(scores: np.ndarray, turns: _Turns, kept: np.ndarray) -> dict[str, Any]:
    """Rows, mean score and rows kept by number of answer tokens: short answers have high scores."""
    tokens = np.bincount(turns.rows, weights=turns.lengths, minlength=len(scores))
    bucket = np.searchsorted(_BUCKETS, tokens, side="right") - 1
    chosen = np.isin(np.arange(len(scores)), kept)
    report = {}
    for number, low in enumerate(_BUCKETS):
        inside = (bucket == number) & np.isfinite(scores)
        high = f"-{_BUCKETS[number + 1] - 1}" if number + 1 < len(_BUCKETS) else "+"
        if inside.any():
            mean = round(float(scores[inside].mean()), 4)
            report[f"{low}{high}"] = {"rows": int(inside.sum()), "mean": mean, "kept": int((inside & chosen).sum())}
    return report


def cost(config: IfdConfig, facts: Facts) -> Cost:  # noqa: ARG001 - the signature every method shares
    """A forward of the pool and one of its answers, which are taken to be half of it."""
    rows, length = facts.pool.num_rows or 0, facts.pool.mean_tokens
    flops = sum(forward_flops(facts.model, BatchShape(rows, round(part))) for part in (length, length / 2 + 1))
    return Cost(flops=flops, tokens=rows * (1.5 * length + 1))


SPEC = MethodSpec(
    name="ifd",
    kind="selection",
    slot="pool",
    summary="Keep the rows whose prompt helps least, though it helps, in predicting the answer.",
    config=IfdConfig,
    build=Ifd,
    cost=cost,
    paper=Paper(
        title="Superfiltering: Weak-to-Strong Data Filtering for Fast Instruction-Tuning", year=2024, arxiv="2402.00530"
    ),
    traits=Traits(needs_model=True, uses_proxy=True, needs_causal_lm=True),
    tiny={"fraction": 0.5, "unhelpful": "last"},
)
