"""Cross entropy of a causal language model without its logits: a chunk of tokens at a time, gradients on the way."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_eff.contracts.memory import StepContext
from hf_eff.engines.forward_only import forward_only
from hf_eff.errors import PlanError

IGNORED = -100
"""Label of a position without loss."""
_CHECKED_TOKENS = 256
_TOLERANCE = 1e-2
"""Relative, for the loss of the check: bf16 rounds to a few parts in a thousand."""


# -- the loss -------------------------------------------------------------------------------------------------------


class _SummedCrossEntropy(torch.autograd.Function):
    """Sum over tokens of the cross entropy; the gradients are made in the forward, while a chunk's logits exist."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk: int, differentiate: bool
    ) -> Tensor:
        wanted = [differentiate and ctx.needs_input_grad[index] for index in range(3)]
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        with torch.autocast(device, enabled=False):
            total, gradients = _summed(hidden, weight, bias, labels, chunk, dtype, wanted)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        # In place: a second backward would see it, and torch then says so.
        gradients = [None if each is None else each.mul_(outputs[0].to(each.dtype)) for each in ctx.saved_tensors]
        return (*gradients, None, None, None)


def _summed(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    chunk: int,
    dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """Loss and gradients of hidden states [N, h], weight [V, h] and bias [V], in their own types."""
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for_hidden = torch.zeros_like(hidden) if wanted[0] else None
    for_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
    for_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wanted[2] else None
    matrix = weight.to(dtype)
    offset = None if bias is None else bias.to(dtype)
    for rows in (labels != IGNORED).nonzero().flatten().split(chunk):
        states, targets = hidden[rows].to(dtype), labels[rows, None]
        scores = functional.linear(states, matrix, offset).float()
        norms = scores.logsumexp(dim=1, keepdim=True)
        total += (norms - scores.gather(1, targets)).sum()
        if not any(wanted):
            continue
        errors = scores.sub_(norms).exp_().scatter_add_(1, targets, -torch.ones_like(norms))
        if for_bias is not None:
            for_bias += errors.sum(dim=0)
        errors = errors.to(dtype)
        if for_hidden is not None:
            for_hidden[rows] = (errors @ matrix).to(hidden.dtype)
        if for_weight is not None:
            _add_product(for_weight, errors, states)
    return total, [
        for_hidden,
        None if for_weight is None else for_weight.to(weight.dtype),
        None if for_bias is None or bias is None else for_bias.to(bias.dtype),
    ]


def _add_product(total: Tensor, errors: Tensor, states: Tensor) -> None:
    """``total += errors.T @ states`` in fp32, without a copy where the factors are fp32 themselves."""
    if errors.dtype == total.dtype:
        total.addmm_(errors.T, states)
    else:
        total += errors.T @ states


def summed_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk: int) -> Tensor:
    """Cross entropy of ``hidden @ weight.T + bias`` against labels, summed over the labels that are not -100.

    At most ``chunk x V`` logits exist at one time, in the autocast type where autocast is on and in fp32. Gradients
    take the type of what they belong to; that of the weight is added up in fp32.

    Args:
        hidden: Last hidden states [N, h].
        weight: Output matrix [V, h], frozen or not.
        bias: [V], or None.
        labels: [N] token ids, or -100.
        chunk: Tokens at a time.

    Returns:
        Scalar in fp32. It can be differentiated once.
    """
    total = _SummedCrossEntropy.apply(hidden, weight, bias, labels, chunk, torch.is_grad_enabled())
    return cast("Tensor", total)


# -- the model ------------------------------------------------------------------------------------------------------


@dataclass
class _Call:
    """One forward of the patched model."""

    labels: Tensor
    shifted: Tensor | None
    total: Tensor | None = None
    count: int | Tensor = 0


@dataclass
class _Seen:
    """What one forward of the untouched model did."""

    has_labels: bool = False
    fused: bool = False
    logits: list[Tensor] = field(default_factory=list)
    scored: list[Any] = field(default_factory=list)


