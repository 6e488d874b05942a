"""Whether a perturbation has the right length: the same projected gradient at eps and at half of it."""

from __future__ import annotations

import math
import warnings

from torch import Tensor

from hf_eff.errors import EffWarning

LARGEST_GAP = 0.5
"""Relative difference from which on the estimate is not to be trusted."""


def warn_if_apart(losses: Tensor, closer: Tensor, eps: float, *, one_sided: bool = False) -> None:
    """Warn when curvature (eps too large) or rounding (eps too small) shows in the projected gradient.

    Args:
        losses: [2] losses above and below, at a distance of eps.
        closer: [2] the same at eps / 2.
        eps: Length of the perturbation.
        one_sided: Whether the second loss is the one at the weights themselves.
    """
    apart = eps if one_sided else 2 * eps
    far, near = float(losses[0] - losses[1]) / apart, float(closer[0] - closer[1]) / (apart / 2)
    gap = abs(far - near) / max(abs(far), abs(near), math.ulp(0.0))
    if gap > LARGEST_GAP:
        warnings.warn(
            EffWarning(
                f"the projected gradient is {far:.4g} at eps={eps:g} and {near:.4g} at eps={eps / 2:g}: lower eps if "
                "the loss is strongly curved, raise it in 16-bit arithmetic, where rounding dominates."
            ),
            stacklevel=2,
        )
