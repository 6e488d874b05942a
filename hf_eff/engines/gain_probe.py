"""A held-out quantity of a fixed subset, compared example by example from one look at a model to the next.

It is the loss unless another ``HeldOut`` is given. The same examples are read every time, so that what makes one
example harder than another cancels::

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
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from hf_eff.contracts.governor import ProbeReading
from hf_eff.engines.held_out import HeldOut, HeldOutLoss
from hf_eff.engines.pool_pass import token_batches
from hf_eff.engines.scoring import scoring_mode
from hf_eff.errors import CheckpointError, DataError, OptionError
from hf_eff.numerics.probe_size import affordable_examples
from hf_eff.numerics.row_hash import hash_of_hashes, row_hash

Batch = Mapping[str, Any]


def _no_flops(rows: int, length: int) -> float:  # noqa: ARG001 - stands in for a FLOP counter
    return 0.0


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(eq=False)
class GainProbe:
    """Reads a quantity of held-out examples without leaving a trace on the model or on any random state.

    The subset is drawn once from ``seed`` and collated once, so that a collator that masks or truncates at random does
    so only once. Over several processes each one reads its share of the batches, the same number on every rank, and all
    of them end up with the identical reading.

    Attributes:
        rows: Held-out rows; ``rows[i]`` is a mapping that the collator accepts.
        collate: Turns a list of rows into a padded batch with ``labels``.
        is_causal_lm: Whether labels are shifted by one.
        quantity: What is read; None for the loss.
        num_examples: Size of the subset; fewer when there are fewer rows or a reading would cost too much.
        seed: Decides the subset.
        batch_tokens: Upper bound of rows x longest row in one forward.
        forward_flops: FLOPs of reading a [rows, length] block: one forward, unless the quantity takes more.
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
    quantity: HeldOut | None = None
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
        self._read = self.quantity or HeldOutLoss(is_causal_lm=self.is_causal_lm)
        chosen = random.Random(self.seed).sample(range(len(rows)), min(self.num_examples, len(rows)))
        lengths = [self._read.length(rows[index]) for index in chosen]
        row_flops = sum(self.forward_flops(1, length) for length in lengths) / len(lengths)
        self.num_examples = affordable_examples(len(chosen), row_flops, self.max_flops)
        subset = [dict(rows[index]) for index in sorted(chosen[: self.num_examples])]
        self._digest = hash_of_hashes(row_hash(row) for row in subset)
        batch_tokens = 1 if self._read.one_by_one else self.batch_tokens
        batches = _share_evenly([self._read.length(row) for row in subset], batch_tokens, self.world_size)
        with _seeded(self.seed):
            # A copy, because collators may carry a random state of their own that training goes on to use.
            collator = copy.copy(collate)
            collated = [self._read.collated(collator, [dict(subset[i]) for i in batch.tolist()]) for batch in batches]
        self._mine = list(zip(batches, collated, strict=True))[self.rank :: self.world_size]
        shapes = [self._read.shape(batch) for batch in collated]
        self.cost_flops = float(sum(self.forward_flops(*shape) for shape in shapes))
        self.cost_tokens = float(sum(height * length for height, length in shapes))
        self._baseline: np.ndarray | None = None
        self._previous: np.ndarray | None = None
        self._best: np.ndarray | None = None
        self._readings = 0

    @property
    def level(self) -> float | None:
        """The quantity now minus at the first reading, mean over examples; None before the first reading."""
        if self._previous is None or self._baseline is None:
            return None
        return _mean_finite(self._previous - self._baseline)

    def read(self, model: nn.Module) -> ProbeReading:
        """The quantity of the subset under ``model``, compared with the previous reading.

        Examples whose value is not finite, now or before, take no part.

        Args:
            model: The model, unwrapped unless the wrapper runs its forward collectively.
        """
        now = self._values(model)
        finite = now[np.isfinite(now)]
        delta, error = (None, None) if self._previous is None else _paired(self._previous, now)
        self._baseline = now if self._baseline is None else self._baseline
        self._previous = now
        self._readings += 1
        self._note_best()
        return ProbeReading(
            mean=float(finite.mean()) if finite.size else math.nan,
            paired_delta=delta,
            paired_se=error,
            num_examples=int(finite.size) if self._read.noise == "examples" else self.num_examples,
        )

    @property
    def chance_above_best(self) -> float:
        """Lower bound on the chance that the quantity is above that of its lowest reading; 0 where it is that reading.

        Bonferroni's bound over the readings allows for the lowest being the luckiest.
        """
        if self._best is None or self._previous is None or self._best is self._previous:
            return 0.0
        drop, error = _paired(self._best, self._previous)
        if drop is None or error is None or drop >= 0.0:
            return 0.0
        tail = NormalDist().cdf(drop / error) if error > 0.0 else 0.0
        return max(0.0, 1.0 - (self._readings - 1) * tail)

    def _note_best(self) -> None:
        assert self._baseline is not None  # noqa: S101 - a reading is in
        lowest = math.inf if self._best is None else _mean_finite(self._best - self._baseline)
        level = self.level
        if level is not None and level < lowest:
            self._best = self._previous

    def state_dict(self) -> dict[str, Any]:
        """JSON-able values of the first, the lowest and the latest reading; None stands for one that is not finite."""
        return {
            "quantity": self._read.name,
            "examples": self._digest,
            "baseline": _to_json(self._baseline),
            "previous": _to_json(self._previous),
            "best": _to_json(self._best),
            "readings": self._readings,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``.

        Raises:
            CheckpointError: It was written for other held-out examples or another quantity.
        """
        if state.get("quantity", HeldOutLoss.name) != self._read.name:
            raise CheckpointError(
                f"the checkpoint's probes read {state.get('quantity', HeldOutLoss.name)!r} and this run reads "
                f"{self._read.name!r}; resume with the same objective of the governor."
            )
        if state["examples"] != self._digest:
            raise CheckpointError(
                "the held-out examples differ from those that the checkpoint's probes were read on; resume with the "
                "same eval_dataset, seed and num_examples."
            )
        self._baseline = _from_json(state["baseline"])
        self._previous = _from_json(state["previous"])
        self._best = _from_json(state.get("best"))
        self._readings = int(state.get("readings", 0))

    def _values(self, model: nn.Module) -> np.ndarray:
        """[n] values in the order of the subset, the same array on every rank."""
        device = next(model.parameters()).device
        found: list[tuple[list[int], list[Any]]] = []
        # no_grad, not inference_mode: a buffer that the model rebuilds inside would be barred from training.
        with scoring_mode(model), torch.no_grad():
            for positions, batch in self._mine:
                moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
                outputs = self._read.outputs(model, moved)
                if len(outputs) != len(positions):
                    raise OptionError(f"{self._read.name} gave {len(outputs)} values for {len(positions)} rows.")
                found.append((positions.tolist(), outputs))
        _reshard(model)
        outputs_of_all: list[Any] = [None] * self.num_examples
        for positions, outputs in (pair for part in self.gather(found) for pair in part):
            for position, output in zip(positions, outputs, strict=True):
                outputs_of_all[position] = output
        return self._read.values(outputs_of_all)


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


def _to_json(values: np.ndarray | None) -> list[float | None] | None:
    return None if values is None else [value if math.isfinite(value) else None for value in values.tolist()]


def _from_json(values: list[float | None] | None) -> np.ndarray | None:
    return None if values is None else np.array([math.nan if value is None else value for value in values])


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
