"""What a selection method implements: a context comes in, picks go out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass
class Pool:
    """Tokenised candidates or targets, one entry a row.

    Attributes:
        rows: Indexable rows; ``rows[i]`` is a mapping that the collator accepts (at least
            ``input_ids``; ``labels`` where given).
        index: [N] position of each row in the dataset the user passed.
        lengths: [N] tokens of the row after truncation.
        loss_lengths: [N] tokens that carry loss after the label shift; 0 marks an invalid row.
        sources: [N] source name of each row, or None.
        groups: [N] sub-task of each row (targets), or None.
        row_hash: [N] content hash (hex) of each row: the tie-break that makes a selection
            independent of row order.
    """

    rows: Any
    index: np.ndarray
    lengths: np.ndarray
    loss_lengths: np.ndarray
    sources: Sequence[str] | None = None
    groups: Sequence[str] | None = None
    row_hash: Sequence[str] | None = None

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.index)


@dataclass
class SelectionContext:
    """What a selector may use.

    Attributes:
        pool: Candidates.
        reference: Targets, or None.
        model: The model in the state it will be trained from, or None when the method needs none.
            A selector leaves its parameters, gradients, mode, hooks and the global RNG as found.
        collate: Turns a list of rows into a padded batch of tensors on the CPU.
        generator: Source of all randomness, seeded by the run.
        seed: The integer the generator was seeded with (key for streams that must restart).
        device: Where the model lives.
        batch_tokens: Upper bound of rows x padded length in one scoring batch.
        store_dir: Folder for resumable intermediate results, or None for memory only.
        spend: Called with FLOPs and tokens *before* a batch is computed; raises
            ``BudgetExceededError`` when a limit would be passed.
        forward_flops: FLOPs of one forward of a [batch, length] block.
        progress: ``progress(iterable, total, description)``: a tqdm-like wrapper.
        learning_rate: Learning rate of the run, the default of a warm-up.
        is_causal_lm: Whether labels are shifted by one.
        stop_requested: Polled between batches; a selector stops cleanly when it returns True.
    """

    pool: Pool
    collate: Callable[[list[Mapping[str, Any]]], Mapping[str, torch.Tensor]]
    generator: torch.Generator
    seed: int = 0
    reference: Pool | None = None
    model: Any = None
    device: Any = "cpu"
    batch_tokens: int = 16384
    store_dir: Path | None = None
    spend: Callable[[float, float], None] = lambda _flops, _tokens: None
    forward_flops: Callable[[int, int], float] = lambda _batch, _length: 0.0
    progress: Callable[..., Any] = lambda iterable, **_: iterable
    learning_rate: float = 2e-5
    is_causal_lm: bool = True
    stop_requested: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class Picks:
    """What a selector chose.

    Attributes:
        positions: [k] distinct positions into the context's pool, in order of preference.
        scores: [N] float score of every candidate (NaN where invalid), or None when the method
            does not score.
        weights: [k] finite, non-negative training weights, or None for equal weights.
        reasons: One short reason a choice, or a single one for all.
        higher_is_better: Direction of the score.
        notes: JSON-able facts for the report, such as the variant that ran.
    """

    positions: np.ndarray
    scores: np.ndarray | None = None
    weights: np.ndarray | None = None
    reasons: Sequence[str] | str = ""
    higher_is_better: bool = True
    notes: Mapping[str, Any] = field(default_factory=dict)


class Selector(Protocol):
    """A pool-level selection method."""

    def select(self, context: SelectionContext) -> Picks:
        """Choose rows of ``context.pool``."""
        ...
