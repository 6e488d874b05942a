"""A short training of an adapter that leaves checkpoints with Adam's moments.

A plain loop, not a Trainer: what is wanted is the adapter and both moments by parameter name after
each epoch, the same for the same seed, whatever the batch size, padding or device of the forward.
The model stays in evaluation mode; the adapter's own dropout is applied by a hook, with masks that
are a hash of (seed, step, factor, row).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_eff.contracts.selection import SelectionContext
from hf_eff.engines.adapter import Adapter
from hf_eff.engines.datastore import check_header, pool_fingerprint, write_header
from hf_eff.engines.example_gradients import adapter_losses
from hf_eff.engines.pool_pass import pool_batches
from hf_eff.engines.sidecar import load_state, save_state
from hf_eff.errors import TrainingDivergedError
from hf_eff.numerics.keyed_random import content_order, make_key, random_words

_LANES = 4
"""16-bit uniform numbers in one random word."""


@dataclass(frozen=True, kw_only=True)
class WarmupSettings:
    """How the adapter is trained.

    Attributes:
        epochs: Passes over the rows, each of which leaves a checkpoint.
        batch_size: Rows of one optimizer step.
        learning_rate: Peak of a linear schedule that ends at zero.
        rise: Share of the steps over which the learning rate rises from zero.
        dropout: Share of the adapter's inputs dropped.
        max_grad_norm: Gradients longer than this are scaled down to it.
        betas: Adam's decay rates of the two moments.
        eps: Adam's epsilon, outside the root.
        seed: Names the order of the rows and the dropout masks.
        compute_dtype: Autocast type of the forward, or None.
    """

    epochs: int = 4
    batch_size: int = 16
    learning_rate: float = 2e-5
    rise: float = 0.03
    dropout: float = 0.1
    max_grad_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    seed: int = 0
    compute_dtype: torch.dtype | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able copy."""
        return {**asdict(self), "compute_dtype": str(self.compute_dtype)}


@dataclass(frozen=True)
class WarmupCheckpoint:
    """An adapter after some steps, by factor name.

    Attributes:
        weights: Values of the factors.
        first_moment: Adam's running mean m of the gradient, without bias correction.
        second_moment: Adam's running mean v of its square, without bias correction.
        step: Optimizer steps done.
        learning_rate: Mean learning rate of the epoch that ended here; 0 without training.
    """

    weights: Mapping[str, Tensor]
    first_moment: Mapping[str, Tensor]
    second_moment: Mapping[str, Tensor]
    step: int = 0
    learning_rate: float = 0.0


def untrained(adapter: Adapter) -> WarmupCheckpoint:
    """The adapter as it is, with moments of zero."""
    weights = adapter.weights()
    zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
    return WarmupCheckpoint(weights, zeros, dict(zeros))


def warm_up(
    context: SelectionContext,
    adapter: Adapter,
    rows: np.ndarray,
    settings: WarmupSettings,
    *,
    folder: Path | None = None,
    header: Mapping[str, Any] | None = None,
    after_step: Callable[[int], None] = lambda _step: None,
) -> list[WarmupCheckpoint]:
    """Train the adapter on some rows of the pool.

    Args:
        context: Pool, model, collator and limits; its ``forward_flops`` must count the backward too.
        adapter: Trained in place; its factors must be the only parameters that require gradients.
        rows: [n] positions of valid rows of the pool.
        settings: How.
        folder: Keeps finished epochs, which a later call with equal settings takes over.
        header: What else the result depends on, JSON-able; kept in ``folder`` and compared.
        after_step: Called with the number of steps done after each; not for epochs taken over from ``folder``.

    Returns:
        One checkpoint an epoch.

    Raises:
        BudgetExceededError: The next batch would pass a limit; it was not computed.
        ManifestError: ``folder`` holds a warm-up of something else.
        ScoringStoppedError: A stop was requested.
        TrainingDivergedError: The loss is not finite.
    """
    if folder is not None:
        shapes = {name: list(shape) for name, shape in adapter.shapes.items()}
        about = {"rows": pool_fingerprint(context.pool), "num_chosen": len(rows), "parameters": shapes}
        header = {**settings.to_dict(), **about, **(header or {})}
        if not check_header(folder, header):
            write_header(folder, header)
    checkpoints: list[WarmupCheckpoint] = []
    last = untrained(adapter)
    for epoch in range(settings.epochs):
        place = folder / f"epoch-{epoch}" if folder is not None else None
        saved = load_state(place) if place is not None else None
        last = WarmupCheckpoint(**saved) if saved else _epoch(context, adapter, rows, settings, last, after_step)
        if place is not None and not saved:
            save_state(place, vars(last))
        checkpoints.append(last)
    return checkpoints


def scheduled_rate(step: int, total: int, settings: WarmupSettings) -> float:
    """Learning rate of step ``step`` of ``total``: a linear rise, then a linear fall to zero."""
    rise = int(settings.rise * total)
    if step < rise:
        return settings.learning_rate * step / rise
    return settings.learning_rate * (total - step) / (total - rise)


