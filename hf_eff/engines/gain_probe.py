"""Losses of a fixed held-out subset, compared example by example from one look at a model to the next.

The same examples are read every time, so that what makes one example harder than another cancels::

    paired_delta = mean_j(before_j - now_j),   paired_se = sd_j(before_j - now_j) / sqrt(n)

which has a small fraction of the variance of a difference of two independent means.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import KW_ONLY, InitVar, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from hf_eff.contracts.governor import ProbeReading
from hf_eff.engines.pool_pass import token_batches
from hf_eff.engines.scoring import model_example_losses, scoring_mode
from hf_eff.errors import CheckpointError, DataError
from hf_eff.numerics.probe_size import affordable_examples
from hf_eff.numerics.row_hash import hash_of_hashes, row_hash

Batch = Mapping[str, Any]


def _no_flops(rows: int, length: int) -> float:  # noqa: ARG001 - stands in for a FLOP counter
    return 0.0


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(eq=False)
class GainProbe:
    """Reads the loss of held-out examples without leaving a trace on the model or on any random state.

    The subset is drawn once from ``seed`` and collated once, so that a collator that masks or truncates at random does
    so only once. Over several processes each one reads its share of the batches, the same number on every rank, and all
    of them end up with the identical reading.

    Attributes:
        rows: Held-out rows; ``rows[i]`` is a mapping that the collator accepts.
        collate: Turns a list of rows into a padded batch with ``labels``.
        is_causal_lm: Whether labels are shifted by one.
        num_examples: Size of the subset; fewer when there are fewer rows or a reading would cost too much.
        seed: Decides the subset.
        batch_tokens: Upper bound of rows x longest row in one forward.
        forward_flops: FLOPs of one forward of a [rows, length] block.
        max_flops: What a reading should cost at most; the subset shrinks for it, yet not below 16.
        rank, world_size: This process among those that call ``read`` together.
        gather: Returns the values that all ranks passed, in rank order.
        cost_flops, cost_tokens: What one reading costs, over all processes.

    Raises:
        DataError: There are no rows.
    """

    rows: InitVar[Any]
    collate: InitVar[Callable[[list[Mapping[str, Any]]], Batch]]
    _: KW_ONLY
    is_causal_lm: bool
    num_examples: int = 128
    seed: int = 0
    batch_tokens: int = 8192
    forward_flops: Callable[[int, int], float] = _no_flops
    max_flops: float = math.inf
    rank: int = 0
    world_size: int = 1
    gather: Callable[[Any], list[Any]] = _alone
    cost_flops: float = field(init=False)
    cost_tokens: float = field(init=False)

    def __post_init__(self, rows: Any, collate: Callable[[list[Mapping[str, Any]]], Batch]) -> None:
        """Draw and collate the subset, and price a reading."""
        if not len(rows):
            raise DataError("a probe needs held-out examples; pass an eval_dataset that is not empty.")
        chosen = random.Random(self.seed).sample(range(len(rows)), min(self.num_examples, len(rows)))
        lengths = [len(rows[index]["input_ids"]) for index in chosen]
        row_flops = sum(self.forward_flops(1, length) for length in lengths) / len(lengths)
        self.num_examples = affordable_examples(len(chosen), row_flops, self.max_flops)
        subset = [dict(rows[index]) for index in sorted(chosen[: self.num_examples])]
        self._digest = hash_of_hashes(row_hash(row) for row in subset)
        batches = _share_evenly([len(row["input_ids"]) for row in subset], self.batch_tokens, self.world_size)
        with _seeded(self.seed):
            # A copy, because collators may carry a random state of their own that training goes on to use.
            collated = _collate_all(copy.copy(collate), subset, batches)
        self._mine = list(zip(batches, collated, strict=True))[self.rank :: self.world_size]
        shapes = [_shape(batch) for batch in collated]
        self.cost_flops = float(sum(self.forward_flops(*shape) for shape in shapes))
        self.cost_tokens = float(sum(height * length for height, length in shapes))
        self._baseline: np.ndarray | None = None
        self._previous: np.ndarray | None = None

    @property
    def level(self) -> float | None:
        """Loss now minus loss at the first reading, mean over examples; None before the first reading."""
        if self._previous is None or self._baseline is None:
            return None
        return _mean_finite(self._previous - self._baseline)

    def read(self, model: nn.Module) -> ProbeReading:
        """Losses of the subset under ``model``, compared with the previous reading.

        Examples whose loss is not finite, now or before, take no part.

        Args:
            model: The model, unwrapped unless the wrapper runs its forward collectively.
        """
        now = self._losses(model)
        finite = now[np.isfinite(now)]
        delta, error = (None, None) if self._previous is None else _paired(self._previous, now)
        self._baseline = now if self._baseline is None else self._baseline
        self._previous = now
        return ProbeReading(
            mean=float(finite.mean()) if finite.size else math.nan,
            paired_delta=delta,
            paired_se=error,
            num_examples=int(finite.size),
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON-able losses of the first and of the latest reading; None stands for a loss that is not finite."""
        return {
            "examples": self._digest,
            "baseline": _to_json(self._baseline),
            "previous": _to_json(self._previous),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``.

        Raises:
            CheckpointError: It was written for other held-out examples.
        """
        if state["examples"] != self._digest:
            raise CheckpointError(
                "the held-out examples differ from those that the checkpoint's probes were read on; resume with the "
                "same eval_dataset, seed and num_examples."
            )
        self._baseline = _from_json(state["baseline"])
        self._previous = _from_json(state["previous"])

    def _losses(self, model: nn.Module) -> np.ndarray:
        """[n] losses in the order of the subset, the same array on every rank."""
        device = next(model.parameters()).device
        found: list[tuple[list[int], list[float]]] = []
        # no_grad, not inference_mode: a buffer that the model rebuilds inside would be barred from training.
        with scoring_mode(model), torch.no_grad():
            for positions, batch in self._mine:
                moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
                losses, _ = model_example_losses(model, moved, is_causal_lm=self.is_causal_lm)
                found.append((positions.tolist(), losses.double().tolist()))
        _reshard(model)
        all_losses = np.full(self.num_examples, np.nan)
        for positions, losses in (pair for part in self.gather(found) for pair in part):
            all_losses[positions] = losses
        return all_losses


def _reshard(model: nn.Module) -> None:
    """Free what FSDP2 gathered; after a forward without gradients its root module would keep whole parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _share_evenly(lengths: list[int], batch_tokens: int, world_size: int) -> list[np.ndarray]:
    """Batches of positions, a multiple of ``world_size`` of them.

    A rank without a batch would leave the others waiting in a collective forward, so the last batch is repeated where
    the number does not come out even.
    """
    share = max(*lengths, math.ceil(sum(lengths) / world_size))
    batches = token_batches(lengths, min(batch_tokens, share))
    return batches + [batches[-1]] * (-len(batches) % world_size)


def _collate_all(
    collate: Callable[[list[Mapping[str, Any]]], Batch], subset: list[dict[str, Any]], batches: list[np.ndarray]
) -> list[Batch]:
    return [collate([dict(subset[position]) for position in batch.tolist()]) for batch in batches]


def _shape(batch: Batch) -> tuple[int, int]:
    rows, length = batch["input_ids"].shape
    return int(rows), int(length)


def _paired(before: np.ndarray, now: np.ndarray) -> tuple[float | None, float | None]:
    """Mean of before - now over examples finite in both, and its standard error; None where too few are left."""
    difference = before - now
    difference = difference[np.isfinite(difference)]
    if not difference.size:
        return None, None
    if difference.size == 1:
        return float(difference[0]), None
    return float(difference.mean()), float(difference.std(ddof=1) / math.sqrt(difference.size))


def _mean_finite(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else math.nan


def _to_json(losses: np.ndarray | None) -> list[float | None] | None:
    return None if losses is None else [value if math.isfinite(value) else None for value in losses.tolist()]


def _from_json(losses: list[float | None] | None) -> np.ndarray | None:
    return None if losses is None else np.array([math.nan if value is None else value for value in losses])


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Set the global random states from ``seed``, and put them back afterwards."""
    python, numeric = random.getstate(), np.random.get_state()  # noqa: NPY002 - collators draw from the global states
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # noqa: TID251 - inside a fork: a collator takes no generator
            random.setstate(random.Random(seed).getstate())
            np.random.set_state(np.random.RandomState(seed % 2**32).get_state())  # noqa: NPY002
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numeric)  # noqa: NPY002
