"""Updates inside the backward: each gradient is used as soon as it is complete, and freed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from hf_eff.contracts.memory import StepContext
from hf_eff.engines.parameter_optimizer import ParameterOptimizer

Mode = Literal["hold", "measure", "update"]


class BackwardUpdate:
    """Runs the training step of one micro-batch with an optimizer's updates inside its backward.

    A hook fires once a parameter's gradient is complete, the sum over all uses of a tied weight included. It updates
    the parameter and drops the gradient, so that one gradient exists at a time. Outside ``run`` the hooks do nothing.

    A step of several micro-batches (rows in chunks) needs the sum of their gradients: they are held until the last
    one, whose backward updates. A clipped step needs the norm of all gradients before the first update: the backward
    runs twice over one forward, first to measure, then to update.

    A gradient that is not finite moves nothing: its parameter is left out of this step and counted, or the whole step
    when it is clipped.

    Args:
        optimizer: Makes the updates.
        max_norm: Bound on the norm of all gradients together, as ``clip_grad_norm_`` applies it; 0 for none.
        clip_value: Bound on each entry of a gradient; None for none.

    Attributes:
        skipped: Updates left out so far.
    """

    def __init__(
        self, optimizer: ParameterOptimizer, *, max_norm: float = 0.0, clip_value: float | None = None
    ) -> None:
        self.optimizer = optimizer
        self.max_norm = max_norm
        self.clip_value = clip_value
        self.skipped = 0
        self._mode: Mode = "hold"
        self._norms: dict[str, Tensor] = {}
        self._factor: Tensor | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def attach(self) -> None:
        """Register the hooks; once the parameters are the final ones, because sharding replaces them."""
        self.detach()
        for index, (_, named) in enumerate(self.optimizer.grouped()):
            for name, parameter in named:
                hook = self._hook(name, index)
                self._handles.append(parameter.register_post_accumulate_grad_hook(hook))

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def run(self, context: StepContext) -> Tensor:
        """One micro-batch; the last one of a step leaves no gradient behind.

        Returns:
            The detached loss.
        """
        last = context.micro_step == context.micro_steps - 1
        if context.micro_step == 0:
            self._norms.clear()
            self.optimizer.clock = context.global_step
        if self.max_norm and context.micro_steps == 1:
            return self._measure_then_update(context)
        with self._acting("update" if last and not self.max_norm else "hold"):
            loss = context.stock(context.model, context.inputs, context.num_items)
        if last and self.max_norm:
            self._update_held()
        return loss

    @property
    def norm(self) -> float | None:
        """Norm of all gradients of the last step, before clipping; None before the first."""
        return float(self._total()) if self._norms else None

    def _measure_then_update(self, context: StepContext) -> Tensor:
        context.model.train()
        loss = context.loss(context.model, context.inputs, context.num_items)
        with self._acting("measure"):
            loss.backward(retain_graph=True)
        if self._set_factor():
            with self._acting("update"):
                loss.backward()
        return loss.detach()

    @torch.no_grad()
    def _update_held(self) -> None:
        """Clip and apply gradients that have been added up over several micro-batches."""
        held = [(n, p, group) for group, named in self.optimizer.grouped() for n, p in named if p.grad is not None]
        for name, parameter, _ in held:
            self._prepare(name, parameter)
        fits = self._set_factor()
        for name, parameter, group in held:
            if fits:
                self._scale(parameter)
                self.optimizer.update(name, parameter, group)
            parameter.grad = None

    @contextmanager
    def _acting(self, mode: Mode) -> Iterator[None]:
        self._mode = mode
        try:
            yield
        finally:
            self._mode = "hold"

    def _hook(self, name: str, index: int) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def visit(parameter: Tensor) -> None:
            if self._mode == "hold":
                return
            if self._mode == "measure" or not self.max_norm:
                self._prepare(name, parameter)
            if self._mode == "update" and self._fits(name):
                self._scale(parameter)
                self.optimizer.update(name, parameter, self.optimizer.param_groups[index])
            parameter.grad = None

        return visit

    def _prepare(self, name: str, parameter: Tensor) -> None:
        """Note a gradient's norm."""
        gradient = parameter.grad
        assert gradient is not None  # noqa: S101 - the hook fires with a gradient
        kind = gradient.dtype if gradient.dtype == torch.float64 else torch.float32
        self._norms[name] = torch.linalg.vector_norm(gradient, dtype=kind)

    def _fits(self, name: str) -> bool:
        """Whether this gradient is finite; of a clipped step it is known already."""
        if self.max_norm or bool(self._norms[name].isfinite()):
            return True
        self.skipped += 1
        return False

    def _scale(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None  # noqa: S101 - callers looked
        if self._factor is not None and self.max_norm:
            gradient.mul_(self._factor.to(gradient.device))
        if self.clip_value is not None:
            gradient.clamp_(-self.clip_value, self.clip_value)

    def _set_factor(self) -> bool:
        """Set what clipping multiplies gradients with; False when the norm is not finite."""
        if not self._norms:
            return False
        total = self._total()
        self._factor = torch.clamp(self.max_norm / (total + 1e-6), max=1.0)  # the terms of clip_grad_norm_
        finite = bool(total.isfinite())
        self.skipped += 0 if finite else len(self._norms)
        return finite

    def _total(self) -> Tensor:
        """Norm over all parameters, added up in the model's order as ``clip_grad_norm_`` does."""
        norms = [self._norms[name] for name in self.optimizer.names if name in self._norms]
        return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
