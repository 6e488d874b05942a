"""What a selection method implements: a context comes in, picks go out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
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
        examples: Indexable rows as the user has them (text, messages), one a row, or None.
    """

    rows: Any
    index: np.ndarray
    lengths: np.ndarray
    loss_lengths: np.ndarray
    sources: Sequence[str] | None = None
    groups: Sequence[str] | None = None
    row_hash: Sequence[str] | None = None
    examples: Any = None

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.index)

    def take(self, positions: Sequence[int] | np.ndarray) -> Pool:
        """The pool of some of its rows, in the order given."""
        places = np.asarray(positions, dtype=np.int64)

        def some(values: Any) -> Any:
            return None if values is None else [values[int(place)] for place in places]

        return replace(
            self,
            rows=_Chosen(self.rows, places),
            index=np.asarray(self.index)[places],
            lengths=np.asarray(self.lengths)[places],
            loss_lengths=np.asarray(self.loss_lengths)[places],
            sources=some(self.sources),
            groups=some(self.groups),
            row_hash=some(self.row_hash),
            examples=None if self.examples is None else _Chosen(self.examples, places),
        )


class _Chosen:
    """Some rows of an indexable, read when they are asked for."""

    def __init__(self, rows: Any, places: np.ndarray) -> None:
        self._rows = rows
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: int) -> Any:
        return self._rows[int(self._places[place])]


class Processes(Protocol):
    """The processes that select together, each with the same pool.

    Attributes:
        rank: This process, from 0.
        size: Number of processes.
    """

    rank: int
    size: int

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank, on every process."""
        ...


class OneProcess:
    """No others."""

    rank = 0
    size = 1

    def gather(self, value: Any) -> list[Any]:
        """The one value."""
        return [value]


@dataclass(frozen=True)
class Scorer:
    """A model to score with, and what it costs.

    Attributes:
        model: The model; whoever scores leaves it as found.
        forward_flops: FLOPs of one forward of a [batch, length] block.
        device: Where it lives.
    """

    model: Any
    forward_flops: Callable[[int, int], float]
    device: Any = "cpu"


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
        tokenizer: Tokenizer of the model, or None where rows came tokenised without one.
        proxy: A smaller model with the same tokenizer, or None.
        prior: [N] scores that an earlier stage of a pipeline gave, higher is better, or None.
        processes: Who shares the scoring; every process ends with every score.
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
    tokenizer: Any = None
    proxy: Scorer | None = None
    prior: np.ndarray | None = None
    processes: Processes = field(default_factory=OneProcess)

    def by_proxy(self) -> SelectionContext:
        """The context in which the proxy is the model; this one where there is no proxy."""
        if self.proxy is None:
            return self
        proxy = self.proxy
        return replace(self, model=proxy.model, forward_flops=proxy.forward_flops, device=proxy.device, proxy=None)


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
