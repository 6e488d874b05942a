"""fixed: stop after a share of the planned steps, or after a number of epochs, whatever the loss does.

Idea
    What most runs do: the end is chosen beforehand. The learning-rate schedule stays that of the whole plan:

        stop after  ceil(share * planned steps)  optimizer steps,  share = epochs / of_epochs where epochs are given

Cost       none

Use when   a comparison needs a policy that looks at nothing.
Avoid when the number of steps can simply be set: then ``num_train_epochs`` or ``max_steps`` does the same, with the
           schedule fitted to it.
Differs    from nothing: it is a baseline.

Paper      none, a baseline
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.governor import Decision, Governor, Telemetry
from hf_eff.contracts.spec import MethodConfig, MethodSpec, Traits, knob
from hf_eff.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class FixedConfig(MethodConfig):
    """Options of ``governor="fixed"``."""

    share: float = knob(1 / 3, "Share of the planned steps to do, unless epochs are given.", low=0.0, high=1.0)
    epochs: float | None = knob(None, "Epochs to do, of the planned ``of_epochs``.", low=0.0, unit="epochs")
    of_epochs: float | None = knob(None, "Epochs that the run is planned for.", low=1e-6, unit="epochs")

    def __post_init__(self) -> None:
        """Check that epochs are given with what they are a part of.

        Raises:
            OptionError: One of ``epochs`` and ``of_epochs`` is missing, or the first is larger.
        """
        super().__post_init__()
        if (self.epochs is None) != (self.of_epochs is None):
            raise OptionError(
                "FixedConfig.epochs and FixedConfig.of_epochs must be given together, "
                f"got epochs={self.epochs!r} and of_epochs={self.of_epochs!r}."
            )
        if self.epochs is not None and self.of_epochs is not None and self.epochs > self.of_epochs:
            raise OptionError(f"FixedConfig.epochs must be at most of_epochs={self.of_epochs:g}, got {self.epochs:g}.")

    def last_step(self, planned: int) -> int:
        """Step after which the run ends, of so many planned; at least 1, because a policy looks after a step."""
        if self.epochs is not None and self.of_epochs is not None:
            steps = planned * self.epochs / self.of_epochs
        else:
            steps = planned * self.share
        # A third of 300 steps is 100, also where the product comes out a little above.
        return max(1, math.ceil(steps - 1e-9 * planned))


class Fixed(Governor):
    """Counts steps.

    Args:
        config: Options.
    """

    def __init__(self, config: FixedConfig) -> None:
        self.config = config

    def observe(self, telemetry: Telemetry) -> Decision:
        """Stop once the step has come."""
        if telemetry.max_steps <= 0:
            return Decision("continue", "the number of planned steps is unknown")
        last = self.config.last_step(telemetry.max_steps)
        if telemetry.step >= last:
            return Decision("stop", f"{last} of {telemetry.max_steps} planned steps are done", {"last_step": last})
        return Decision("continue", f"fewer than {last} steps are done")


def cost(config: FixedConfig, facts: Facts) -> Cost:  # noqa: ARG001 - the contract's signature
    """Nothing is computed beyond the training itself."""
    return Cost()


SPEC = MethodSpec(
    name="fixed",
    kind="governor",
    slot="policy",
    summary="stop after a share of the planned steps, or after a number of epochs, whatever the loss does.",
    config=FixedConfig,
    build=Fixed,
    cost=cost,
    traits=Traits(baseline=True, fsdp2=True, streaming=True),
    tiny={"share": 1.0},
    known_failures=(("check_unlimited", "it stops at its step whatever the loss does"),),
)
