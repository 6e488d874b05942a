"""What one read of the logits says about every token: loss, EL2N, entropy and margin.

For logits z of one token with label y, p = softmax(z) and e_y the one-hot vector of the label:

    loss     -log p_y                                          in nats
    el2n     ||p - e_y||_2                                     in [0, sqrt 2]
    entropy  -sum over v of p_v log p_v                        in nats
    margin   z_y - max over v != y of z_v                      in nats of log-odds, negative where the model is wrong

EL2N (arXiv:2107.07075) squared is 1 - 2 p_y + sum p_v^2, which cancels where the model is right. Here the label's
entry is taken out before anything is summed: with r = sum over v != y of exp(z_v - m), q the sum of their squares and
s = r + exp(z_y - m), it is (r^2 + q) / s^2, exact down to zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_eff.errors import DataError, OptionError
from hf_eff.numerics.example_loss import IGNORE_INDEX

# B examples, T positions, V vocabulary entries, M = rows of logits, all in one list

SIGNALS = ("loss", "el2n", "entropy", "margin")
TOKEN_REDUCTIONS = ("mean", "rms", "max")
_CHUNK_ROWS = 2048
_CHUNK_ELEMENTS = 2**25
"""Upper bound of the exact copy of a slice of logits, where 2,048 rows of a large vocabulary would pass it."""
_FLOOR = -1e4
"""Shifted logits below this have probability zero; the bound keeps 0 x inf out of the entropy."""


class TokenSignals(NamedTuple):
    """Signals of some tokens, each of one shape, float32 (float64 for float64 logits)."""

    loss: Tensor
    el2n: Tensor
    entropy: Tensor
    margin: Tensor


def token_signals(logits: Tensor, labels: Tensor) -> TokenSignals:
    """Signals of each row of logits, computed over slices of at most 2,048 rows.

    Not differentiable in place of ``example_losses``: meant for scoring, under ``no_grad``.

    Args:
        logits: [M, V], V at least 2, any float type.
        labels: [M] class indices, none of them ignored.

    Returns:
        Four tensors [M].

    >>> found = token_signals(torch.zeros(1, 4), torch.tensor([2]))
    >>> [round(float(value), 4) for value in found]
    [1.3863, 0.866, 1.3863, 0.0]
    """
    rows = max(1, min(_CHUNK_ROWS, _CHUNK_ELEMENTS // max(1, logits.shape[1])))
    parts = [_signals(*pair) for pair in zip(logits.split(rows), labels.split(rows), strict=True)]
    return TokenSignals(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def label_signals(logits: Tensor, labels: Tensor, *, shift: bool) -> tuple[TokenSignals, Tensor]:
    """Signals of every label of a batch, at the label's own position.

    Args:
        logits: [B, T, V] of a language model or token classifier, [B, V] of a classifier.
        labels: [B, T] or [B], -100 where ignored.
        shift: Whether position t predicts label t + 1 (causal language models).

    Returns:
        signals: Four tensors [B, T] (T = 1 for a classifier), zero where nothing is scored.
        scored: [B, T] bool. The first label of a causal model's row has no context and is not scored.

    Raises:
        DataError: Labels and logits do not fit each other.
    """
    if logits.dim() == 2:
        logits, labels = logits[:, None], labels.reshape(-1, 1)
    if logits.dim() != 3 or labels.shape != logits.shape[:2] or labels.is_floating_point():
        raise DataError(
            f"labels of shape {list(labels.shape)} and type {labels.dtype} do not fit logits of {list(logits.shape)}; "
            "signals of the output need one class index a prediction."
        )
    labels = labels.to(logits.device)
    scored = labels != IGNORE_INDEX
    if shift:
        scored[:, 0] = False
    row, place = scored.nonzero(as_tuple=True)
    rows = max(1, min(_CHUNK_ROWS, _CHUNK_ELEMENTS // max(1, logits.shape[2])))
    # Only scored rows of the logits are read, a slice at a time: prompts are most of many pools.
    parts = [
        _signals(logits[where, at - int(shift)], labels[where, at])
        for where, at in zip(row.split(rows), place.split(rows), strict=True)
    ]
    dense = []
    for column in zip(*parts, strict=True):
        empty = torch.zeros(labels.shape, dtype=column[0].dtype, device=logits.device)
        empty[row, place] = torch.cat(column)
        dense.append(empty)
    nothing = torch.zeros(labels.shape, device=labels.device)
    return TokenSignals(*(dense or [nothing] * 4)), scored


def example_signals(
    logits: Tensor,
    labels: Tensor,
    *,
    shift: bool,
    signals: Iterable[str] = SIGNALS,
    reduction: str = "mean",
) -> tuple[dict[str, Tensor], Tensor]:
    """One number an example and signal: that of its loss positions, averaged.

    Args:
        logits: [B, T, V] or [B, V]; see ``label_signals``.
        labels: [B, T] or [B], -100 where ignored.
        shift: Whether position t predicts label t + 1.
        signals: Those wanted, of ``SIGNALS``.
        reduction: Mean, root of the mean square, or largest value over loss positions.

    Returns:
        values: [B] by signal, NaN for examples without loss positions.
        counts: [B] int64 loss positions.

    Raises:
        OptionError: ``reduction`` or a signal is not known.
    """
    if reduction not in TOKEN_REDUCTIONS:
        raise OptionError(f"reduction must be one of {list(TOKEN_REDUCTIONS)}, got {reduction!r}.")
    wanted = list(signals)
    if unknown := sorted(set(wanted) - set(SIGNALS)):
        raise OptionError(f"signals must be among {list(SIGNALS)}, got {unknown}.")
    by_token, scored = label_signals(logits, labels, shift=shift)
    counts = scored.sum(dim=1)
    return {name: _reduced(getattr(by_token, name), scored, counts, reduction) for name in wanted}, counts


def _signals(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Signals of one slice; two exact copies of it live at a time."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    index = labels[:, None]
    shifted = logits.to(exact) - logits.amax(dim=1, keepdim=True).to(exact)
    own = shifted.gather(1, index).squeeze(1)
    powers = shifted.clamp_(min=_FLOOR).exp()
    share = powers.gather(1, index).squeeze(1)
    whole = powers.sum(dim=1)
    entropy = whole.log() - torch.linalg.vecdot(powers, shifted) / whole
    powers.scatter_(1, index, 0.0)
    others = powers.sum(dim=1)
    el2n = (others.square() + torch.linalg.vecdot(powers, powers)).sqrt() / (others + share)
    runner_up = shifted.scatter_(1, index, -torch.inf).amax(dim=1)
    loss = (others + share).log() - own
    return loss.clamp_(min=0), el2n, entropy.clamp_(min=0), own - runner_up


def _reduced(values: Tensor, scored: Tensor, counts: Tensor, reduction: str) -> Tensor:
    """[B] from [B, T]; zeros outside the scored positions add nothing to a sum."""
    if reduction == "max":
        reduced = values.masked_fill(~scored, -torch.inf).amax(dim=1)
    else:
        total = (values.square() if reduction == "rms" else values).sum(dim=1)
        reduced = total / counts.clamp(min=1)
        reduced = reduced.sqrt() if reduction == "rms" else reduced
    return torch.where(counts > 0, reduced, torch.nan)
