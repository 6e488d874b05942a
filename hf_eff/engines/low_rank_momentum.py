"""Momentum of LOZO-M: a mean of the left factors, [m, r] a matrix, carried over when the right factors change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_eff.engines.directions import DirectionFamily
from hf_eff.engines.low_rank_directions import LowRank
from hf_eff.engines.matrix_directions import one_thread
from hf_eff.engines.replay_log import StepRecord
from hf_eff.engines.update_rules import Groups, State, UpdateRule
from hf_eff.engines.zeroth_order import move
from hf_eff.errors import EffError


class LowRankMomentum(UpdateRule):
    """N <- beta N + (1 - beta) mean_i c_i U_i, w <- (1 - lr decay) w - lr N V^T / r.

    When V changes, N <- N (V_old^T V_new) / n: the [r, r] product comes first, so nothing of the matrix's size is
    made. Vectors keep the mean of their dense estimates. The state of a parameter is ``momentum`` and, for a matrix,
    the ``window`` whose V belongs to it.

    Args:
        beta: Decay of the mean, from 0 and below 1.
    """

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def apply(self, record: StepRecord, groups: Groups, family: DirectionFamily, state: State) -> None:
        """See the base class.

        Raises:
            EffError: The directions are not U V^T.
        """
        if not isinstance(family, LowRank):
            raise EffError(f"momentum of left factors needs low-rank directions, not {family.name!r}.")
        if record.skipped:
            return
        for group, lr, weight_decay in zip(groups, record.lr, record.weight_decay, strict=True):

            def descend(
                name: str, wide: Tensor, _before: Tensor, group: Any = group, lr: float = lr, rank: LowRank = family
            ) -> None:
                held = state.setdefault(group[name], {})
                if rank.matrix_shape(name, wide) is None:
                    wide.add_(self._dense(held, record, name, wide, rank), alpha=-lr)
                else:
                    left, right = self._left(held, record, name, wide, rank)
                    rank.add_product_(wide, name, left, right, -lr * rank.update_scale(name, wide))

            move(group.items(), family, descend, step=record.step, decay=lr * weight_decay)

    def _dense(self, held: dict[str, Any], record: StepRecord, name: str, wide: Tensor, family: LowRank) -> Tensor:
        """Mean of the estimates of a vector."""
        momentum: Tensor = held.setdefault("momentum", torch.zeros_like(wide))
        momentum.mul_(self.beta)
        for term in record.terms:
            family.add_(momentum, name, term.step, (1.0 - self.beta) * term.coefficient, draw=term.draw)
        return momentum

    def _left(
        self, held: dict[str, Any], record: StepRecord, name: str, wide: Tensor, family: LowRank
    ) -> tuple[Tensor, Tensor]:
        """[m, r] N after this step, and [n, r] V."""
        rows, columns = family.matrix_shape(name, wide) or (0, 0)
        right = family.right(name, record.step, columns, wide.device).to(wide.dtype)
        momentum = held.get("momentum")
        if momentum is None:
            momentum = torch.zeros(rows, family.rank, dtype=wide.dtype, device=wide.device)
        elif held["window"] != record.step // family.window:
            earlier = family.right(name, held["window"] * family.window, columns, wide.device).to(wide.dtype)
            with one_thread():
                momentum = momentum @ (earlier.t() @ right).div_(columns)
        momentum.mul_(self.beta)
        for term in record.terms:
            left = family.left(name, term.step, term.draw, rows, wide.device)
            momentum.add_(left, alpha=(1.0 - self.beta) * term.coefficient)
        held.update(momentum=momentum, window=record.step // family.window)
        return momentum, right

    def describe(self) -> dict[str, Any]:
        """Decay."""
        return {"name": "low_rank_momentum", "beta": self.beta}
