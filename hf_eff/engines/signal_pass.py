"""Signals of the output for every row of a pool: of the model as it is, or along a short training.

Along a training the model wears a temporary LoRA. The signals at its checkpoints are how a row was learnt: when its
loss fell, how far, and whether it rose again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_eff.contracts.cost import Facts
from hf_eff.contracts.memory import BatchShape
from hf_eff.contracts.selection import Pool, SelectionContext
from hf_eff.engines.adapter import Adapter, LoraShape, temporary_adapter
from hf_eff.engines.datastore import FeatureStore, model_fingerprint, pool_fingerprint
from hf_eff.engines.gradient_features import backward_context
from hf_eff.engines.pool_pass import scored_batches, unfinished
from hf_eff.engines.scoring import inputs_without_labels, scoring_mode
from hf_eff.engines.sidecar import load_state, save_state
from hf_eff.engines.warmup import WarmupSettings, warm_up
from hf_eff.errors import DataError, PlanError
from hf_eff.numerics.flops import forward_flops
from hf_eff.numerics.keyed_random import content_order
from hf_eff.numerics.output_signals import example_signals

# N pool rows, E checkpoints, B rows of a batch


@dataclass(frozen=True, kw_only=True)
class SignalTrace:
    """How signals along a training are made.

    Attributes:
        shape: Adapter for models that have none.
        warmup: Training of the adapter.
        train_fraction: Share of the pool's valid rows to train on.
        checkpoints: Where signals are taken: E steps spread evenly over the training, the last one included.
        gradient_tokens: Tokens, padding included, of a batch with gradients.
        signal: One of ``SIGNALS`` that is never negative: all but the margin.
        reduction: How a row's tokens make one number.
    """

    shape: LoraShape
    warmup: WarmupSettings
    train_fraction: float = 1.0
    checkpoints: int = 8
    gradient_tokens: int = 2048
    signal: str = "loss"
    reduction: str = "mean"

    def cost(self, facts: Facts) -> tuple[float, float, float]:
        """FLOPs, tokens and bytes on disk; the adapter's size is estimated from the widths of attention."""
        model, rows, length = facts.model, facts.pool.num_rows or 0, max(1, math.ceil(facts.pool.mean_tokens))
        adapter = sum(4 * self.shape.rank * (model.hidden_size + block.attention_width) for block in model.blocks)
        if model.is_peft and model.trainable is not None:
            adapter = model.trainable.params
        forward = forward_flops(model, BatchShape(1, length))
        trained = self.warmup.epochs * max(1, round(self.train_fraction * rows)) if rows else 0
        scored = self.checkpoints * rows
        flops = trained * (2 * forward + 6.0 * adapter * length) + scored * (forward + 2.0 * adapter * length)
        disk = 9.0 * scored + 4.0 * adapter * (3 * self.warmup.epochs + self.checkpoints)
        return flops, float(trained + scored) * length, disk


def pool_signals(
    context: SelectionContext,
    pool: Pool,
    signals: Iterable[str] = ("el2n",),
    *,
    reduction: str = "mean",
    description: str = "Scoring",
) -> dict[str, np.ndarray]:
    """Signals of every row of ``pool`` under ``context.model``: one forward, one read of the logits.

    Args:
        context: Model, collator, limits and progress bar. The model is left as found.
        pool: Rows to score; rows without loss tokens are skipped.
        signals: Those wanted; see ``numerics.output_signals``.
        reduction: How a row's tokens make one number.
        description: Text of the progress bar.

    Returns:
        [N] float64 by signal, NaN for invalid rows and for values that are not finite.

    Raises:
        BudgetExceededError: The next batch would pass a limit; it was not computed.
        DataError: The model's output has no class scores, or they do not fit the labels.
        ScoringStoppedError: A stop was requested.
    """
    wanted = tuple(signals)
    found = {name: np.full(len(pool), np.nan) for name in wanted}
    for positions, values in _signal_batches(context, pool, wanted, reduction, description):
        for name in wanted:
            found[name][positions] = values[name].double().cpu().numpy()
    return {name: np.where(np.isfinite(column), column, np.nan) for name, column in found.items()}


def output_logits(context: SelectionContext, batch: Mapping[str, Any]) -> Tensor:
    """Logits of a batch on the model's device, without a loss of the model's own.

    Raises:
        DataError: The model gives none.
    """
    core = context.model.get_base_model() if hasattr(context.model, "get_base_model") else context.model
    outputs = context.model(**inputs_without_labels(core, batch, is_causal_lm=context.is_causal_lm))
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else outputs[0]
    if not isinstance(logits, Tensor):
        raise DataError(f"{type(core).__name__} gives no logits, which scores of its output are made of.")
    return logits


