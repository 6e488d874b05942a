"""What saving and resuming under FSDP2 leave out: adapters that rest, and optimizers that keep no state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LRScheduler

_SCHEDULE = "scheduler.pt"


@contextmanager
def trainable(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Make all that an optimizer holds trainable for the time of a save.

    Of a PEFT model accelerate saves the parameters that are trainable at that moment, and would leave out the
    adapters of blocks that rest.
    """
    resting = [each for group in optimizer.param_groups for each in group["params"] if not each.requires_grad]
    for parameter in resting:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in resting:
            parameter.requires_grad_(False)


def keeps_no_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step leaves no state behind. Takes one with zero gradients at rate zero, as torch's loader does.

    Args:
        optimizer: Before its state is loaded; weights stay as they are.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return not any(optimizer.state.values())


def load_schedule(scheduler: LRScheduler | None, optimizer: torch.optim.Optimizer, checkpoint: str | Path) -> None:
    """Load the schedule alone, and give the groups the rates that it had reached.

    Args:
        scheduler: Its state is replaced; it exists by the time a checkpoint is loaded.
        optimizer: Loads nothing, so that nothing else tells it the rates.
        checkpoint: The folder that transformers wrote.
    """
    assert scheduler is not None  # noqa: S101 - transformers makes it before it loads
    # transformers' own file, read as transformers reads it.
    saved = torch.load(Path(checkpoint) / _SCHEDULE, weights_only=True)  # noqa: TID251
    scheduler.load_state_dict(saved)
    for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
