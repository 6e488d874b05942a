"""One loss per example, from logits and labels, without a float copy of the logits.

The training loss of a batch is a mean over all its tokens and says nothing about one example.
Everything that ranks, probes or attributes uses, for example i with loss positions A_i,

    loss_i = 1/n_i * sum over t in A_i of -log p(y_t | context),    n_i = |A_i|, 1 or sqrt(|A_i|)

where A_i are the positions whose label is not -100, after the label shift of a causal model.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_eff.errors import DataError, OptionError

# B examples, T positions, V classes or vocabulary entries, M = B*T rows of logits

IGNORE_INDEX = -100
Reduction = Literal["mean", "sum", "sqrt"]
REDUCTIONS: tuple[str, ...] = ("mean", "sum", "sqrt")
_CHUNK_ELEMENTS = 2**24
"""Upper bound of the float copy of a slice of logits: 64 MiB in float32."""


def example_losses(
    logits: Tensor,
    labels: Tensor,
    *,
    shift: bool,
    reduction: Reduction = "mean",
    problem_type: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and number of loss positions of each example.

    The gradient of ``losses[i]`` reaches only the logits of example ``i``; an example without
    loss positions has loss NaN and gradient zero. Differentiable once. Labels that do not fit the
    logits raise ``DataError``.

    Args:
        logits: [B, T, V] of a language model or token classifier, [B, V] of a classifier, [B, 1]
            or [B] of a regressor; any float type.
        labels: [B, T] or [B] class indices with -100 where ignored; floats of the logits' shape
            for regression and multi-label classification.
        shift: Whether position t predicts label t + 1 (causal language models).
        reduction: Divide the summed loss by the number of loss positions, by 1, or by its root.
        problem_type: The model configuration's ``problem_type``; None infers it as transformers
            does: one output is regression, float labels are multi-label.

    Returns:
        losses: [B] in nats, float32 (float64 for float64 logits), NaN where there is nothing to predict.
        counts: [B] int64 loss positions.

    Raises:
        OptionError: ``reduction`` is not known.

    >>> loss, count = example_losses(torch.zeros(1, 3, 8), torch.tensor([[-100, 5, 5]]), shift=True)
    >>> round(loss.exp().item(), 3), count.item()
    (8.0, 2)
    """
    if reduction not in REDUCTIONS:
        raise OptionError(f"reduction must be one of {list(REDUCTIONS)}, got {reduction!r}.")
    labels = labels.to(logits.device)
    kind = "tokens" if logits.dim() == 3 else (problem_type or _infer_problem(logits, labels))
    _check_shapes(logits, labels, kind)
    if kind == "tokens":
        losses, valid = _token_losses(logits, labels, shift=shift)
    else:
        losses, valid = _row_losses(logits.reshape(len(logits), -1), labels, kind)
    counts = valid.sum(dim=1)
    divisor = {"mean": counts, "sum": torch.ones_like(counts), "sqrt": counts.to(losses.dtype).sqrt()}[reduction]
    nothing = losses.new_full((), float("nan"))
    # clamp keeps 0/0 out of the graph: its gradient would be NaN even where the result is not used.
    return torch.where(counts > 0, losses.sum(dim=1) / divisor.clamp(min=1), nothing), counts


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each label, computed over slices of rows.

    Args:
        logits: [M, V], any float type.
        labels: [M] class indices; -100 gives zero loss and zero gradient.

    Returns:
        [M] in nats, float32 (float64 for float64 logits).
    """
    return _SlicedNLL.apply(logits, labels)[0]


def _token_losses(logits: Tensor, labels: Tensor, *, shift: bool) -> tuple[Tensor, Tensor]:
    if shift:
        # Moving the labels instead of slicing the logits keeps the logits contiguous and uncopied.
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE_INDEX)], dim=1)
    nll = token_nll(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
    return nll.view(labels.shape), labels != IGNORE_INDEX


def _row_losses(scores: Tensor, labels: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Losses [B, 1] and validity [B, 1] of one label, or one vector of labels, an example."""
    if kind == "single_label_classification":
        flat = labels.reshape(-1)
        return token_nll(scores, flat)[:, None], (flat != IGNORE_INDEX)[:, None]
    scores = scores.to(_exact(scores.dtype))
    goal = labels.reshape(scores.shape).to(scores.dtype)
    if kind == "regression":
        losses = (scores - goal).square()
    else:
        losses = torch.nn.functional.binary_cross_entropy_with_logits(scores, goal, reduction="none")
    return losses.mean(dim=1, keepdim=True), torch.ones_like(scores[:, :1], dtype=torch.bool)


def _infer_problem(logits: Tensor, labels: Tensor) -> str:
    if logits.dim() == 1 or logits.shape[1] == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def _check_shapes(logits: Tensor, labels: Tensor, kind: str) -> None:
    if kind == "tokens":
        fits = labels.shape == logits.shape[:2]
    elif kind == "single_label_classification":
        fits = labels.numel() == len(logits)
    else:
        fits = labels.numel() == logits.numel()
    if not fits:
        raise DataError(f"labels of shape {list(labels.shape)} do not fit {kind} logits of {list(logits.shape)}.")


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _SlicedNLL(torch.autograd.Function):
    """Cross-entropy that keeps only the logits it was given and one number a row.

    Autograd's own graph would hold a float32 softmax of [M, V]: for a 128k vocabulary more than
    the rest of the model's activations.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """[M] losses, and [M] log normalisers for the backward."""
        target = torch.where(labels == IGNORE_INDEX, 0, labels)
        losses, normalisers = [], []
        for piece, index in zip(logits.split(_rows(logits)), target.split(_rows(logits)), strict=True):
            exact = piece.to(_exact(piece.dtype))
            normaliser = exact.logsumexp(dim=1)
            losses.append(normaliser - exact.gather(1, index[:, None]).squeeze(1))
            normalisers.append(normaliser)
        loss = torch.cat(losses)
        return torch.where(labels == IGNORE_INDEX, torch.zeros_like(loss), loss), torch.cat(normalisers)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        """Keep the logits themselves, no copy."""
        ctx.save_for_backward(*inputs, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None]:
        """Softmax minus one-hot, scaled by the row's incoming gradient, slice by slice."""
        logits, labels, normalisers = ctx.saved_tensors
        valid = labels != IGNORE_INDEX
        rows = _rows(logits)
        scale = torch.where(valid, grad, torch.zeros_like(grad))[:, None]
        target = torch.where(valid, labels, 0)[:, None]
        result = torch.empty_like(logits)
        for piece, norm, index, factor, out in zip(
            *(tensor.split(rows) for tensor in (logits, normalisers, target, scale, result)), strict=True
        ):
            softmax = (piece.to(norm.dtype) - norm[:, None]).exp()
            step = softmax.scatter_add(1, index, -torch.ones_like(index, dtype=norm.dtype))
            out.copy_(step * factor)
        return result, None


def _rows(logits: Tensor) -> int:
    return max(1, _CHUNK_ELEMENTS // max(1, logits.shape[1]))
