"""Learning-rate schedules by another clock: one that ends with the budget, one that rests between sweeps."""

from __future__ import annotations

from collections.abc import Callable

from torch.optim.lr_scheduler import LambdaLR, LRScheduler


def follow_budget(scheduler: LRScheduler, total_steps: int, spent_fraction: Callable[[], float]) -> None:
    """Let a schedule run at the larger of step progress and spent budget.

    Only ``LambdaLR`` schedules (all that transformers builds by name, but for plateau ones) are
    functions of the step; others are left alone. What is saved in checkpoints does not change.

    Args:
        scheduler: Changed in place.
        total_steps: Steps the schedule was made for.
        spent_fraction: Share of the training budget spent, in [0, 1].
    """
    if not isinstance(scheduler, LambdaLR):
        return

    def faster(rate: Callable[[int], float]) -> Callable[[int], float]:
        def at(step: int) -> float:
            return rate(max(step, int(spent_fraction() * total_steps)))

        return at

    scheduler.lr_lambdas = [faster(rate) for rate in scheduler.lr_lambdas]


def hold(scheduler: LRScheduler, every: int) -> None:
    """Let a schedule move once every ``every`` steps, and rest in between, over the same number of steps.

    Only ``LambdaLR`` schedules, as for ``follow_budget``. What is saved in checkpoints does not change.

    Args:
        scheduler: Changed in place.
        every: Optimizer steps between two values, at least 1.
    """
    if every == 1 or not isinstance(scheduler, LambdaLR):
        return

    def held(rate: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: rate(step - step % every)

    scheduler.lr_lambdas = [held(rate) for rate in scheduler.lr_lambdas]


def scale_rate(scheduler: LRScheduler, factor: Callable[[], float]) -> None:
    """Multiply what a schedule says by a factor that is asked for at each of its steps.

    Only ``LambdaLR`` schedules, as for ``follow_budget``. What is saved in checkpoints does not change.

    Args:
        scheduler: Changed in place.
        factor: In [0, 1].
    """
    if not isinstance(scheduler, LambdaLR):
        return

    def scaled(rate: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: rate(step) * factor()

    scheduler.lr_lambdas = [scaled(rate) for rate in scheduler.lr_lambdas]