def trace_signal(context: SelectionContext, trace: SignalTrace) -> tuple[np.ndarray, dict[str, Any]]:
    """Train a temporary adapter and take a signal of every row at each checkpoint.

    With ``context.store_dir`` finished epochs, checkpoints and batches are kept there; called again after an
    interruption, the result is that of an uninterrupted call, bit for bit. The model is left as found.

    Args:
        context: Pool with content hashes, model and limits.
        trace: How.

    Returns:
        values: [N, E] float32 in the order of the training, NaN for invalid rows and values that are not finite.
        facts: What was done, JSON-able.

    Raises:
        BudgetExceededError: The next batch would pass a limit; it was not computed.
        DataError: The pool has no valid row, or the model's output has no class scores.
        ManifestError: ``context.store_dir`` holds a trace of other rows, settings or another model.
        PlanError: ``trace.signal`` may be negative.
        ScoringStoppedError: A stop was requested.
    """
    if trace.signal == "margin":
        raise PlanError("a trace holds signals that are never negative; take loss, el2n or entropy, not margin.")
    rows = _trained_rows(context, trace)
    if not len(rows):
        raise DataError(f"none of the {len(context.pool)} rows of the pool has a token that carries loss.")
    known = {"model": model_fingerprint(context.model)}
    with scoring_mode(context.model), temporary_adapter(context.model, trace.shape, trace.warmup.seed) as adapter:
        snapshots = _train(context, adapter, rows, trace, known)
        columns = []
        for step in snapshots.steps:
            adapter.load(snapshots.weights(step))
            columns.append(_checkpoint_values(context, adapter, trace, step, known))
    facts = {
        "adapter": "fresh" if adapter.is_new else "the model's own",
        "train_rows": len(rows),
        "checkpoint_steps": list(snapshots.steps),
    }
    return np.stack(columns, axis=1), facts


def _signal_batches(
    context: SelectionContext, pool: Pool, signals: tuple[str, ...], reduction: str, description: str
) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
    """Signals of one batch after the other.

    Yields:
        positions: [B] rows of the batch.
        signals: [B] by name, on the CPU.
    """

    def score(_positions: np.ndarray, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        labels = batch.get("labels")
        if labels is None:
            raise DataError("rows have no labels, which scores of a model's output are made of; add the column.")
        logits = output_logits(context, batch)
        found = example_signals(logits, labels, shift=context.is_causal_lm, signals=signals, reduction=reduction)[0]
        return {name: values.cpu() for name, values in found.items()}

    with scoring_mode(context.model), torch.no_grad():
        yield from scored_batches(context, pool, description, score)


def _trained_rows(context: SelectionContext, trace: SignalTrace) -> np.ndarray:
    """A random share of the valid rows, drawn by content."""
    valid = np.flatnonzero(context.pool.loss_lengths > 0)
    hashes = context.pool.row_hash or ()
    order = content_order([hashes[int(row)] for row in valid], trace.warmup.seed)
    return valid[order][: max(1, round(trace.train_fraction * len(valid)))]


def _train(
    context: SelectionContext, adapter: Adapter, rows: np.ndarray, trace: SignalTrace, known: Mapping[str, Any]
) -> _Snapshots:
    total = trace.warmup.epochs * math.ceil(len(rows) / trace.warmup.batch_size)
    steps = sorted({math.ceil(total * (number + 1) / trace.checkpoints) for number in range(trace.checkpoints)})
    folder = context.store_dir / "training" if context.store_dir else None
    snapshots = _Snapshots(adapter, steps, folder)
    paid = backward_context(context, adapter, trace.gradient_tokens)
    header = {**known, "checkpoint_steps": steps}
    warm_up(paid, adapter, rows, trace.warmup, folder=folder, header=header, after_step=snapshots.take)
    return snapshots


class _Snapshots:
    """Weights of an adapter after chosen steps, which need not end an epoch."""

    def __init__(self, adapter: Adapter, steps: list[int], folder: Path | None) -> None:
        self.steps = steps
        self._adapter = adapter
        self._folder = folder
        self._held: dict[int, Mapping[str, Tensor]] = {}

    def take(self, step: int) -> None:
        """Keep the weights, if the step is one of those chosen."""
        if step not in self.steps:
            return
        if self._folder is None:
            self._held[step] = self._adapter.weights()
        else:
            save_state(self._folder / f"step-{step}", {"weights": self._adapter.weights()})

    def weights(self, step: int) -> Mapping[str, Tensor]:
        """Weights after that step."""
        if self._folder is None:
            return self._held[step]
        state = load_state(self._folder / f"step-{step}")
        return state["weights"] if state else {}


def _checkpoint_values(
    context: SelectionContext, adapter: Adapter, trace: SignalTrace, step: int, known: Mapping[str, Any]
) -> np.ndarray:
    """[N] float32 signal at one checkpoint, kept batch by batch as lengths of vectors of one number."""
    about = {"signal": trace.signal, "reduction": trace.reduction, "step": step, "warmup": trace.warmup.to_dict()}
    about |= {"rows": pool_fingerprint(context.pool), "batch_tokens": context.batch_tokens, **known}
    folder = context.store_dir / f"signal-{step}" if context.store_dir else None
    store = FeatureStore.open(folder, rows=len(context.pool), width=1, dtype="float32", header=about)
    lacking = unfinished(context, context.pool, store.done)
    extra = 2.0 * adapter.num_params

    def flops(rows: int, length: int) -> float:
        return context.forward_flops(rows, length) + extra * rows * length

    paid = replace(context, forward_flops=flops)
    for positions, values in _signal_batches(paid, lacking, (trace.signal,), trace.reduction, f"Signal at step {step}"):
        store.write(positions, values[trace.signal][:, None])
    return np.where(store.done, store.norms, np.nan).astype(np.float32)