class ChunkedHead:
    """Replaces a causal language model's output head and loss by the chunked one, inside ``active()``.

    The head's place in the forward is kept: hooks around it run, and weights that are swapped for its forward count.
    Its ``logits`` are then empty, and the model's output has None for them.

    Args:
        model: The model, wrapped or not.
        chunk: Tokens at a time.

    Raises:
        PlanError: It has no plain linear output head, or a loss of its own.
    """

    def __init__(self, model: nn.Module, chunk: int) -> None:
        inner: Any = _language_model(model)
        self.model: Any = inner
        self.head: nn.Module = inner.get_output_embeddings()
        self.chunk = chunk
        self._call: _Call | None = None
        if type(self.head) is not nn.Linear:
            raise PlanError(
                f"memory='chunked_loss' needs a plain linear output head and {type(inner).__name__} has "
                f"{type(self.head).__name__}: adapted, quantised and sharded heads are not supported; leave the head "
                "out of target_modules and modules_to_save, or use memory='row_chunks'."
            )
        if getattr(inner.loss_function, "__name__", "") != "ForCausalLMLoss":
            raise PlanError(
                f"memory='chunked_loss' computes the usual next-token cross entropy and {type(inner).__name__} has "
                "another loss; use memory='row_chunks'."
            )

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, a forward that is given labels computes its loss in chunks."""
        undo = [
            _set(self.model, "forward", self._forward(self.model.forward)),
            _set(self.head, "forward", self._head_forward(self.head.forward)),
            _set(self.model, "_loss_function", self._loss(self.model.loss_function)),
        ]
        try:
            yield
        finally:
            self._call = None
            for each in reversed(undo):
                each()

    def _forward(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            labels = kwargs.get("labels")
            if labels is None or kwargs.get("fused_lm_head"):
                return inner(*args, **kwargs)
            self._call = _Call(labels, kwargs.get("shift_labels"))
            try:
                return _without_logits(inner(*args, **kwargs))
            finally:
                self._call = None

        return forward

    def _head_forward(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def forward(hidden: Tensor) -> Tensor:
            call = self._call
            if call is None:
                return cast("Tensor", inner(hidden))
            labels = call.shifted
            if labels is None:
                labels = functional.pad(call.labels, (0, 1), value=IGNORED)[..., 1:]
            labels = labels.reshape(-1).to(hidden.device)
            flat = hidden.reshape(-1, hidden.shape[-1])
            weight, bias = cast("Tensor", self.head.weight), cast("Tensor | None", self.head.bias)
            call.total = summed_cross_entropy(flat, weight, bias, labels, self.chunk)
            call.count = (labels != IGNORED).sum()
            return hidden.new_zeros(*hidden.shape[:-1], 0)

        return forward

    def _loss(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def loss(*args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
            call = self._call
            if call is None or call.total is None:
                return inner(*args, num_items_in_batch=num_items_in_batch, **kwargs)
            items = call.count if num_items_in_batch is None else num_items_in_batch
            return call.total / (items.to(call.total.device) if isinstance(items, Tensor) else items)

        return loss

    # Whether it computes what the model does

    def agrees(self, context: StepContext) -> bool | None:
        """Compare with the model's own loss on a short piece of a micro-batch, without gradients.

        Returns:
            True when the chunked loss may take over, False when the trainer's own fused head is at work already, None
            when this micro-batch has no label to compare by.

        Raises:
            PlanError: The loss is not the model's own, or the model changes its logits before the loss.
        """
        piece = _piece(context.inputs)
        if piece is None:
            return None
        with forward_only(context.unwrapped):
            with self._watched() as seen:
                expected = float(context.loss(context.unwrapped, dict(piece), context.num_items))
            if seen.fused:
                return False
            self._refuse_other_losses(seen)
            with self.active():
                found = float(context.loss(context.unwrapped, dict(piece), context.num_items))
        if not abs(found - expected) <= _TOLERANCE * abs(expected) + 1e-7:
            raise PlanError(
                f"memory='chunked_loss' computes {found:.6g} where {type(self.model).__name__} computes "
                f"{expected:.6g}: its loss is not the usual next-token cross entropy; use memory='row_chunks'."
            )
        return True

    def _refuse_other_losses(self, seen: _Seen) -> None:
        if not seen.has_labels or not seen.scored:
            raise PlanError(
                "memory='chunked_loss' replaces the loss that the model computes from its labels, and this trainer "
                "computes another (label_smoothing_factor, compute_loss_func, a compute_loss of its own); use "
                "memory='row_chunks'."
            )
        plain = len(seen.logits) == len(seen.scored) == 1 and isinstance(seen.scored[0], Tensor)
        if not plain or not torch.equal(seen.logits[0].float(), seen.scored[0].float()):
            raise PlanError(
                f"memory='chunked_loss' needs a model that passes its head's outputs to the loss as they are, and "
                f"{type(self.model).__name__} scales, caps or adds to them; use memory='row_chunks'."
            )

    @contextlib.contextmanager
    def _watched(self) -> Iterator[_Seen]:
        """Note what the untouched forward does.

        Yields:
            What was seen so far.
        """
        seen, own_forward, own_loss = _Seen(), self.model.forward, self.model.loss_function

        @functools.wraps(own_forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            seen.has_labels |= kwargs.get("labels") is not None
            seen.fused |= bool(kwargs.get("fused_lm_head"))
            return own_forward(*args, **kwargs)

        def loss(*args: Any, **kwargs: Any) -> Any:
            seen.scored.append(kwargs["logits"] if "logits" in kwargs else next(iter(args), None))
            return own_loss(*args, **kwargs)

        handle = self.head.register_forward_hook(lambda _module, _inputs, output: seen.logits.append(output))
        undo = [_set(self.model, "forward", forward), _set(self.model, "_loss_function", loss)]
        try:
            yield seen
        finally:
            handle.remove()
            for each in reversed(undo):
                each()


def _language_model(model: nn.Module) -> nn.Module:
    """The transformers model with an output head, inside any wrapper."""
    from transformers import PreTrainedModel

    for part in model.modules():  # wrappers answer for what they hold, but what is set on them does not reach it
        if isinstance(part, PreTrainedModel) and part.get_output_embeddings() is not None:
            return part
    raise PlanError(
        f"memory='chunked_loss' found no transformers language model with an output head in {type(model).__name__}; "
        "use memory='row_chunks'."
    )


def _set(module: nn.Module, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute of the instance; the result undoes it."""
    had, before = name in module.__dict__, module.__dict__.get(name)
    module.__dict__[name] = value

    def undo() -> None:
        if had:
            module.__dict__[name] = before
        else:
            module.__dict__.pop(name, None)

    return undo


def _without_logits(output: Any) -> Any:
    """A model's output, tuple or not, with None for the empty logits after the loss."""
    if isinstance(output, tuple):
        return (output[0], None, *output[2:])
    return type(output)(**{name: value for name, value in output.items() if name != "logits"})


def _piece(inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The last tokens up to a label with loss, of the first row that has one; None without."""
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        return None
    scored = (labels[:, 1:] != IGNORED).nonzero()
    if not len(scored):
        return None
    row = int(scored[0, 0])
    end = int(scored[scored[:, 0] == row][-1, 1]) + 2
    start = max(0, end - _CHECKED_TOKENS)

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape[:1] != labels.shape[:1]:
            return value
        own = value[row : row + 1]
        return own[:, start:end] if value.shape[:2] == labels.shape else own

    flattened = ("cu_seq_lens", "max_length_q", "max_length_k", "seq_idx")
    return {name: cut(value) for name, value in inputs.items() if not name.startswith(flattened)}
