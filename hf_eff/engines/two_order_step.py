"""A step of two orders: losses on both sides of a direction for some rows, then a backward that updates for others."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_eff.contracts.memory import StepContext
from hf_eff.engines.backward_update import BackwardUpdate
from hf_eff.engines.ephemeral import EphemeralWeights, unique_parameters
from hf_eff.engines.forward_only import forward_only
from hf_eff.engines.row_split import num_rows
from hf_eff.engines.rows_alone import items_of, rows_alone
from hf_eff.engines.two_order_optimizer import TwoOrderOptimizer
from hf_eff.engines.zeroth_order import probe
from hf_eff.errors import PlanError


class TwoOrderStep:
    """Trains micro-batches whose first rows are for the gradient and whose other rows are for the direction.

    Args:
        optimizer: Makes both parts of the update.
        backward: Runs the first part in a backward; with the same optimizer.
        eps: Length of the perturbation.
        clip: Bound on the coefficient of the direction.

    Attributes:
        losses: Of the last step, by name: ``fo_loss`` and ``zo_loss``.
        coefficient: c of the last step's direction, before clipping; None where there was none.
    """

    def __init__(
        self, optimizer: TwoOrderOptimizer, backward: BackwardUpdate, *, eps: float, clip: float | None = None
    ) -> None:
        self.optimizer = optimizer
        self.backward = backward
        self.eps = eps
        self.clip = clip
        self.losses: dict[str, Tensor] = {}
        self.coefficient: float | None = None
        self._weights: EphemeralWeights | None = None
        self._window: Tensor | None = None

    def run(self, context: StepContext, short_rows: int, limit: int | None = None) -> Tensor:
        """One micro-batch. Both parts see the weights as they were before the step.

        Args:
            context: The micro-batch.
            short_rows: How many of its rows, from the first, are for the gradient.
            limit: Tokens that they have at most; None for any.

        Returns:
            The detached loss of these rows, or of the others where there are none.

        Raises:
            PlanError: A row for the gradient is longer, or rows cannot be told apart.
        """
        if context.micro_step == 0:
            self._window, self.coefficient, self.losses = None, None, {}
        rows, alpha = num_rows(context.inputs), self.optimizer.alpha
        self.optimizer.clock = context.global_step
        # With all weight on one part the other is not worked out, unless it is all there is.
        probes = short_rows < rows and (alpha > 0 or not short_rows)
        differentiates = short_rows > 0 and (alpha < 1 or not probes)
        if probes:
            self._note("zo_loss", self._probe(_part(context, slice(short_rows, rows))))
        if not differentiates:
            return self.losses["zo_loss"]
        short = _part(context, slice(short_rows))
        _require_short(short.inputs, limit)
        loss = self.backward.run(short)
        self._note("fo_loss", loss)
        return loss

    def _probe(self, context: StepContext) -> Tensor:
        """Mean loss on both sides; after the window's last micro-batch, the optimizer knows its coefficient."""

        def loss() -> Tensor:
            return context.loss(context.unwrapped, copy.copy(context.inputs), context.num_items)

        weights, family, step = self._weights_of(context.unwrapped), self.optimizer.family, context.global_step
        with forward_only(context.unwrapped):
            losses = probe(weights, family, loss, step=step, eps=self.eps, noise=context.micro_step)
        self._window = losses if self._window is None else self._window + losses
        if context.micro_step == context.micro_steps - 1:
            above, below = context.mean_over_ranks(self._window)
            self.coefficient = float((above - below) / (2 * self.eps))
            self.optimizer.stage(step, self.coefficient, self.clip)
        return losses.mean().float()

    def _note(self, name: str, loss: Tensor) -> None:
        self.losses[name] = self.losses[name] + loss if name in self.losses else loss

    def _weights_of(self, model: nn.Module) -> EphemeralWeights:
        """The parameters as they are now: a wrapper may have replaced the ones the optimizer was made with."""
        if self._weights is None:
            self._weights = EphemeralWeights(model, unique_parameters(model, self.optimizer.names))
        return self._weights

    @property
    def gradient_norm(self) -> float | None:
        """Norm of the last step's gradient, before clipping; None without one."""
        return self.backward.norm if "fo_loss" in self.losses else None

    @property
    def direction_norm(self) -> float | None:
        """Length of c z in the last step: |c| times the square root of the trained parameters."""
        return None if self.coefficient is None else abs(self.coefficient) * math.sqrt(self.optimizer.size)

    def close(self) -> None:
        """Remove the hooks and let go of the model."""
        self.backward.detach()
        self._weights = None

    def log_entries(self) -> dict[str, float]:
        """Both losses, both norms, alpha, and what was left out so far."""
        norms = {"fo_grad_norm": self.gradient_norm, "zo_grad_norm": self.direction_norm}
        return {
            **{name: float(loss) for name, loss in self.losses.items()},
            **{name: norm for name, norm in norms.items() if norm is not None},
            "alpha": self.optimizer.alpha,
            "skipped_updates": float(self.backward.skipped),
            "skipped_steps": float(self.optimizer.skipped),
        }

    def state_dict(self) -> dict[str, Any]:
        """Counts of what was left out."""
        optimizer = self.optimizer
        return {
            "skipped_updates": self.backward.skipped,
            "skipped_steps": optimizer.skipped,
            "skipped_in_a_row": optimizer.skipped_in_a_row,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict()``."""
        self.backward.skipped = int(state["skipped_updates"])
        self.optimizer.skipped = int(state["skipped_steps"])
        self.optimizer.skipped_in_a_row = int(state["skipped_in_a_row"])


def _part(context: StepContext, rows: slice) -> StepContext:
    """Some rows of a micro-batch as if they had come alone."""
    config = getattr(context.unwrapped, "config", None)
    alone = rows_alone(context.inputs, rows, two_stacks=bool(getattr(config, "is_encoder_decoder", False)))
    items = items_of(alone, context.inputs, context.num_items)
    return dataclasses.replace(context, inputs=alone, num_items=items)


def _require_short(inputs: Mapping[str, Any], limit: int | None) -> None:
    ids = inputs.get("input_ids")
    if limit is not None and isinstance(ids, torch.Tensor) and ids.shape[-1] > limit:
        raise PlanError(
            f"rows for the gradient have {ids.shape[-1]} tokens in the batch and at most {limit} in the dataset; let "
            "the collator give an attention_mask, by which padding is cut off, and add no tokens."
        )
