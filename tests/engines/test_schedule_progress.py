import pytest
import torch
from transformers import get_scheduler

from hf_eff.engines.schedule_progress import follow_budget, hold


def _scheduler(name="linear"):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    return optimizer, get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=10)


def test_linear_decay_ends_with_the_budget():
    spent = {"fraction": 0.0}
    optimizer, scheduler = _scheduler()
    follow_budget(scheduler, 10, lambda: spent["fraction"])
    rates = []
    for step in range(1, 5):
        spent["fraction"] = step / 4  # the budget buys 4 of the 10 planned steps
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    assert rates == [pytest.approx(1 - int(10 * step / 4) / 10) for step in range(1, 5)]
    assert rates[-1] == 0.0


def test_unspent_budget_leaves_the_schedule_as_it_was():
    plain, changed = _scheduler("cosine"), _scheduler("cosine")
    follow_budget(changed[1], 10, lambda: 0.0)
    for _ in range(10):
        for optimizer, scheduler in (plain, changed):
            optimizer.step()
            scheduler.step()
        assert plain[1].get_last_lr() == changed[1].get_last_lr()
    assert set(changed[1].state_dict()) == set(plain[1].state_dict())


def test_a_held_schedule_moves_once_a_sweep():
    plain, held = _scheduler("linear"), _scheduler("linear")
    hold(held[1], 4)
    rates = {"plain": [], "held": []}
    for _ in range(10):
        for name, (optimizer, scheduler) in (("plain", plain), ("held", held)):
            rates[name].append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
    assert rates["held"] == [rates["plain"][step - step % 4] for step in range(10)]
    assert len(set(rates["held"])) == 3
    assert set(held[1].state_dict()) == set(plain[1].state_dict())


def test_holding_for_one_step_changes_nothing():
    _, scheduler = _scheduler()
    before = scheduler.lr_lambdas
    hold(scheduler, 1)
    assert scheduler.lr_lambdas is before