def _epoch(
    context: SelectionContext,
    adapter: Adapter,
    rows: np.ndarray,
    settings: WarmupSettings,
    start: WarmupCheckpoint,
    after_step: Callable[[int], None],
) -> WarmupCheckpoint:
    """One pass over ``rows`` from ``start``: a function of its arguments alone."""
    adapter.load(start.weights)
    optimizer = _optimizer(adapter, settings, start)
    steps = math.ceil(len(rows) / settings.batch_size)
    order = rows[content_order(_hashes(context, rows), settings.seed, start.step)]
    rates: list[float] = []
    for batch in context.progress(np.array_split(order, steps), total=steps, description="Warm-up"):
        step = start.step + len(rates)
        rates.append(scheduled_rate(step, settings.epochs * steps, settings))
        optimizer.param_groups[0]["lr"] = rates[-1]
        for factor, gradient in zip(
            adapter.factors.values(), _gradient(context, adapter, batch, settings, step), strict=True
        ):
            factor.weight.grad = gradient
        nn.utils.clip_grad_norm_([factor.weight for factor in adapter.factors.values()], settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        after_step(start.step + len(rates))
    states = {name: optimizer.state[factor.weight] for name, factor in adapter.factors.items()}
    return WarmupCheckpoint(
        weights=adapter.weights(),
        first_moment={name: state["exp_avg"] for name, state in states.items()},
        second_moment={name: state["exp_avg_sq"] for name, state in states.items()},
        step=start.step + steps,
        learning_rate=float(np.mean(rates)),
    )


def _optimizer(adapter: Adapter, settings: WarmupSettings, start: WarmupCheckpoint) -> torch.optim.Adam:
    weights = {name: factor.weight for name, factor in adapter.factors.items()}
    optimizer = torch.optim.Adam(
        list(weights.values()), lr=settings.learning_rate, betas=settings.betas, eps=settings.eps
    )
    for name, weight in weights.items():
        optimizer.state[weight] = {
            "step": torch.tensor(float(start.step)),
            "exp_avg": start.first_moment[name].to(weight.device, copy=True),
            "exp_avg_sq": start.second_moment[name].to(weight.device, copy=True),
        }
    return optimizer


def _gradient(
    context: SelectionContext, adapter: Adapter, rows: np.ndarray, settings: WarmupSettings, step: int
) -> list[Tensor]:
    """Gradient of the mean loss over the tokens of ``rows``, a few rows at a time."""
    weights = [factor.weight for factor in adapter.factors.values()]
    total = [torch.zeros_like(weight) for weight in weights]
    kept = np.zeros_like(context.pool.loss_lengths)
    kept[rows] = context.pool.loss_lengths[rows]
    quiet = replace(context, progress=lambda batches, **_: batches)
    for positions, batch in pool_batches(quiet, replace(context.pool, loss_lengths=kept), "Warm-up"):
        keys = [int(value[:15], 16) for value in _hashes(context, positions)]
        with torch.enable_grad(), _dropout(adapter, settings, step, keys):
            losses, _ = adapter_losses(
                context.model,
                batch,
                is_causal_lm=context.is_causal_lm,
                reduction="sum",
                compute_dtype=settings.compute_dtype,
            )
        loss = losses.sum() / float(kept.sum())
        if not torch.isfinite(loss):
            raise TrainingDivergedError(f"the warm-up's loss is {loss.item()} at step {step}; lower its learning_rate.")
        for so_far, gradient in zip(total, torch.autograd.grad(loss, weights, materialize_grads=True), strict=True):
            so_far += gradient
    return total


@contextmanager
def _dropout(adapter: Adapter, settings: WarmupSettings, step: int, keys: list[int]) -> Iterator[None]:
    """Drop inputs of every ``lora_A``, by masks that belong to the row and not to its batch."""
    handles = []
    if settings.dropout:
        for index, (name, factor) in enumerate(adapter.factors.items()):
            if ".lora_A." in name:
                streams = [make_key(settings.seed, step, index, key) for key in keys]
                handles.append(factor.register_forward_pre_hook(_drop(streams, settings.dropout)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _drop(streams: list[int], rate: float) -> Any:
    level = round(rate * 2**16)

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        values = inputs[0]
        # A head that is called row by row shows one row at a time; those share a mask.
        keys = torch.tensor(streams if len(values) == len(streams) else streams[:1], device=values.device)
        size = values[0].numel()
        draws = random_words(keys, -(-size // _LANES)).view(torch.int16)[:, :size]
        kept = (draws >= level - 2**15).view(len(keys), *values.shape[1:])
        return (values * kept / (1 - level / 2**16), *inputs[1:])

    return hook


def _hashes(context: SelectionContext, rows: np.ndarray) -> list[str]:
    hashes = context.pool.row_hash or []
    return [hashes[int(row)] for row in rows]
