"""Whether choosing rows pays: what it costs against the training that it saves.

Selecting k rows pays iff C_T(k) (r / r0 - 1) > C_sel / n: rows that teach r / r0 times as fast as random ones save that
much training in each of n uses (after Yin and Rush 2025, arXiv:2410.16208).
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class PayBack:
    """Cost of selecting beside the training it is for.

    Attributes:
        selection_flops: FLOPs of selecting, once.
        training_flops: FLOPs of training on the chosen rows.
        speedup: How much faster than random rows the chosen ones are expected to teach; 1 means not at all.
    """

    selection_flops: float
    training_flops: float
    speedup: float

    @property
    def needed_speedup(self) -> float:
        """Speed-up above which selecting pays when the choice is used once."""
        if not self.selection_flops:
            return 1.0
        return 1.0 + self.selection_flops / self.training_flops if self.training_flops else math.inf

    @property
    def break_even_uses(self) -> float:
        """Trainings that the choice must serve before it pays; infinite when it never does."""
        gain = self.training_flops * (self.speedup - 1.0)
        if not self.selection_flops:
            return 0.0
        return self.selection_flops / gain if gain > 0 else math.inf

    def pays(self, uses: float = 1.0) -> bool:
        """Whether the training saved in ``uses`` trainings is more than what selecting costs."""
        return self.selection_flops == 0 or uses > self.break_even_uses

    def __str__(self) -> str:
        """The verdict, one sentence."""
        if not self.selection_flops:
            return "selection costs no FLOPs."
        if self.pays():
            return (
                f"selection pays at its first use if its rows teach {self.speedup:.2g}x as fast as random ones; "
                f"it needs {self.needed_speedup:.3g}x."
            )
        uses = self.break_even_uses
        after = "never pays" if math.isinf(uses) else f"pays after {math.floor(uses) + 1} uses of the same choice"
        return (
            f"selection {after} if its rows teach {self.speedup:.2g}x as fast as random ones; at its first use it "
            f"needs {self.needed_speedup:.3g}x."
        )
